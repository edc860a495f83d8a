"""The shell commands that README.md and docs/ name, in fenced blocks and in running text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md"))))
PROGRAMS = (
    *(
        "accelerate",
        "apt-get",
        "cat",
        "docker",
        "dvc",
        "export",
        "gto",
        "git",
        "make",
        "mlflow",
        "pip",
        "prefect",
        "psql",
    ),
    *("pytest", "python", "sbatch", "spo", "torchrun"),
)
# inline: `dvc repro`, with an argument at least; `spo` alone is a name
INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")


class Command(NamedTuple):
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands() -> list[Command]:
    """In the order of the pages; a line with several (`a && b; c`) gives each."""
    return [
        Command(page, number, part)
        for page in PAGES
        for number, text in _lines((ROOT / page).read_text().splitlines())
        for part in _parts(text)
    ]


def blocks() -> list[tuple[str, list[str]]]:
    """(page:line, lines) of each fenced block."""
    return [
        (f"{page}:{start}", lines)
        for page in PAGES
        for start, lines in _fenced((ROOT / page).read_text().splitlines())
    ]


def is_shell(lines: list[str]) -> bool:
    """Whether a block begins with a command."""
    return lines[0].split()[0] in PROGRAMS


def _fenced(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    start: int | None = None
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if start is not None:
                yield start + 1, lines[start : number - 1]
            start = number if start is None else None


def _lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    fenced = set[int]()
    for start, block in _fenced(lines):
        fenced |= set(range(start, start + len(block)))
        if is_shell(block):
            yield from _commands(start, block)
    prose = "\n".join("" if n in fenced else line for n, line in enumerate(lines, start=1))
    for found in INLINE.finditer(prose):
        yield prose.count("\n", 0, found.start()) + 1, " ".join(found[1].split())


def _commands(start: int, block: list[str]) -> Iterator[tuple[int, str]]:
    """Lines of a shell block: comments and here-documents left out, continued lines joined."""
    text, end = "", None
    for number, line in enumerate(block, start=start):
        if end is not None:
            end = None if line == end else end
            continue
        text += re.sub(r"(^|\s+)#.*", "", line)
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if here := re.search(r"<<(\w+)", text):
            end = here[1]
        if text.strip():
            yield number, text.strip()
        text = ""


def _parts(text: str) -> list[str]:
    """Split at && and ; outside quotes."""
    words = shlex.shlex(text, posix=False, punctuation_chars=";&")
    words.whitespace_split, words.commenters = True, ""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in (";", "&&"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [" ".join(part) for part in parts if part]
