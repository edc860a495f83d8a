"""Stage `prompts`: clean, deduplicate and split; no evaluation prompt is in training or preference data."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo import config
from spo.config import Params
from spo.runtime.files import write_json
from spo.runtime.messages import first_line
from spo.stages.common import stage

OUTPUT = Path("outputs/prompts")
PARTS = ("train", "test", "validation")


def run(params: Params, item: str | None = None) -> None:
    with stage("prompts", params) as tracked:
        summary = prepare(params.prompts, params.seed, _token_counter(params), OUTPUT)
        tracked.log_metrics({name: float(summary[name]) for name in PARTS}, step=0)


def prepare(section: config.Prompts, seed: int, length: Callable[[str], int], output: Path) -> dict[str, Any]:
    """train.txt, test.txt, validation.txt, set_aside.csv and summary.json in `output`; the summary.

    Raises:
        ValueError: a list that cannot be read, or is too short for what is wanted of it.
    """
    from spo.data import prompts, sources

    evaluation, train = _captions(section.evaluation), _captions(section.train)
    if section.vocabulary is not None:
        prompts.check_vocabulary(map(prompts.clean, evaluation + train), section.vocabulary)
    blocked = prompts.BlockList.load(section.block_list) if section.block_list else None
    candidates = {prompts.key(p) for p in evaluation}  # of the pairs' captions only these are kept
    paired = {k for c in sources.read_captions(section.pairs) if (k := prompts.key(c)) in candidates}
    held_out = prompts.select(evaluation, length, section.max_tokens, paired, blocked)
    keys = {prompts.key(p) for p in held_out.prompts}
    kept = prompts.select(train, length, section.max_tokens, keys, blocked)
    ordered = prompts.by_hash(held_out.prompts, seed)
    parts = {
        "train": _take(prompts.by_hash(kept.prompts, seed), section.n_train, "n_train"),
        "test": _take(ordered, section.n_test, "n_test"),
        "validation": _take(ordered[section.n_test :], section.n_validation, "n_validation"),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (output / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    used = {"train": len(parts["train"]), "evaluation": len(parts["test"]) + len(parts["validation"])}
    lists = {"train": (train, kept), "evaluation": (evaluation, held_out)}
    summary: dict[str, Any] = {name: len(lines) for name, lines in parts.items()}
    summary["read"] = {name: len(raw) for name, (raw, _) in lists.items()}
    summary["left_out"] = {name: dict(told.rejected) for name, (_, told) in lists.items()}
    summary["not_needed"] = {name: len(told.prompts) - used[name] for name, (_, told) in lists.items()}
    _write_set_aside(output / "set_aside.csv", {name: told for name, (_, told) in lists.items()})
    write_json(output / "summary.json", summary)
    return summary


def _captions(source: str) -> list[str]:
    """Of a list of prompts, or of the shards of a preference data set in a folder or behind a URL."""
    from spo.data import prompt_files, remote, sources

    if remote.is_remote(source) or Path(source).is_dir():
        return list(sources.read_captions(source))
    return prompt_files.read_prompts(source)


def _take(prompts: list[str], n: int, name: str) -> list[str]:
    if len(prompts) < n:
        raise ValueError(f"params.yaml: prompts.{name} is {n}, but only {len(prompts)} are left for it")
    return prompts[:n]


def _write_set_aside(path: Path, lists: dict[str, Any]) -> None:
    """List, number (from 0) and reason of each prompt that was left out."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["list", "number", "reason"])
        writer.writerows((name, n, why) for name, told in lists.items() for n, why in told.reasons)


def _token_counter(params: Params) -> Callable[[str], int]:
    """Length in the base model's own tokens, with start and end."""
    from transformers import AutoTokenizer

    name = params.backbone.described_by
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder="tokenizer", revision=params.backbone.revision
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone.checkpoint: no tokenizer in {name} ({first_line(error, 200)})") from None
    return lambda prompt: len(tokenizer(prompt).input_ids)
