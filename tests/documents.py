"""What README.md and docs/ say, for tests to hold against the program: names in tables, files, and commands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "make", "duckdb", "curl", "serve", "ray", "docker", "aws", "kubectl", "pip", "protopnet")


def section(title: str, document: str = "docs/data-formats.md") -> str:
    """Text below a heading, up to the next one of the same or a higher level; paragraphs stand apart by an empty line."""
    text = (ROOT / document).read_text()
    heading = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert heading, f"{document} has no section {title}"
    rest = text[heading.end() :]
    following = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    return (rest[: following.start()] if following else rest).strip()


def names(text: str) -> set[str]:
    """Names of files, columns and keys: words in backticks, without `[]`, spaces or options."""
    return {word for word in re.findall(r"`([^`]+)`", text) if re.fullmatch(r"[\w.*<>-]+", word)}


def in_block(text: str) -> set[str]:
    """Names at the start of the lines of a block of files, below its first line."""
    block = re.search(r"(?:^|\n) *\S+/\n((?:      \S.*(?:\n|$))+)", text)
    assert block, text
    return {re.split(r"\s{2,}", line.strip())[0] for line in block[1].splitlines()}


def rows(text: str, header: str) -> dict[str, str]:
    """First cell and the rest of each row of the table whose first column has this header."""
    table = text.split(f"| {header} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return {
        cells[0]: " | ".join(cells[1:])
        for cells in ([c.strip() for c in row.strip("| ").split(" | ")] for row in table)
    }


def first_column(text: str, header: str) -> set[str]:
    """Names in the first cells of a table."""
    return names(" ".join(rows(text, header)))


@dataclass(frozen=True)
class Command:
    """A command line of a document, its continuations joined; `not_run` is the reason that stands above its block."""

    document: str
    text: str
    not_run: str | None

    @property
    def program(self) -> str:
        words = [word for word in self.text.split() if not re.fullmatch(r"[A-Z_a-z0-9]+=\S*", word)]
        return words[0] if words else ""


def commands() -> Iterator[Command]:
    """Every command in the indented blocks of the documents, in order."""
    for path in DOCUMENTS:
        reason = None
        for paragraph in path.read_text().replace("\\\n", " ").split("\n\n"):
            mark = re.match(r"\s*<!-- not run: (.+?) -->\n?", paragraph, re.DOTALL)
            if mark:
                reason, paragraph = mark[1], paragraph[mark.end() :]
            for line in paragraph.splitlines():
                command = Command(str(path.relative_to(ROOT)), re.sub(r"\s+# .*", "", line.strip()), reason)
                if line.startswith("    ") and command.program in PROGRAMS:
                    yield command
            if not mark or paragraph.strip():
                reason = None
