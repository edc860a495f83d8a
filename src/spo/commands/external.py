"""Generate images by an external model, and score external images, without training.

These are no stages of the DAG: `spo generate --lora PATH` generates images, and `spo score --images FOLDER
--prompts FILE` scores them, with the scorers, tables and intervals of the experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params, Variant
from spo.runtime.files import atomic, require, write_json
from spo.runtime.processes import is_main_process

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

OUTPUT = Path("outputs/judged")
_GENERIC = ("unet", "pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")


def generate(
    params: Params,
    adapter: Path,
    prompts_file: Path | None = None,
    guidance: float | None = None,
    output: Path | None = None,
) -> Path:
    """Generate images by params.backbone with a LoRA, a UNet or a complete pipeline; returns their folder.

    Args:
        prompts_file: a list of prompts; None: the experiment's prompts, with its seeds.
        guidance: None: that of generate.base.
    """
    from spo import adapters
    from spo.adapters.files import SUPPORTED
    from spo.ingest.prompt_files import read_prompts
    from spo.training import budget
    from spo.training.distributed import device
    from spo.validation.generation import draw, each_image, save

    if not adapter.exists():
        raise ValueError(f"{adapter}: no such file or folder; give {SUPPORTED}")
    split = params.generate.split
    file = prompts_file or require(f"outputs/prompts/{split}.txt", f"{split} prompts")
    prompts, seeds = each_image(_cleaned(read_prompts(file), str(file)), params.generate)
    backbone = adapters.load(params.backbone, adapter, device(), budget.of(params, "generate"))
    variant = Variant(guidance=params.generate.base.guidance if guidance is None else guidance)
    folder = output or OUTPUT / _name(adapter)
    save(folder, draw(backbone, params, variant, prompts, seeds), prompts, seeds)
    return folder


def _name(adapter: Path) -> str:
    """The name of the file or folder; that of its parent for generic names, which many releases share."""
    path = adapter.resolve()
    name = path.stem if path.is_file() else path.name
    return path.parent.name if name.split(".")[0] in _GENERIC else name


def score(
    params: Params,
    folder: Path,
    prompts_file: Path | None = None,
    baseline: Path | None = None,
    output: Path | None = None,
) -> str:
    """Score the images of `folder`, and compare them with those of `baseline` for the same prompts.

    Writes scores.csv and, with a baseline, comparisons.json as in reports/; returns the tables as text.
    """
    from spo.evaluation import statistics

    folders = {"method": folder, **({"baseline": baseline} if baseline else {})}
    scored = tables(params, folders, prompts_file)
    if not is_main_process():
        return ""
    output = output or OUTPUT / folder.stem
    with atomic(output / "scores.csv") as partial:
        scored["method"].to_csv(partial, index=False, float_format="%.6f", lineterminator="\n")
    lines = [f"{folder}: {len(scored['method'])} images, scores in {output / 'scores.csv'}"]
    lines += _means(params, scored["method"])
    if baseline:
        samples, enough = params.report.bootstrap_samples, params.registry.min_prompts
        rows = statistics.comparisons(scored, ["baseline"], samples, params.seed, enough)
        rows = [{**row, "method": folder.name, "baseline": baseline.name} for row in rows]
        write_json(output / "comparisons.json", rows)
        lines += [f"over {baseline}, paired:", *(_line(row) for row in rows)]
    return "\n".join(lines)


def tables(
    params: Params, folders: Mapping[str, Path], prompts: Path | Sequence[str] | None
) -> dict[str, DataFrame]:
    """Score the images of each folder: a table of scores by the same name.

    Args:
        prompts: one per image, or a file of them; None: those that `spo generate` wrote beside the images.
    """
    import pandas as pd

    from spo.training.distributed import device
    from spo.validation.scoring import score_images

    # all before the first is scored
    read = {name: _read(folder, prompts) for name, folder in folders.items()}
    scored = {}
    for name, (images, own) in read.items():
        rows = range(len(own))
        columns = score_images(params, images, own, device())
        scored[name] = pd.DataFrame({"index": rows, "prompt": own, "seed": rows, **columns})
    return scored


def _means(params: Params, scores: DataFrame) -> list[str]:
    """One line with the mean of each score, with an interval if there are enough prompts."""
    from spo.evaluation import statistics

    by_prompt, enough = statistics.prompt_means(scores), params.registry.min_prompts
    few = len(by_prompt) < enough
    lines = []
    for metric in statistics.metrics(by_prompt):
        values = by_prompt[metric].to_numpy()
        mean, low, high = statistics.mean_interval(values, params.report.bootstrap_samples, params.seed)
        lines.append(f"  {metric:18} {mean:9.4f}" + ("" if few else f" [{low:.4f}, {high:.4f}]"))
    if few:
        lines.append(f"  {len(by_prompt)} prompts are too few for intervals (registry.min_prompts: {enough})")
    return lines


def _line(row: Mapping[str, Any]) -> str:
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    better = f"{100 * row['win_rate']:.0f} % better"
    return f"  {row['metric']:18} {row['mean_difference']:+9.4f}{interval}, {better}"


def _read(folder: Path, given: Path | Sequence[str] | None) -> tuple[Sequence[Image.Image], list[str]]:
    """The images in the order of their names (2 before 10) or of an archive, and their prompts."""
    from spo.data.images import ARCHIVE, LazyImages, archived
    from spo.ingest.folders import find_images, list_images
    from spo.ingest.prompt_files import read_prompts

    images: Sequence[Image.Image]
    source = str(folder / ARCHIVE)
    if (folder / ARCHIVE).exists():
        if others := find_images(folder):
            raise ValueError(
                f"{folder}: contains {ARCHIVE} and {others[0].name}; give a folder with one of the two"
            )
        images, prompts, _ = archived(folder)
        if not images:
            raise ValueError(f"{folder / ARCHIVE}: no images in this archive")
    else:
        images, prompts = LazyImages(list_images(folder), lambda paths: map(_open, paths)), []
    if isinstance(given, Path):
        prompts, source = read_prompts(given), str(given)
    elif given is not None:
        prompts, source = list(given), "the list of prompts"
    elif not prompts:
        raise ValueError(f"{folder}: give --prompts FILE with a prompt for each of the {len(images)} images")
    prompts = _cleaned(prompts, source)
    if len(prompts) != len(images):
        raise ValueError(
            f"{folder}: {len(images)} images, but {source} has {len(prompts)} prompts; "
            "give one prompt per image, in the order of the file names"
        )
    return images, prompts


def _cleaned(prompts: Sequence[str], source: str) -> list[str]:
    """Clean prompts as the stage `prompts` does; one that is empty or cannot be encoded is refused."""
    from spo.data.prompts import check, clean

    if not prompts:
        raise ValueError(f"{source}: is empty; it must have at least one prompt")
    check(prompts, source)
    return [*map(clean, prompts)]


def _open(path: Path) -> Image.Image:
    from spo.data.decoding import open_image

    if path.exists() and not path.is_file():  # a pipe or a device would be read without end
        raise ValueError(f"{path}: not a regular file")
    try:
        return open_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
