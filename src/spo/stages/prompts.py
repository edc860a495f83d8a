"""Stage `prompts`: clean, deduplicate and split; no evaluation prompt is in training or preference data."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spo import config
from spo.config import Params
from spo.runtime import hub
from spo.runtime.files import remove, write_json, write_text
from spo.stages.common import stage

OUTPUT = Path("outputs/prompts")
PARTS = ("train", "test", "validation")


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/prompts."""
    with stage("prompts", params) as tracked:
        counter, suites = _token_counter(params), params.generate.suites
        summary = prepare(params.prompts, counter, OUTPUT, suites, [params.pairs.source])
        tracked.log_metrics({name: float(summary[name]) for name in PARTS})


def prepare(
    section: config.Prompts,
    length: Callable[[str], int],
    output: Path,
    suites: Mapping[str, str] = MappingProxyType({}),
    trained: Sequence[str] = (),
) -> dict[str, Any]:
    """Write train.txt, test.txt, validation.txt, set_aside.csv and summary.json to `output`.

    A suite becomes suites/NAME.txt, without prompts of training, of validation and of the preference pairs: a
    suite changes no other list.

    Args:
        length: counts the tokens of a prompt, start and end tokens included.
        suites: a list of prompts by name.
        trained: preference data besides `section.pairs`, whose captions are not evaluated either.

    Returns:
        The summary.

    Raises:
        ValueError: a list that cannot be read, or has too few prompts; a suite of which no prompt is left.
    """
    from spo.data import prompts, sources

    evaluation, train = _captions(section.evaluation), _captions(section.train)
    suite_lists = {name: _suite(name, source) for name, source in suites.items()}
    more = list(chain(*suite_lists.values()))
    if section.vocabulary is not None:
        prompts.check_vocabulary(map(prompts.clean, evaluation + train + more), section.vocabulary)
    blocked = prompts.BlockList.load(section.block_list) if section.block_list else None
    candidates = {prompts.key(p) for p in evaluation + more}  # only these captions of the pairs matter
    captions = chain.from_iterable(map(sources.read_captions, {section.pairs, *trained}))
    paired = {k for c in captions if (k := prompts.key(c)) in candidates}
    held_out = prompts.select(evaluation, length, section.max_tokens, paired, blocked)
    keys = {prompts.key(p) for p in held_out.prompts}
    training = prompts.select(train, length, section.max_tokens, keys, blocked)
    ordered = prompts.by_hash(held_out.prompts, section.seed)
    parts = {
        "train": _take(prompts.by_hash(training.prompts, section.seed), section.n_train, "n_train"),
        "test": _take(ordered, section.n_test, "n_test"),
        "validation": _take(ordered[section.n_test :], section.n_validation, "n_validation"),
    }
    used_elsewhere = paired | {prompts.key(p) for name in ("train", "validation") for p in parts[name]}
    kept = {
        name: prompts.select(lines, length, section.max_tokens, used_elsewhere, blocked)
        for name, lines in suite_lists.items()
    }
    _check_suites(kept)
    remove(output)
    lists = parts | {f"suites/{name}": selection.prompts for name, selection in kept.items()}
    for name, lines in lists.items():
        write_text(output / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    used = {"train": len(parts["train"]), "evaluation": len(parts["test"]) + len(parts["validation"])}
    selections = {"train": training, "evaluation": held_out}
    summary: dict[str, Any] = {name: len(lines) for name, lines in parts.items()}
    summary["read"] = {"train": len(train), "evaluation": len(evaluation)}
    summary["left_out"] = {name: dict(selection.rejected) for name, selection in selections.items()}
    summary["not_needed"] = {name: len(s.prompts) - used[name] for name, s in selections.items()}
    if suites:
        summary["suites"] = {
            name: {"read": len(suite_lists[name]), "prompts": len(s.prompts), **s.rejected}
            for name, s in kept.items()
        }
        selections |= {f"suite {name}": s for name, s in kept.items()}
    _write_rejected(output / "set_aside.csv", selections)
    write_json(output / "summary.json", summary)
    return summary


def _suite(name: str, source: str) -> list[str]:
    try:
        return _captions(source)
    except ValueError as error:
        raise ValueError(f"generate.suites.{name}: {error}") from None


def _check_suites(suites: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a suite of which no prompt is left.
    """
    for name, selection in suites.items():
        if not selection.prompts:
            reasons = ", ".join(f"{n} {why}" for why, n in selection.rejected.items()) or "it is empty"
            raise ValueError(f"generate.suites.{name}: no prompt is left ({reasons}); give another list")


def _captions(source: str) -> list[str]:
    """Read a file of prompts, or the captions of a preference data set in a folder or at a URL."""
    from spo.data import prompt_files, remote, sources

    if hub.is_hub_url(source) and not source.endswith(".parquet"):
        source = str(hub.local(source))
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
        hub.check(name)
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder="tokenizer", revision=params.backbone.revision
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone.checkpoint: no tokenizer in {name} ({hub.reason(name, error)})") from None
    return lambda prompt: len(tokenizer(prompt).input_ids)
