"""Tables for people: the same cells as Markdown and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from protopnet.pages.templates import render


@dataclass(frozen=True)
class Sheet:
    """A table as text: its title, what its columns are called, and cells; the first column is text, others numbers."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(name: str, sheets: Sequence[Sheet]) -> str:
    """Those sheets that say something, below a heading."""
    parts = [f"# {name}"]
    for sheet in filled(sheets):
        lines = ["---", *["---:"] * (len(sheet.header) - 1)]
        table = [_line(sheet.header), _line(lines), *map(_line, sheet.rows)]
        parts += [f"## {sheet.title}", sheet.note, "\n".join(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(name: str, sheets: Sequence[Sheet]) -> str:
    return render("experiments/table.html.j2", title=name, sheets=filled(sheets))


def filled(sheets: Sequence[Sheet]) -> list[Sheet]:
    return [sheet for sheet in sheets if sheet.rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
