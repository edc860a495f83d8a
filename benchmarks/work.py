"""`python -m benchmarks.work`: the floating-point operations of the experiment in this folder, by stage.

torch's FLOP counter runs around each stage, in one process and in a folder that is removed afterwards. Of a
training a few iterations and validations are counted, times the number in the last run (reports/metrics) or,
without one, in params.yaml. The baselines of the preference model are left out, as
in the run of a fresh clone. About 15 minutes on one core for the default experiment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from spo import cli, config
from spo.config import METHODS, VARIANTS
from spo.runtime.files import read_json, write_text

FEW = 2  # iterations of a training that are counted
STAGES = (
    *("inputs", "prompts", "pairs", "preference", "preference latent"),
    *(f"align {name}" for name in METHODS),
    *(f"generate {name}" for name in VARIANTS),
    *(f"score {name}" for name in VARIANTS),
)


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the shapes of the operands, as torch gives them to a formula."""
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 5 * sdpa_flop_count(query, key, value) // 2  # five products to the forward's two


# torch counts the attention of GPUs alone
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(stage: str, params: Any) -> int:
    """The operations of a stage with these params."""
    write_text(Path("params.yaml"), json.dumps(params.model_dump(mode="json")))  # JSON is YAML
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        if cli.main(stage.split()):
            raise SystemExit(f"{stage} failed")
    return int(counter.get_total_flops())


def training(method: str, params: Any, taken: int) -> int:
    """The operations of `taken` iterations of a method and of its validations."""
    section = getattr(params.align, method)

    def few(**changes: Any) -> int:
        cut = section.model_copy(update={"iterations": FEW, **changes})
        align = params.align.model_copy(update={method: cut})
        return counted(f"align {method}", params.model_copy(update={"align": align}))

    iterations = few(validation=None)
    if (validation := section.validation) is None:
        return iterations * taken // FEW
    validations = (
        few(validation=validation.model_copy(update={"every": FEW})) - iterations
    )  # before and after
    return (iterations * taken + validations * (1 + -(-taken // validation.every))) // 2


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.work", description=__doc__).parse_args()
    torch.set_num_threads(1)
    params, here, total = config.load("params.yaml"), Path.cwd(), 0
    reports = {m: here / f"reports/metrics/align_{m}.json" for m in METHODS}
    taken = {m: read_json(p, "metrics")["iterations"] for m, p in reports.items() if p.exists()}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(here / "data", "data")
        for stage in STAGES:
            name, _, item = stage.partition(" ")
            if name == "align":
                found = training(item, params, taken.get(item, getattr(params.align, item).iterations))
            else:
                found = counted(stage, params)
            total += found
            print(f"{stage}: {found / 1e12:.2f} TFLOP", flush=True)
    print(f"all: {total / 1e12:.1f} TFLOP")


if __name__ == "__main__":
    main()
