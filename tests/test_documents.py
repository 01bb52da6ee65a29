"""What README.md and docs/guide.md show runs, and what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/guide.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_snippet_runs(document, tmp_path, monkeypatch):
    """One after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), names)
    assert snippets


def test_readmes_boosting_steps(tmp_path):
    """The call after each epoch changes something in README's example."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(snippet, names)
    assert [float(layer.boost_strength) for layer in names["model"] if hasattr(layer, "boost_strength")] == [
        pytest.approx(1.5 * 0.85)
    ] * 3


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/performance.md", "docs/design.md"])
def test_links_lead_somewhere(document):
    """Files, and headings of them."""
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/performance.md", "docs/design.md", "CHANGELOG.md"])
def test_lines_are_not_too_long(document):
    """But for tables, links and commands."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 124 and not line.startswith(("|", "    "))] == []
