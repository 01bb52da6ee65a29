import pytest
import torch

from sparsekern.paper import checkpoint


def state(number):
    return {"number": number, "tensor": torch.full((1000,), float(number))}


def silent(_):
    pass


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path) is None


def test_what_was_saved_is_loaded_and_the_one_before_is_kept(tmp_path):
    for number in range(3):
        checkpoint.save(tmp_path, state(number))
        assert checkpoint.load(tmp_path)["number"] == number
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)["number"] == 1
    assert torch.equal(checkpoint.load(tmp_path)["tensor"], torch.full((1000,), 2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME]


def damage_cut(data):
    return data[: len(data) // 2]


def damage_flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damage_beginning(data):
    return b"x" + data[1:]


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_beginning, lambda data: b""])
def test_a_damaged_one_is_named_and_the_previous_one_taken(tmp_path, damage):
    checkpoint.save(tmp_path, state(0))
    checkpoint.save(tmp_path, state(1))
    path = tmp_path / checkpoint.NAME
    path.write_bytes(damage(path.read_bytes()))
    lines = []
    assert checkpoint.load(tmp_path, report=lines.append)["number"] == 0
    [line] = lines
    assert str(path) in line
    assert checkpoint.PREVIOUS in line
    # The damaged file must not become the previous one, nor be reported again.
    checkpoint.save(tmp_path, state(2))
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)["number"] == 0
    assert checkpoint.load(tmp_path, report=lines.append)["number"] == 2
    assert len(lines) == 1


def test_of_several_ranks_one_sets_the_damaged_one_aside(tmp_path):
    for number in range(2):
        checkpoint.save(tmp_path, state(number))
    path = tmp_path / checkpoint.NAME
    path.write_bytes(damage_cut(path.read_bytes()))
    assert checkpoint.load(tmp_path, report=silent, set_aside=False)["number"] == 0
    assert path.exists()
    assert checkpoint.load(tmp_path, report=silent)["number"] == 0
    assert not path.exists()
    assert checkpoint.load(tmp_path, report=silent, set_aside=False)["number"] == 0


def test_all_damaged(tmp_path):
    checkpoint.save(tmp_path, state(0))
    checkpoint.save(tmp_path, state(1))
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="no good checkpoint is left"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("killed_at", range(4))
def test_a_kill_while_saving_leaves_a_good_checkpoint(tmp_path, monkeypatch, killed_at):
    checkpoint.save(tmp_path, state(0))
    checkpoint.save(tmp_path, state(1))
    calls = 0

    def dying(function):
        def call(*args):
            nonlocal calls
            if calls == killed_at:
                raise KeyboardInterrupt
            calls += 1
            return function(*args)

        return call

    monkeypatch.setattr(checkpoint.os, "replace", dying(checkpoint.os.replace))
    monkeypatch.setattr(checkpoint.os, "fsync", dying(checkpoint.os.fsync))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path, report=silent)["number"] == (2 if killed_at == 3 else 1)
    checkpoint.save(tmp_path, state(3))
    assert checkpoint.load(tmp_path)["number"] == 3
