"""The models of an experiment on the meta device: built from their config files, without weights."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from spo import config
from spo.backbones.description import config_file, describe
from spo.backbones.loading import DTYPES, empty_models
from spo.backbones.stable_diffusion import StableDiffusion
from spo.backbones.text import text_of
from spo.estimate.meta import DEVICE
from spo.preference.model import StepAwarePreferenceModel
from spo.types import Budget

Place = torch.device | str


class Words:
    """Replaces any tokenizer: token ids of the right shape."""

    model_max_length = 77

    def __call__(self, prompts: Sequence[str], *, max_length: int, **options: Any) -> BatchEncoding:
        ids = torch.ones(len(prompts), max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": ids})


def backbone(settings: config.Backbone, budget: Budget, device: Place = DEVICE) -> StableDiffusion:
    """The base of params.yaml; elsewhere than on the meta device with random weights."""
    found = describe(settings)
    dtype, sdxl = DTYPES[settings.dtype], settings.family == "sdxl"
    unet, vae = (_built(empty, device) for empty in empty_models(found))
    upcast = sdxl and dtype == torch.float16 and (settings.vae is None or vae.config.force_upcast)
    models = {"unet": unet.to(dtype), "vae": vae.to(torch.float32 if upcast else dtype)}
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if sdxl:
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    for part, kind in kinds.items():
        models[part] = _text_encoder(settings, part, kind, device).to(dtype)
    pipeline: Any = SimpleNamespace(
        **models,
        components=models,
        tokenizer=Words(),
        tokenizer_2=Words(),
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
    )
    return StableDiffusion(
        pipeline, text_of(pipeline, sdxl), settings.channels_last, found.scheduler_config, budget
    )


def _built(empty: Any, device: Place) -> Any:
    if torch.device(device) == DEVICE:
        return empty
    with torch.device(device):
        return type(empty).from_config(empty.config)


def _text_encoder(settings: config.Backbone, part: str, kind: Any, device: Place) -> Any:
    name = settings.described_by
    found = config_file(name, settings.revision, f"{part}/config.json", f"backbone: {name}")
    with torch.device(device):
        return kind(CLIPTextConfig.from_dict(found))


def preference_model(settings: config.Preference, device: Place = DEVICE) -> StepAwarePreferenceModel:
    """The step-aware preference model of params.yaml, in fp32."""
    how: dict[str, Any] = {"revision": settings.revision}
    with torch.device(device):
        clip = CLIPModel(CLIPConfig.from_pretrained(settings.init, **how)).eval()
        return StepAwarePreferenceModel(clip, settings.step_condition).to(device)
