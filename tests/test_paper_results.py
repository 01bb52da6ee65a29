import hashlib

import pytest

from sparsekern.paper import checkpoint, results
from sparsekern.paper.results import ConfigurationMismatch, DamagedResult, Result

CONFIGURATION = {"network": {"k": [400, 300]}, "seed": 42}
ROWS = [{"n": 1, "p": 0.5}, {"n": 2, "p": 1e-30}]


def silent(_):
    pass


def never():
    raise AssertionError("made again")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "table.csv"
    results.write(path, Result(CONFIGURATION, ROWS, {"device": "x"}))
    found = results.read(path)
    assert found.configuration == CONFIGURATION
    assert found.environment == {"device": "x"}
    assert [(int(row["n"]), float(row["p"])) for row in found.rows] == [(1, 0.5), (2, 1e-30)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["table.csv", "table.csv.sha256"]


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    results.write_checked(tmp_path / "a.csv", b"hello")
    assert (tmp_path / "a.csv.sha256").read_text() == f"{hashlib.sha256(b'hello').hexdigest()}  a.csv\n"


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum"])
def test_a_damaged_result_is_named_and_made_anew(tmp_path, damage):
    path = tmp_path / "table.csv"
    results.made_once(path, CONFIGURATION, lambda: ROWS, report=silent)
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        (tmp_path / "table.csv.sha256").unlink()
    with pytest.raises(DamagedResult, match=r"table\.csv"):
        results.read(path)
    said = []
    results.made_once(path, CONFIGURATION, lambda: ROWS, report=said.append)
    assert "table.csv" in said[0]
    assert "made anew" in said[0]
    assert results.read(path).rows == [{"n": "1", "p": "0.5"}, {"n": "2", "p": "1e-30"}]


def test_a_result_is_made_once(tmp_path):
    path = tmp_path / "table.csv"
    results.made_once(path, CONFIGURATION, lambda: ROWS, report=silent)
    before = path.read_bytes()
    results.made_once(path, CONFIGURATION, never, report=silent)
    assert path.read_bytes() == before


def test_another_configuration_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    results.made_once(path, CONFIGURATION, lambda: ROWS, report=silent)
    with pytest.raises(ConfigurationMismatch, match=r"network k is \[400, 300\] there and \[1\] here"):
        results.made_once(path, {"network": {"k": [1]}, "seed": 42}, never, report=silent)


STEPS = 6  # of write_checked: content and checksum to the disk, one renamed, the folder, the other renamed, the folder


def dying_at(step, monkeypatch, error):
    """From here on the writer fails at its step of this number, a file's write after half of the content."""
    done = 0

    def dying(function):
        def call(*args):
            nonlocal done
            done += 1
            if done <= step:
                return function(*args)
            if function is write_synced:
                args[0].write_bytes(args[1][: len(args[1]) // 2])
            raise error

        return call

    write_synced = checkpoint.write_synced
    for module in (results, checkpoint):
        monkeypatch.setattr(module, "write_synced", dying(write_synced))
    monkeypatch.setattr(results, "sync_folder", dying(checkpoint.sync_folder))
    monkeypatch.setattr(results.os, "replace", dying(results.os.replace))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_or_a_full_disk_leaves_the_old_result_or_the_new(tmp_path, monkeypatch, step, first, error):
    path = tmp_path / "table.csv"
    old, new = ({"n": "1"}, {"n": "2"})
    if not first:
        results.write(path, Result({}, [old], {}))
    with monkeypatch.context() as patch:
        dying_at(step, patch, error)
        with pytest.raises(type(error)):
            results.write(path, Result({}, [new], {}))
    if step > 2:  # the checksum has been renamed
        assert results.read(path).rows == [new]
        assert path.exists()
    elif first:
        with pytest.raises(FileNotFoundError, match=r"table\.csv"):
            results.read(path)
    else:
        assert results.read(path).rows == [old]
    results.write(path, Result({}, [old, new], {}))
    assert results.read(path).rows == [old, new]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.csv", "table.csv.sha256"]


def test_a_full_disk_after_a_kill_leaves_the_newest_result(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    results.write(path, Result({}, [{"n": "1"}], {}))
    # The second writer's first step is the renaming that the first one did not come to.
    for n, step, error in (("2", 3, KeyboardInterrupt()), ("3", 1, OSError("No space left on device"))):
        with monkeypatch.context() as patch:
            dying_at(step, patch, error)
            with pytest.raises(type(error)):
                results.write(path, Result({}, [{"n": n}], {}))
    assert results.read(path).rows == [{"n": "2"}]


def test_who_may_not_write_reads_what_a_killed_writer_left(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    results.write(path, Result({}, ROWS, {}))
    path.rename(checkpoint.beside(path))

    def refused(*paths):
        raise OSError("Read-only file system")

    monkeypatch.setattr(results.os, "replace", refused)
    assert len(results.read(path).rows) == 2


def test_what_a_killed_writer_left_is_never_taken_for_the_result(tmp_path):
    path = tmp_path / "table.csv"
    results.write(path, Result({}, ROWS, {}))
    content = path.read_bytes()
    checkpoint.beside(path).write_bytes(content[:-1])
    assert results.read(path).configuration == {}
    path.write_bytes(content[:-2])
    with pytest.raises(DamagedResult, match=r"table\.csv"):
        results.read(path)
