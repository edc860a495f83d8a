"""The models of an experiment on the meta device: built from their config files, without weights."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, CLIPConfig, CLIPModel

from spo import config
from spo.backbones.description import describe
from spo.backbones.loading import DTYPES, empty_models, vae_dtype
from spo.backbones.stable_diffusion import StableDiffusion
from spo.estimate.meta import DEVICE, Counter
from spo.preference.model import StepAwarePreferenceModel
from spo.types import Budget, Conditioning

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
    models = {part: model.to(DTYPES[settings.dtype]) for part, model in empty_models(found, device).items()}
    models["vae"].to(vae_dtype(found, models["vae"]))
    pipeline: Any = SimpleNamespace(
        **models,
        **{name: Words() for name in found.family.tokenizers.values()},
        components=models,
        vae_scale_factor=2 ** (len(models["vae"].config.block_out_channels) - 1),
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
    )
    return StableDiffusion(
        pipeline,
        found.text(pipeline),
        settings.channels_last,
        found.scheduler_config,
        budget,
        true_guidance=settings.true_guidance,
        image_size=settings.image_size,
    )


def preference_model(settings: config.Preference, device: Place = DEVICE) -> StepAwarePreferenceModel:
    """The step-aware preference model of params.yaml, in fp32."""
    how: dict[str, Any] = {"revision": settings.revision}
    with torch.device(device):
        clip = CLIPModel(CLIPConfig.from_pretrained(settings.init, **how)).eval()
        return StepAwarePreferenceModel(clip, settings.step_condition).to(device)


def once_per_shape(base: StableDiffusion, counter: Counter) -> Callable[..., Tensor]:
    """`base._run`, where of calls without gradient the first of each shape runs, and others add its bytes and
    FLOPs: a transformer takes seconds on the meta device."""
    run, known = base._run, dict[Any, tuple[int, int]]()

    def call(unet: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int) -> Tensor:
        if torch.is_grad_enabled():
            return run(unet, x_t, timesteps, conditioning, copies)
        adapters = [getattr(module, "disable_adapters", None) for module in unet.modules()]
        key = (id(unet), tuple(adapters), x_t.shape, copies)
        if key in known:
            peak, flops = known[key]
            output = torch.empty_like(x_t, dtype=torch.float32)
        else:
            live, before, done = counter.live, counter.peak, counter.flops
            counter.restart()
            output = run(unet, x_t, timesteps, conditioning, copies)
            peak, flops = counter.peak - live, counter.flops
            known[key], counter.peak, counter.flops = (peak, flops), before, done
        counter.peak = max(counter.peak, counter.live - output.untyped_storage().nbytes() + peak)
        counter.flops += flops
        return output

    return call
