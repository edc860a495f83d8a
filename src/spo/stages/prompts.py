"""Stage `prompts`: clean, deduplicate and split; no evaluation prompt is in training or preference data."""

import csv
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spo import config
from spo.config import Params
from spo.data.prompts import clean, key
from spo.ingest import prompt_files, remote, sources
from spo.ingest.selection import Selection, block_list, by_hash, check_vocabulary, select
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
        tracked.log_metrics({name: summary[name] for name in PARTS})


def prepare(
    section: config.Prompts,
    length: Callable[[str], int],
    output: Path,
    suites: Mapping[str, str] = MappingProxyType({}),
    trained: Sequence[str | None] = (),
) -> dict[str, Any]:
    """Write train.txt, test.txt, validation.txt, rejected.csv and summary.json; returns the summary.

    A suite becomes suites/NAME.txt, without prompts of training, of validation and of the preference pairs: a
    suite changes no other list.

    Args:
        length: counts the tokens of a prompt, start and end tokens included.
        suites: a list of prompts by name.
        trained: preference data besides `section.pairs`, whose captions are not evaluated either.
    """
    evaluation = _captions(section.evaluation)
    train = _captions(section.train) if section.train else []
    suite_lists = {name: _suite(name, source) for name, source in suites.items()}
    more = [*chain(*suite_lists.values())]
    if section.vocabulary is not None:
        check_vocabulary(map(clean, evaluation + train + more), section.vocabulary)
    blocked = block_list(section.block_list) if section.block_list else None

    def selected(prompts: list[str], elsewhere: set[str]) -> Selection:
        return select(prompts, length, section.max_tokens, elsewhere, blocked)

    # of the captions in preference data only those that could be evaluated are held in memory
    named = {name for name in (section.pairs, *trained) if name is not None}
    captions = chain.from_iterable(map(sources.read_captions, named))
    paired = {*map(key, evaluation + more)}.intersection(map(key, captions))
    held_out = selected(evaluation, paired)
    evaluated = held_out.prompts
    if section.train == section.evaluation:  # one list for both: what is not evaluated is trained on
        evaluated = by_hash(evaluated, section.seed)[: section.n_test + section.n_validation]
    training = selected(train, {*map(key, evaluated)})
    parts = _split(section, training.prompts, held_out.prompts)
    elsewhere = paired | {key(p) for name in ("train", "validation") for p in parts[name]}
    of_suites = {name: selected(lines, elsewhere) for name, lines in suite_lists.items()}
    for name, selection in of_suites.items():
        if not selection.prompts:
            reasons = ", ".join(f"{n} {why}" for why, n in selection.rejected.items()) or "it is empty"
            raise ValueError(f"generate.suites.{name}: no prompt is left ({reasons}); give another list")
    return _write(output, parts, {"train": training, "evaluation": held_out}, of_suites)


def _write(
    output: Path,
    parts: Mapping[str, list[str]],
    selections: Mapping[str, Selection],
    suites: Mapping[str, Selection],
) -> dict[str, Any]:
    """Write all files of the stage; returns the summary."""
    remove(output)
    lists = {**parts, **{f"suites/{name}": selection.prompts for name, selection in suites.items()}}
    for name, lines in lists.items():
        write_text(output / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    used = {"train": len(parts["train"]), "evaluation": len(parts["test"]) + len(parts["validation"])}
    summary: dict[str, Any] = {name: len(lines) for name, lines in parts.items()}
    summary["read"] = {name: selection.read for name, selection in selections.items()}
    summary["rejected"] = {name: dict(selection.rejected) for name, selection in selections.items()}
    summary["unused"] = {name: len(s.prompts) - used[name] for name, s in selections.items()}
    if suites:
        summary["suites"] = {
            name: {"read": s.read, "prompts": len(s.prompts), **s.rejected} for name, s in suites.items()
        }
    with (output / "rejected.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["list", "number", "reason"])  # numbers from 0
        for name, selection in (*selections.items(), *((f"suite {n}", s) for n, s in suites.items())):
            writer.writerows((name, number, reason) for number, reason in selection.reasons)
    write_json(output / "summary.json", summary)
    return summary


def _captions(source: str) -> list[str]:
    """Read a file of prompts, or the captions of a preference data set in a folder or at a URL."""
    if hub.is_hub_url(source) and not source.endswith(".parquet"):
        source = str(hub.local(source))
    if remote.is_remote(source) or Path(source).is_dir():
        return list(sources.read_captions(source))
    return prompt_files.read_prompts(source)


def _suite(name: str, source: str) -> list[str]:
    try:
        return _captions(source)
    except ValueError as error:
        raise ValueError(f"generate.suites.{name}: {error}") from None


def _split(section: config.Prompts, train: list[str], evaluation: list[str]) -> dict[str, list[str]]:
    """The prompts of each part, in the order of their hashes."""
    train, evaluation = by_hash(train, section.seed), by_hash(evaluation, section.seed)
    given = {"train": train, "test": evaluation, "validation": evaluation[section.n_test :]}
    parts = {}
    for name, prompts in given.items():
        n = getattr(section, f"n_{name}")
        if len(prompts) < n:
            raise ValueError(
                f"params.yaml: prompts.n_{name} is {n}, but only {len(prompts)} prompts are left for it"
            )
        parts[name] = prompts[:n]
    return parts


def _token_counter(params: Params) -> Callable[[str], int]:
    """A function that counts tokens by the base model's tokenizer, start and end tokens included."""
    from transformers import AutoTokenizer, CLIPTextConfig

    name = params.backbone.described_by
    try:
        hub.check(name)
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            subfolder="tokenizer",
            revision=params.backbone.revision,
            config=CLIPTextConfig(),  # else it looks for tokenizer/config.json, which no pipeline has
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone.checkpoint: no tokenizer in {name} ({hub.reason(name, error)})") from None
    return lambda prompt: len(tokenizer(prompt).input_ids)
