"""Count what each preset of released bases downloads, its disk space, and its hours on two cards.

`python -m benchmarks.presets` writes the line at the head of each preset, and the tables of README.md and
docs/released.md, in seconds. Work is that of tests/estimate/peaks.csv (benchmarks/cards.py), in proportion
to a preset's prompts, iterations and images. Scoring is not counted.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import cards
from spo import config
from spo.diffusion.announced import schedule_of
from spo.methods import method_spec
from spo.runtime import hub

NAMES = tuple(n for n in config.preset_names() if n.startswith(("sd15", "sdxl", "sd35", "flux")))
EVERYTHING = {"sd": "sd15-scratch", "sdxl": "sdxl-scratch", "sd3": "sd35", "flux": "flux"}  # by family
QUICK = Path("src/spo/config/presets/_quick.yaml")
WAYS = {
    "try": " --quick",
    "judge released weights": "-eval",
    "SPO, overnight": "-overnight",
    "SPO as published": "",
    "all from scratch": "-scratch",
}
SCHEDULE = partial(schedule_of, {"beta_schedule": "scaled_linear", "steps_offset": 1})
UNET = {"sd": 3.44, "sdxl": 10.27}  # GB in fp32
# GB of a pair's, in 16 bits
LATENTS = {"sd": 38 / 583_747, "sdxl": 153 / 583_747, "sd3": 153 / 583_747, "flux": 153 / 583_747}
ENCODED = {"sd": 2.2e12, "sdxl": 9.8e12, "sd3": 2.2e12, "flux": 2.2e12}  # FLOPs of encoding a pair
PICTURE = {"sd": 0.45e-3, "sdxl": 1.6e-3, "sd3": 0.45e-3, "flux": 0.45e-3}  # GB of an image, as PNG
BLOCKS = {"sd3": 3.5, "flux": 19.8}  # GB of a transformer's blocks in a latent reward model
LARGE = ("flux",)  # presets that do not fit a card of 24 GB
PAIRS, SHARDS, PAIRS_GB = 583_747, 387, 190.0  # of Pick-a-Pic v1
CLIP_H = 3.94  # GB of a CLIP ViT-H/14 in fp32
# GB of what is read of a repository: parameters in the precision of the files, or what its page says
FILES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 3.44 + 0.33 + 0.49,  # UNet, VAE, text encoder
    "stabilityai/stable-diffusion-xl-base-1.0": 10.27 + 0.33 + 0.49 + 2.78,
    "stabilityai/stable-diffusion-3.5-medium": 5.0 + 0.17 + 0.25 + 1.39 + 9.52,  # in bf16, with T5
    "black-forest-labs/FLUX.1-dev": 23.8 + 0.17 + 0.25 + 9.52,
    "madebyollin/sdxl-vae-fp16-fix": 0.33,
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "SPO-Diffusion-Models/Step-Aware_Preference_Models": CLIP_H,
    "xswu/HPSv2": CLIP_H / 2,
    "openai/clip-vit-large-patch14": 1.71,
    "openai/clip-vit-base-patch32": 0.61,
    "zai-org/ImageReward": 1.79,
    "mhdang/dpo-sd1.5-text2image-v1": UNET["sd"],
    "mhdang/dpo-sdxl-text2image-v1": UNET["sdxl"],
    "casiatao/LPO": 0.0,  # by family, in fp32: see `downloads`
    "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA": 0.37,
}
SMALL = 0.005  # tokenizers, heads, small adapters, test prompts
PROMPTS = 0.168  # the captions of Pick-a-Pic's training split


class Counted(NamedTuple):
    """GB (1e9 bytes), and hours by card."""

    downloads: float
    disk: float
    hours: dict[int, float]

    @property
    def line(self) -> str:
        small, large = self.hours[24], _hours(self.hours[80])
        on = "too large for" if small == float("inf") else f"{_hours(small)} on"
        return (
            f"downloads {self.downloads:.0f} GB, takes {self.disk:.0f} GB of disk; {on} an RTX 4090 (24 GB), "
            f"{large} on an A100 (80 GB): counted, not timed"
        )


def _hours(hours: float) -> str:
    if hours == float("inf"):
        return "too large"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.{0 if hours >= 20 else 1}f} h"


def count(name: str, quick: bool = False) -> Counted:
    params = config.validate(config.yaml_text.parse(config.preset(name, quick=quick), name))
    fetched = sum(downloads(params).values())
    return Counted(fetched, fetched + sum(written(params)), {card: hours(params, card) for card in (24, 80)})


def downloads(params: config.Params) -> dict[str, float]:
    """GB by repository or data set, of all that the stages fetch."""
    family, found = params.backbone.family, dict[str, float]()
    for name in _names(params):
        at = hub.place(name)
        if at.repository == "yuvalkirstain/pickapic_v1":
            found[name] = PAIRS_GB * pairs(params) / PAIRS
        elif at.kind == "dataset":
            found[name] = PROMPTS if "train" in at.pattern else SMALL
        elif at.repository == "casiatao/LPO":
            found[name] = UNET[family]
        else:
            found[at.repository] = max(found.get(at.repository, 0), FILES.get(at.repository, SMALL))
    return found


def _names(params: config.Params) -> Iterator[str]:
    """The hub ids and URLs of what is used."""
    models = [getattr(params, model) for model in config.PREFERENCE_MODELS if params.wants(model)]
    used = [
        params.backbone,
        params.prompts,
        params.pairs,
        params.align,
        params.generate,
        params.score,
        *models,
    ]
    for section in used:
        for value in re.findall(r'"([^"]+/[^"]+)"', section.model_dump_json()):
            if hub.is_hub_url(value) or hub.is_hub_id(value):
                yield value


def pairs(params: config.Params) -> float:
    """Pairs that are read: those of all shards, or of some."""
    source = params.pairs.source
    if source is None:
        return 0
    names = [f"train-{number:05}-of-{SHARDS:05}.parquet" for number in range(SHARDS)]
    return PAIRS * len(fnmatch.filter(names, Path(source).name)) / SHARDS


def written(params: config.Params) -> Iterator[float]:
    """GB of the stages' outputs, once: DVC's cache links to them (docs/scale.md)."""
    family, generate = params.backbone.family, params.generate
    yield PICTURE[family] * params.prompts.n_test * generate.images_per_prompt * len(generate.variants())
    yield pairs(params) * (PAIRS_GB / PAIRS + LATENTS[family])
    yield CLIP_H * params.wants("preference")
    judge = BLOCKS.get(family) or FILES[params.backbone.checkpoint]
    yield judge * params.wants("latent_preference")
    for method in config.METHODS:
        section = getattr(params.align, method)
        whole = section is not None and section.pretrained and "LoRA" not in section.pretrained
        yield FILES[params.backbone.checkpoint] / 2 * bool(whole)  # a pipeline in fp16


def hours(params: config.Params, card: int) -> float:
    if card == 24 and params.name in LARGE:
        return float("inf")
    _, rate = cards.CARDS[card]
    return sum(flops(params, card)) / (cards.USED * rate) / 3600


def flops(params: config.Params, card: int) -> Iterator[float]:
    """FLOPs of the stages, all pairs of rollouts valid."""
    family = params.backbone.family
    of_stage = _counted(EVERYTHING[family].removesuffix("-scratch"), card)
    published = config.validate(config.yaml_text.parse(config.preset(EVERYTHING[family]), ""))
    generate = params.generate
    steps = generate.num_inference_steps / published.generate.num_inference_steps
    image = of_stage["generate"] / 500 * steps
    yield image * params.prompts.n_test * generate.images_per_prompt * len(generate.variants())
    for method, section in params.align.trained().items():
        own, full = (method_spec(method).cost(p, SCHEDULE).unet_samples for p in (params, published))
        yield of_stage[f"align {method}"] * own / full
        if (validation := section.validation) is not None:
            times = 1 + -(-section.iterations // validation.every)
            yield image * validation.prompts * validation.images * times
    yield ENCODED[family] * pairs(params)
    if params.wants("preference") and not params.preference.pretrained:
        yield of_stage["preference"] * (1 + len(config.PREFERENCE_BASELINES))
    if params.wants("latent_preference") and not params.latent_preference.pretrained:
        yield of_stage["preference latent"]


def _counted(preset: str, card: int) -> dict[str, float]:
    """FLOPs by stage of the preset in which everything is trained; on the only card that was counted."""
    card = cards.ON.get(preset, (card,))[0]
    with cards.PEAKS.open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["preset"], r["card"]) == (preset, str(card))]
    return {row["stage"]: 1e15 * float(row["pflop"]) for row in rows}


def table(counted: dict[str, Counted]) -> str:
    """In Markdown, a row for each preset."""
    lines = ["| preset | download | disk | 24 GB card | 80 GB card |", "|---|---|---|---|---|"]
    for name, found in counted.items():
        times = " | ".join(_hours(found.hours[card]) for card in (24, 80))
        lines.append(f"| `{name}` | {found.downloads:.0f} GB | {found.disk:.0f} GB | {times} |")
    return "\n".join(lines) + "\n"


def ways(counted: dict[str, Counted]) -> str:
    """In Markdown, a row for each way in, SD 1.5 beside SDXL."""
    lines = ["| | SD 1.5 | download | time | SDXL | download | time |", "|---|---|---|---|---|---|---|"]
    for title, ending in WAYS.items():
        row = [title]
        for name in (f"{family}{ending}" for family in config.QUICK):
            row += [f"`{name}`", f"{counted[name].downloads:.0f} GB", _hours(counted[name].hours[24])]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


PAGES = {Path("README.md"): ways, Path("docs/released.md"): table}


def everything() -> dict[str, Counted]:
    """By preset and option."""
    found = {name: count(name) for name in NAMES}
    return found | {f"{name} --quick": count(name, quick=True) for name in config.QUICK}


def texts(counted: dict[str, Counted]) -> dict[Path, str]:
    """The files with the counts in their place."""
    found: dict[Path, str] = {}
    for name, own in counted.items():
        preset, _, quick = name.partition(" ")
        path, mark = (QUICK, f"{preset}: ") if quick else (QUICK.with_name(f"{preset}.yaml"), "")
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = re.sub(rf"(?m)^# {mark}downloads .*$", f"# {mark}{own.line}", text, count=1)
    for path, shown in PAGES.items():
        lines = shown(counted)
        head = re.escape(lines.splitlines(keepends=True)[0])
        found[path] = re.sub(rf"{head}(\|.*\n)*", lines, path.read_text(encoding="utf-8"), count=1)
    return found


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.presets", description=__doc__).parse_args()
    for path, text in texts(everything()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
