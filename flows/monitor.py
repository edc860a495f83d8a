"""Does the champion still do well on new prompts? A Prefect flow for a schedule.

    python flows/monitor.py data/new_prompts.txt --at-least pickscore=0.1          run now
    python flows/monitor.py new.txt --serve --cron "0 6 * * 1"   every Monday; needs a server

Generates images by the champion of MLflow's registry and by the base model, from the same seeds, and scores
both. Where the champion's mean gain over the base is below its bound, the flow emits the event
`spo.champion.dropped` and fails. The event starts the deployment `retrain` of prefect.yaml, unless these
prompts cannot be trained on: too few, or those of the evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # a busy machine

import serving
from prefect import flow  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.events import emit_event  # noqa: E402

from spo import config

ROOT = Path(__file__).resolve().parents[1]
EVENT = "spo.champion.dropped"
CRON = "0 6 * * 1"  # Mondays at 6


class QualityDropped(RuntimeError):
    """The champion is worse than its bounds allow."""


@flow(name="spo-monitor")
def monitor(prompts: str, at_least: dict[str, float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Compare the champion with the base model on new prompts: rows as in reports/comparisons.json.

    Args:
        prompts: a file: .txt (one a line), .json, .jsonl, .csv, .tsv or .parquet.
        at_least: {score: the smallest mean gain over the base}; none: 0 for those of the registry's gate.
        seed: of the first image; the next ones have the next seeds.

    Raises:
        ValueError: no such file, model or score; no image was generated then.
        QualityDropped: after the event.
    """
    with contextlib.chdir(ROOT):
        params = config.load()
        lines = new_prompts(Path(prompts), params.registry.min_prompts)
        bounds = at_least or dict.fromkeys(params.registry.improves, 0.0)
        rows, version = measure(params, lines, seed)
        reasons = dropped(rows, bounds)
        create_table_artifact(
            [*rows], key="spo-monitor", description=f"champion: {version}, n = {len(lines)}"
        )
        if reasons:
            obstacle = untrainable(params, prompts)
            announce(params.registry.name or params.name, version, reasons, prompts, retrain=obstacle is None)
            raise QualityDropped("; ".join(reasons + ([f"no new training: {obstacle}"] if obstacle else [])))
    return rows


def announce(model: str, version: str, reasons: Sequence[str], prompts: str, retrain: bool = True) -> None:
    """Emit the event; with `retrain`, that deployment trains on the prompts that the payload names."""
    resource = {"prefect.resource.id": f"spo.model.{model}", "spo.retrain": "yes" if retrain else "no"}
    emit_event(
        EVENT, resource=resource, payload={"version": version, "reasons": [*reasons], "prompts": prompts}
    )


def untrainable(params: config.Params, prompts: str) -> str | None:
    """The reason why the stage `prompts` would refuse this file as `prompts.train`; None if it would not.

    Tokens are not counted.
    """
    from spo.stages.prompts import prepare

    section = params.prompts.model_copy(update={"train": prompts})
    with tempfile.TemporaryDirectory() as folder:
        try:
            suites, trained = params.generate.suites, [params.pairs.source]
            prepare(section, lambda prompt: 0, Path(folder), suites, trained)
        except ValueError as error:
            return str(error)
    return None


def new_prompts(path: Path, fewest: int = 1) -> list[str]:
    """Read the prompts of a file of any kind that params.yaml may name, each once, without empty ones.

    Raises:
        ValueError: no such file, fewer prompts in it than `fewest`, or a prompt that cannot be encoded.
    """
    from spo.data.prompts import clean, flaw, key
    from spo.ingest.prompt_files import read_prompts

    lines = read_prompts(path)
    for row, line in enumerate(lines, start=1):
        if reason := flaw(line):
            raise ValueError(f"{path}: prompt {row} has {reason}; it cannot be encoded")
    prompts: dict[str, str] = {}
    for line in filter(clean, lines):
        prompts.setdefault(key(line), clean(line))
    if not prompts:
        raise ValueError(f"{path}: no prompt in it")
    if len(prompts) < fewest:
        raise ValueError(f"{path}: {len(prompts)} different prompts in it; registry.min_prompts is {fewest}")
    return [*prompts.values()]


def measure(params: config.Params, prompts: list[str], seed: int) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of the comparison, and the champion's folder name, which holds its version."""
    from pandas import DataFrame

    from spo import adapters
    from spo.commands import registry
    from spo.evaluation import statistics
    from spo.ingest.selection import check_vocabulary
    from spo.training import budget, distributed
    from spo.validation import generation
    from spo.validation.scoring import score_images

    if params.prompts.vocabulary is not None:
        check_vocabulary(prompts, Path(params.prompts.vocabulary))
    adapter, method = registry.fetch(params, registry.CHAMPION)
    seeds = [seed + i for i in range(len(prompts))]
    tables = {}
    for name, variant in (("base", params.generate.base), ("champion", getattr(params.generate, method))):
        backbone = adapters.load(
            params.backbone,
            adapter if name == "champion" else None,
            distributed.device(),
            budget.of(params, "generate"),
        )
        images = list(generation.draw(backbone, params, variant, prompts, seeds))
        scores = score_images(params, images, prompts, distributed.device())
        tables[name] = DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **scores})
    rows = statistics.comparisons(tables, ("base",), params.report.bootstrap_samples, params.seed)
    return rows, adapter.parents[1].name


def dropped(rows: Sequence[Mapping[str, Any]], bounds: Mapping[str, float]) -> list[str]:
    """List the scores below their bounds, one sentence each.

    Raises:
        ValueError: a bound for a score that there is not.
    """
    gains = {row["metric"]: row["mean_difference"] for row in rows}
    unknown = [metric for metric in bounds if metric not in gains]
    if unknown:
        raise ValueError(f"unknown score {unknown[0]!r}; known: {', '.join(gains)}")
    return [
        f"{metric}: the champion's gain over the base is {gains[metric]:+.4f}, below {bound:g}"
        for metric, bound in bounds.items()
        if not gains[metric] >= bound
    ]


def bound(text: str) -> tuple[str, float]:
    key, equals, value = text.partition("=")
    try:
        if key and equals:
            return key, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not SCORE=NUMBER")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or serve the flow; returns the exit status: 1 if the quality dropped."""
    parser = argparse.ArgumentParser(description="The champion on new prompts, as a Prefect flow.")
    parser.add_argument("prompts", help="a file, e.g. .txt with one a line; relative to the repository")
    parser.add_argument("--at-least", action="append", type=bound, default=[], metavar="SCORE=GAIN")
    parser.add_argument("--seed", type=int, default=0)
    serving.add_options(parser, CRON)
    options = parser.parse_args(arguments)
    serving.check(parser, options, CRON)
    os.chdir(ROOT)
    parameters = {
        "prompts": options.prompts,
        "at_least": dict(options.at_least) or None,
        "seed": options.seed,
    }
    try:
        new_prompts(Path(options.prompts), config.load().registry.min_prompts)
        if options.serve:
            serving.serve(monitor, "spo-monitor", options.cron, parameters)
        else:
            monitor(**parameters)
    except QualityDropped as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
