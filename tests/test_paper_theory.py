import pytest

from sparsekern.paper import __main__ as paper
from sparsekern.paper import results


@pytest.mark.parametrize("name", ["figure2", "figure3"])
def test_figures_are_simulated_once_and_drawn(name, tmp_path, capsys, monkeypatch):
    arguments = [name, "--trials", "2000", "--out", str(tmp_path)]
    assert paper.main(arguments) == 0
    rows = results.read(tmp_path / f"{name}.csv").rows
    for row in rows:
        simulated, predicted = float(row["simulated"]), float(row["predicted"])
        spread = (predicted * (1 - predicted) / 2000) ** 0.5
        # Figure 3 predicts by trials too; a hundredth is for events that are nearly never seen.
        assert abs(simulated - predicted) <= 8 * spread + 0.01
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
    capsys.readouterr()
    before = (tmp_path / f"{name}.svg").read_bytes()
    assert paper.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"from {tmp_path}" in out
    assert (tmp_path / f"{name}.svg").read_bytes() == before
    assert paper.main([*arguments, "--seed", "1"]) == 1
    assert "seed is 42 there and 1 here" in capsys.readouterr().err
