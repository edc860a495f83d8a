"""Prompt lists: read from any of the usual formats, cleaned, deduplicated, split without leakage."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COLUMNS = ("caption", "prompt", "text")  # looked for in this order, whatever their case


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt (one a line), .json, .jsonl, .csv, .tsv or .parquet file, in order.

    Raises:
        ValueError: no such file, another ending, a line that cannot be read, or no caption column.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no prompts there; run `make repro` or `dvc pull data.dvc`")
    readers: dict[str, Callable[[Path], list[str]]] = {
        ".txt": _lines,
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": lambda p: _table(p, ","),
        ".tsv": lambda p: _table(p, "\t"),
        ".parquet": lambda p: list(parquet_captions(p)),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: prompts are read from {', '.join(readers)}, not {path.suffix or 'this'}")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def _lines(path: Path) -> list[str]:
    """One prompt a line; U+2028 and the like are within a prompt, not its end."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return lines if lines[-1] else lines[:-1]


def parquet_captions(path: Path) -> Iterator[str]:
    """The `caption` column of a parquet file, a batch in memory at a time."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        name = _column(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1024, columns=[name]):
            yield from (str(c or "") for c in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or ["torn"])[0][:120]
        raise ValueError(f"{path}: not a readable parquet file ({reason})") from None


def clean(prompt: str) -> str:
    """NFC, no control or invisible characters, single spaces."""
    text = unicodedata.normalize("NFC", prompt)
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or _visible(c))
    return " ".join(text.split())


def key(prompt: str) -> str:
    """What near duplicates share: letters and digits alone, case folded, marks removed."""
    text = unicodedata.normalize("NFKD", prompt).casefold()
    return " ".join(re.findall(r"[^\W_]+", "".join(c for c in text if not unicodedata.combining(c))))


@dataclass
class Kept:
    """Cleaned prompts, and why the others were left out: in = kept + left out."""

    prompts: list[str]
    left_out: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, why)


@dataclass(frozen=True)
class BlockList:
    """Words and phrases that no prompt may have."""

    pattern: re.Pattern[str]

    @classmethod
    def load(cls, path: str | Path) -> BlockList:
        """From a text file: one word or phrase a line; empty lines and those that start with # are skipped.

        Raises:
            ValueError: no such file, or nothing in it.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no block list there; look at prompts.block_list in params.yaml")
        phrases = {key(line) for line in read_prompts(path) if not line.startswith("#")} - {""}
        if not phrases:
            raise ValueError(f"{path}: the block list is empty; leave prompts.block_list out instead")
        told = "|".join(map(re.escape, sorted(phrases)))
        return cls(re.compile(rf"(?:^| )(?:{told})(?:$| )"))

    def __contains__(self, name: str) -> bool:
        """Whether a prompt's key has one of them as whole words."""
        return self.pattern.search(name) is not None


def select(
    prompts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    forbidden: Iterable[str] = (),
    blocked: BlockList | None = None,
) -> Kept:
    """Clean prompts and leave out empty, blocked, too long, repeated and forbidden ones.

    Args:
        length: tokens of a prompt, with start and end.
        forbidden: keys (see `key`) of prompts that must not be among them.
    """
    kept, seen, never = Kept([]), set[str](), set(forbidden)
    for number, raw in enumerate(prompts):
        prompt = clean(raw)
        name = key(prompt)
        reason = None
        if not name:
            reason = "empty"
        elif name in never:
            reason = "elsewhere"
        elif name in seen:
            reason = "duplicate"
        elif blocked is not None and name in blocked:
            reason = "blocked"
        elif length(prompt) > max_tokens:
            reason = "too_long"
        if reason is None:
            seen.add(name)
            kept.prompts.append(prompt)
        else:
            kept.left_out[reason] += 1
            kept.reasons.append((number, reason))
    return kept


def by_hash(prompts: Sequence[str], seed: int) -> list[str]:
    """In an order that depends on the seed and each prompt's content alone, not on the file's order."""

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed} {key(prompt)}".encode()).digest()

    return sorted(prompts, key=rank)


def check_vocabulary(prompts: Iterable[str], path: str | Path) -> None:
    """Every word of the prompts must be in the list at `path` (one a line).

    Raises:
        ValueError: the first prompt with other words, which ones, and words near to them.
    """
    known = set(Path(path).read_text(encoding="utf-8").split())
    for prompt in prompts:
        strange = [w for w in prompt.casefold().split() if w not in known]
        if strange:
            near = [m for w in strange for m in difflib.get_close_matches(w, sorted(known), n=1)]
            hint = f"; near to it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"prompt {prompt!r}: {', '.join(map(repr, strange))} not in the vocabulary of the model "
                f"({path}){hint}"
            )


def _visible(character: str) -> bool:
    """Neither control, format, surrogate nor unassigned; joiners stay, scripts and emoji need them."""
    return character in "\u200c\u200d" or unicodedata.category(character)[0] != "C"


def _json(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno} ({error.msg})") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}: {str(error)[:100]}") from None
    if not isinstance(content, list):
        raise ValueError(f"{path}: must be a list of captions, is a {type(content).__name__}")
    return [_caption(item, path, f"item {i}") for i, item in enumerate(content)]


def _jsonl(path: Path) -> list[str]:
    captions = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            captions.append(_caption(json.loads(line), path, f"line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
        except ValueError as error:
            told = str(error)[:300]
            raise ValueError(told if str(path) in told else f"{path}: line {number}: {told}") from None
    return captions


def _caption(item: Any, path: Path, where: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        name = _column([str(k) for k in item], path, where)
        if isinstance(item[name], str):
            return item[name]
    raise ValueError(f"{path}: {where} is neither a caption nor an object with one")


def _table(path: Path, delimiter: str) -> list[str]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        return _cells(text, path, delimiter, csv.QUOTE_MINIMAL)
    except csv.Error as error:
        if delimiter != "\t":
            raise ValueError(f"{path}: {error}") from None
    try:  # tabs need no quotes: in lists such as PartiPrompts a quote at the start is part of the prompt
        return _cells(text, path, delimiter, csv.QUOTE_NONE)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def _cells(text: str, path: Path, delimiter: str, quoting: Literal[0, 3]) -> list[str]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        name = _column(list(reader.fieldnames or []), path)
        return [row[name] or "" for row in reader]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


def _column(names: Sequence[str], path: Path, where: str = "the header") -> str:
    for wanted in COLUMNS:
        for name in names:
            if name.casefold().lstrip("\ufeff") == wanted:
                return name
    told = ascii(", ".join(map(str, names)))[1:-1][:300] or "nothing"
    raise ValueError(f"{path}: {where} has no {', '.join(COLUMNS)}; it has {told}")
