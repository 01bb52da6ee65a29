import hashlib

import pytest

from sparsekern.paper import results
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


def test_a_kill_between_checksum_and_content_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    results.write(path, Result({}, ROWS, {}))
    real = results.write_atomically

    def full_disk(target, content):
        if target == path:
            raise OSError("No space left on device")
        real(target, content)

    monkeypatch.setattr(results, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        results.write(path, Result({}, ROWS[:1], {}))
    with pytest.raises(DamagedResult):
        results.read(path)
