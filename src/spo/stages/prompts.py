"""Stage `prompts`: clean, deduplicate and split; no evaluation prompt is in training or preference data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spo.config import Params
from spo.stages.common import require, stage, write_json

OUTPUT = Path("outputs/prompts")


def run(params: Params, item: str | None = None) -> None:
    from spo.data import prompts

    section = params.prompts
    with stage("prompts", params) as tracked:
        length = _token_counter(params)
        evaluation = prompts.read_prompts(section.evaluation)
        train = prompts.read_prompts(section.train)
        if section.vocabulary is not None:
            prompts.check_vocabulary(map(prompts.clean, evaluation + train), section.vocabulary)
        paired = {prompts.key(c) for c in _pair_captions(require(section.pairs, "preference pairs"))}
        held_out = prompts.select(evaluation, length, section.max_tokens, paired)
        keys = {prompts.key(p) for p in held_out.prompts}
        kept = prompts.select(train, length, section.max_tokens, keys)
        ordered = prompts.by_hash(held_out.prompts, params.seed)
        parts = {
            "train": _take(prompts.by_hash(kept.prompts, params.seed), section.n_train, "n_train"),
            "test": _take(ordered, section.n_test, "n_test"),
            "validation": _take(ordered[section.n_test :], section.n_validation, "n_validation"),
        }
        OUTPUT.mkdir(parents=True, exist_ok=True)
        for name, lines in parts.items():
            (OUTPUT / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        summary: dict[str, Any] = {name: len(lines) for name, lines in parts.items()}
        summary["read"] = {"train": len(train), "evaluation": len(evaluation)}
        summary["left_out"] = {"train": dict(kept.left_out), "evaluation": dict(held_out.left_out)}
        write_json(OUTPUT / "summary.json", summary)
        tracked.log_metrics({name: float(len(lines)) for name, lines in parts.items()}, step=0)


def _take(prompts: list[str], n: int, name: str) -> list[str]:
    if len(prompts) < n:
        raise ValueError(f"params.yaml: prompts.{name} is {n}, but only {len(prompts)} are left for it")
    return prompts[:n]


def _pair_captions(source: Path) -> Iterator[str]:
    from spo.data.prompts import parquet_captions

    for path in sorted(source.rglob("*.parquet")) if source.is_dir() else [source]:
        yield from parquet_captions(path)


def _token_counter(params: Params) -> Callable[[str], int]:
    """Length in the base model's own tokens, with start and end."""
    from transformers import AutoTokenizer

    name = params.backbone.checkpoint
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, subfolder="tokenizer", revision=params.backbone.revision
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"backbone.checkpoint: no tokenizer in {name} ({reason})") from None
    return lambda prompt: len(tokenizer(prompt).input_ids)
