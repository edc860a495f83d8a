"""Prompt lists: read from any of the usual formats, cleaned, deduplicated, split without leakage."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        ".txt": lambda p: p.read_text(encoding="utf-8").splitlines(),
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


def parquet_captions(path: Path) -> Iterator[str]:
    """The `caption` column of a parquet file, a batch in memory at a time."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        name = _column(file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=1024, columns=[name]):
            yield from (str(c or "") for c in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0][:120]})"
        ) from None


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


def select(
    prompts: Iterable[str], length: Callable[[str], int], max_tokens: int, forbidden: Iterable[str] = ()
) -> Kept:
    """Clean prompts and leave out empty, too long, repeated and forbidden ones.

    Args:
        length: tokens of a prompt, with start and end.
        forbidden: keys (see `key`) of prompts that must not be among them.
    """
    kept, seen, never = Kept([]), set[str](), set(forbidden)
    for raw in prompts:
        prompt = clean(raw)
        name = key(prompt)
        if not name:
            kept.left_out["empty"] += 1
        elif name in never:
            kept.left_out["elsewhere"] += 1
        elif name in seen:
            kept.left_out["duplicate"] += 1
        elif length(prompt) > max_tokens:
            kept.left_out["too_long"] += 1
        else:
            seen.add(name)
            kept.prompts.append(prompt)
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno} ({error.msg})") from None
    if not isinstance(content, list):
        raise ValueError(f"{path}: must be a list of captions, is a {type(content).__name__}")
    return [_caption(item, path, f"item {i}") for i, item in enumerate(content)]


def _jsonl(path: Path) -> list[str]:
    captions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            captions.append(_caption(json.loads(line), path, f"line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
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
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        name = _column(list(reader.fieldnames or []), path)
        return [row[name] or "" for row in reader]


def _column(names: Sequence[str], path: Path, where: str = "the header") -> str:
    for wanted in COLUMNS:
        for name in names:
            if name.casefold().lstrip("\ufeff") == wanted:
                return name
    told = ", ".join(map(str, names)) or "nothing"
    raise ValueError(f"{path}: {where} has no {', '.join(COLUMNS)}; it has {told}")
