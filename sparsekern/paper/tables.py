"""A table that prints on a terminal and in a Markdown document."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console


@dataclass
class Table:
    """Cells of text under a title; the first column names the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines]
        console.print(self.title, text[0], "-" * len(text[0]), *text[1:], *self.notes, "", sep="\n", markup=False)

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join([f"**{self.title}**", table, *self.notes])
