"""The Python API: score by a preference model, train on own prompts, compare two folders of images.

Without DVC and MLflow; the names are those of the package `spo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import config
from spo.config import Params, yaml_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

# what `train` depends on, for the name of its resume state
CODE = (
    *("backbones", "data/images.py", "data/tokens.py", "diffusion", "methods", "preference", "training"),
    "types.py",
)
BATCH = 32  # images scored at a time


def load_params(source: str | Path = "params.yaml", changes: Mapping[str, Any] | None = None) -> Params:
    """Read the parameters of an experiment.

    Args:
        source: a params.yaml, or the name of a preset, such as scenes, sd15 or sdxl.
        changes: values by dotted key, such as {"align.spo.iterations": 100}.

    Raises:
        ConfigError: a mistake in the file or in `changes`, as one line.
    """
    if str(source) in config.preset_names():
        params = config.validate(yaml_text.parse(config.preset(str(source)), str(source)), source=str(source))
    else:
        params = config.load(source)
    raw = params.model_dump(mode="json")
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        section = raw
        for name in sections:
            if not isinstance(section.get(name), dict):
                raise config.ConfigError(f"{source}: {key}: unknown section {name!r}")
            section = section[name]
        section[last] = value
    return config.validate(raw, source=str(source)) if changes else params


class PreferenceModel:
    """A trained step-aware preference model (SPM), which scores images at a timestep."""

    def __init__(self, source: str | Path = "outputs/preference", clip: str | None = None) -> None:
        """Load the output of the stage `preference`, or a released `*_step-aware_preference_model.bin`.

        Args:
            clip: for a released file: the folder or hub id of its CLIP, for config and tokenizer.

        Raises:
            ValueError: no model there, or one that does not fit `clip`.
        """
        from spo.preference.model import (
            ClipRewardModel,
            StepAwarePreferenceModel,
            load_reward_model,
            load_tokenizer,
        )
        from spo.training.distributed import device

        if Path(source).is_dir() or clip is None:
            self._model = load_reward_model(source, device())
            return
        from transformers import CLIPConfig

        try:
            settings = CLIPConfig.from_pretrained(clip)
        except (OSError, ValueError):
            raise ValueError(f"{clip}: no config of a CLIP can be loaded from there") from None
        model = StepAwarePreferenceModel.from_official_checkpoint(source, settings).to(device())
        self._model = ClipRewardModel(model, load_tokenizer(clip))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], timestep: int = 0) -> list[float]:
        """Score each image by its own prompt; higher is preferred.

        Args:
            images: of any size. At timestep t > 0 the model expects the x_0 predicted from x_t, decoded.
            timestep: 0 (finished images) to 999.

        Raises:
            ValueError: another number of prompts than images, one that is empty or cannot be encoded, or no
                timestep of a diffusion model.
        """
        import torch

        from spo.data.images import to_tensor
        from spo.data.prompts import check

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, but {len(prompts)} prompts; give one prompt per image")
        if not 0 <= timestep <= 999:
            raise ValueError(f"timestep {timestep}: must be from 0 to 999")
        check(prompts, "prompts")
        clip, scores = self._model.model, list[float]()
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            pixels = torch.cat([clip.fitted(to_tensor(image)[None]) for image in images[part]])
            text = self._model.encode_text(prompts[part]).tensors["text"]
            timesteps = torch.full((len(pixels),), timestep, device=pixels.device)
            with torch.no_grad():
                scores += clip.score_features(pixels, text, timesteps).tolist()
        return scores


def train(
    params: Params,
    prompts: Sequence[str],
    output: str | Path,
    preference_model: str | Path = "outputs/preference",
) -> Path:
    """Fine-tune params.backbone by SPO (section align.spo) on own prompts; the last weights are the result.

    Shows its progress. Interrupted, it continues from its last checkpoint (.spo/resume) when called again.

    Returns:
        `output`, for diffusers' load_lora_weights; with `lora: null`, for from_pretrained.

    Raises:
        ValueError: no prompts, one that cannot be encoded, an output that exists, or no model to load.
        FloatingPointError: training diverged.
    """
    from spo import backbones
    from spo.data.prompts import check
    from spo.ingest.selection import check_vocabulary
    from spo.methods import spo as method
    from spo.runtime.fingerprint import resume_folder
    from spo.training import budget, distributed, loop, optimizer
    from spo.training.alignment import Alignment, make_trainable, save
    from spo.training.checkpoint import CheckpointStore

    section, output = params.align.section("spo"), Path(output)
    check(prompts, "prompts")
    if params.prompts.vocabulary is not None:
        check_vocabulary(list(prompts), Path(params.prompts.vocabulary))
    if output.exists():
        raise ValueError(f"{output} exists; remove it or give another folder")
    optimizer.check(section.optimizer)
    backbone = backbones.load(params.backbone, distributed.device(), budget.of(params, "spo"))
    built = method.build(params, backbone, Path(preference_model), prompts)
    make_trainable(backbone, section.lora, params.seed)
    made_from = [Path(preference_model), Path(params.backbone.checkpoint)]
    scratch = resume_folder("train", [params.seed, params.backbone, section, *prompts], made_from, CODE)
    checkpoints = CheckpointStore(scratch)
    loop.fit(
        Alignment("align.spo", backbone, built),
        section.optimizer,
        checkpoints=checkpoints,
        checkpoint_every=section.checkpoint_every,
        on_metrics=lambda metrics, iteration: None,
        scale_loss=params.backbone.dtype == "fp16",
        sampler_ema=method.SPEC.sampler_ema(section),
    )
    if distributed.is_main_process():
        save(backbone, section.lora, output)
        checkpoints.clear()
    return output


def judge(
    params: Params, images: str | Path, baseline: str | Path, prompts: str | Path | Sequence[str]
) -> DataFrame:
    """Compare two folders of images of the same prompts by the scorers of params.score.

    Args:
        images, baseline: folders of image files in the order of their names, or folders of `spo generate`.
        prompts: one per image, or a file of them.

    Returns:
        A row per metric: means of both, mean_difference with its 95 % interval (ci_low, ci_high) over the
        prompts (None for fewer than registry.min_prompts), win_rate, and n.

    Raises:
        ValueError: another number of prompts than images, an unreadable image, or no scorer there.
    """
    from pandas import DataFrame

    from spo.commands import external
    from spo.evaluation import statistics

    given = Path(prompts) if isinstance(prompts, str | Path) else list(prompts)
    tables = external.tables(params, {"method": Path(images), "baseline": Path(baseline)}, given)
    rows = statistics.comparisons(
        tables, ["baseline"], params.report.bootstrap_samples, params.seed, params.registry.min_prompts
    )
    return DataFrame(rows).drop(columns=["method", "baseline"]).set_index("metric")
