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


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/prompts."""
    with stage("prompts", params) as tracked:
        summary = prepare(params.prompts, params.seed, _token_counter(params), OUTPUT)
        tracked.log_metrics({name: float(summary[name]) for name in PARTS}, step=0)


def prepare(section: config.Prompts, seed: int, length: Callable[[str], int], output: Path) -> dict[str, Any]:
    """Write train.txt, test.txt, validation.txt, set_aside.csv and summary.json to `output`.

    Args:
        length: counts the tokens of a prompt, start and end tokens included.

    Returns:
        The summary.

    Raises:
        ValueError: a list that cannot be read, or has too few prompts.
    """
    from spo.data import prompts, sources

    evaluation, train = _captions(section.evaluation), _captions(section.train)
    if section.vocabulary is not None:
        prompts.check_vocabulary(map(prompts.clean, evaluation + train), section.vocabulary)
    blocked = prompts.BlockList.load(section.block_list) if section.block_list else None
    candidates = {prompts.key(p) for p in evaluation}  # only these captions of the pairs matter
    paired = {k for c in sources.read_captions(section.pairs) if (k := prompts.key(c)) in candidates}
    held_out = prompts.select(evaluation, length, section.max_tokens, paired, blocked)
    keys = {prompts.key(p) for p in held_out.prompts}
    training = prompts.select(train, length, section.max_tokens, keys, blocked)
    ordered = prompts.by_hash(held_out.prompts, seed)
    parts = {
        "train": _take(prompts.by_hash(training.prompts, seed), section.n_train, "n_train"),
        "test": _take(ordered, section.n_test, "n_test"),
        "validation": _take(ordered[section.n_test :], section.n_validation, "n_validation"),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (output / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    used = {"train": len(parts["train"]), "evaluation": len(parts["test"]) + len(parts["validation"])}
    selections = {"train": training, "evaluation": held_out}
    summary: dict[str, Any] = {name: len(lines) for name, lines in parts.items()}
    summary["read"] = {"train": len(train), "evaluation": len(evaluation)}
    summary["left_out"] = {name: dict(selection.rejected) for name, selection in selections.items()}
    summary["not_needed"] = {name: len(s.prompts) - used[name] for name, s in selections.items()}
    _write_rejected(output / "set_aside.csv", selections)
    write_json(output / "summary.json", summary)
    return summary


def _captions(source: str) -> list[str]:
    """Read a file of prompts, or the captions of a preference data set in a folder or at a URL."""
    from spo.data import prompt_files, remote, sources

    if remote.is_remote(source) or Path(source).is_dir():
        return list(sources.read_captions(source))
    return prompt_files.read_prompts(source)


def _take(prompts: list[str], n: int, name: str) -> list[str]:
    if len(prompts) < n:
        raise ValueError(
            f"params.yaml: prompts.{name} is {n}, but only {len(prompts)} prompts are left for it"
        )
    return prompts[:n]


def _write_rejected(path: Path, selections: dict[str, Any]) -> None:
    """Write list, number (from 0) and reason of each rejected prompt."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["list", "number", "reason"])
        writer.writerows((name, n, why) for name, s in selections.items() for n, why in s.reasons)


def _token_counter(params: Params) -> Callable[[str], int]:
    """A function that counts tokens by the base model's tokenizer, start and end tokens included."""
    from transformers import AutoTokenizer

    name = params.backbone.described_by
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder="tokenizer", revision=params.backbone.revision
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone.checkpoint: no tokenizer in {name} ({first_line(error, 200)})") from None
    return lambda prompt: len(tokenizer(prompt).input_ids)
