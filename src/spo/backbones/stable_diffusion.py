"""Checkpoints of diffusers, of any family of `families`, as a `types.Backbone`."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo import config
from spo.backbones import lora, saving
from spo.backbones.family import Family
from spo.backbones.features import DownPath
from spo.runtime.transfer import send
from spo.training import placement
from spo.training.placement import lower
from spo.types import Budget, Conditioning, NoiseSchedule


class StableDiffusion:
    """Denoiser, VAE and text encoders of one checkpoint; trainable is an adapter, the denoiser, or nothing.

    `unet` is the denoiser: a UNet, or the transformer of Stable Diffusion 3 and FLUX.

    The caller provides timesteps and latents: this class draws no random number. The VAE may have another
    dtype than the UNet (SDXL's own overflows in fp16), which encode and decode hide.

    `budget` says how many samples a call takes. With budget.offload text encoders and VAE rest in host memory
    between calls, and the UNet from `rest` to its next call. Text encoders that are too large to stay beside
    the denoiser (`Family.encodes_once`) do so without offload too, and the denoiser until its first call.
    """

    def __init__(
        self,
        pipeline: Any,
        text: Family,
        channels_last: bool,
        scheduler_config: Mapping[str, Any],
        budget: Budget | None = None,
        device: torch.device | str | None = None,
        true_guidance: float | None = None,
    ) -> None:
        """
        Args:
            device: None: where the denoiser is.
            true_guidance: classifier-free guidance beside a guidance scale that is an input.
        """
        self.pipeline = pipeline
        self.budget = budget or Budget()
        self._resting: torch.device | None = None  # the UNet's device while it is in host memory
        self._empty: Conditioning | None = None
        self._texts: dict[str, Conditioning] = {}  # of `remember_prompts`, in host memory
        self._true_guidance = true_guidance
        self._reference: Any = None  # only for full fine-tuning; an adapter is disabled instead
        self.unet, self.vae, self._text = getattr(pipeline, text.denoiser), pipeline.vae, text
        self.scheduler_config = scheduler_config
        self.latent_shape = text.latent_shape(self.unet.config, self.vae.config)
        side = self.latent_shape[-1] * pipeline.vae_scale_factor
        self.image_size = (side, side)
        target = self.unet.device if device is None else torch.device(device)
        announced = self.vae.config
        self._shift = announced.get("shift_factor") or 0.0
        self._statistics = [  # mean and standard deviation of each latent channel [1,C,1,1], where announced
            torch.tensor(announced[key], device=target).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
            if announced.get(key) is not None
        ]
        self._dtype = self.unet.dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        for module in (self.unet, self.vae):
            module.to(memory_format=self._format)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
                placement.move(module, "cpu" if self._rests(module) else target)
        if text.encodes_once:
            self._resting = target
            placement.move(self.unet, "cpu")

    @property
    def device(self) -> torch.device:
        return self._resting or self.unet.device

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        side = self.latent_shape[-1]
        return self._text.schedule(self.scheduler_config, num_inference_steps, self.unet.config, side)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if not self._text.encodes_once:
            with self._present(*self._text.encoders):
                return self._text(prompts)
        texts = self._texts | self._one_by_one(p for p in prompts if p not in self._texts)
        rows = Conditioning.cat([texts[prompt] for prompt in prompts])
        return Conditioning({name: send(value, self.device) for name, value in rows.tensors.items()})

    def remember_prompts(self, prompts: Sequence[str]) -> None:
        if self._text.encodes_once:
            self._texts |= self._one_by_one(p for p in ("", *prompts) if p not in self._texts)

    @torch.no_grad()
    def _one_by_one(self, prompts: Iterable[str]) -> dict[str, Conditioning]:
        """The text of each prompt in host memory. Its numbers do not depend on the prompts beside it."""
        texts: dict[str, Conditioning] = {}
        unique = list(dict.fromkeys(prompts))
        with self._present(*self._text.encoders) if unique else nullcontext():
            for prompt in unique:
                found = self._text([prompt]).tensors
                texts[prompt] = Conditioning({name: value.cpu() for name, value in found.items()})
        return texts

    def guided(self, conditioning: Conditioning, guidance: float) -> tuple[Conditioning, float]:
        return self._text.guided(self.unet, conditioning, guidance, self._true_guidance)

    def empty_prompt(self) -> Conditioning:
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

    def forget_prompts(self) -> None:
        """Encode the empty prompt again: the text encoders have changed."""
        self._empty, self._texts = None, {}

    def _rests(self, module: torch.nn.Module) -> bool:
        """Whether a module is in host memory between calls."""
        is_large = self._text.encodes_once and module in self._text.encoders
        return module is not self.unet and (self.budget.offload or is_large)

    @contextmanager
    def _present(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within, modules that rest in host memory are on the device."""
        resting = [module for module in modules if self._rests(module)]
        for module in resting:
            placement.move(module, self.device)
        yield
        for module in resting:
            placement.move(module, "cpu")

    def rest(self) -> None:
        if self.budget.offload and self._resting is None and not self.trainable_parameters():
            self._resting = self.unet.device
            placement.move(self.unet, "cpu")

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        reference: bool = False,
        copies: int = 1,
    ) -> Tensor:
        """Predict in fp32 [B,C,h,w]; `reference`: by the frozen copy, or with the adapter disabled.

        Without gradients at most budget.samples of each of the `copies` are computed at once.
        """
        self._wake()
        unet = self._reference if reference and self._reference is not None else self.unet
        adapted = unet is self.unet and reference and self._has_adapter()
        if adapted:
            self.unet.disable_adapters()
        try:
            return self._in_calls(unet, x_t, timesteps, conditioning, copies)
        finally:
            if adapted:
                self.unet.enable_adapters()

    def _wake(self) -> None:
        if self._resting is not None:
            placement.move(self.unet, self._resting)
            self._resting = None

    def _in_calls(
        self, unet: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int
    ) -> Tensor:
        """Run a UNet on all samples at once, or without gradients in calls of the budget."""
        count, most = len(x_t) // copies, self.budget.samples
        if torch.is_grad_enabled() or count <= most:
            with lower("pairs" if torch.is_grad_enabled() else "samples"):
                return self._run(unet, x_t, timesteps, conditioning, copies)
        outputs = []
        for start in range(0, count, most):
            rows = torch.arange(len(x_t), device=x_t.device).view(copies, count)
            rows = rows[:, start : start + most].flatten()
            with lower("samples"):
                part = self._run(unet, x_t[rows], timesteps[rows], conditioning.select(rows), copies)
            outputs.append(part.unflatten(0, (copies, -1)))
        return torch.cat(outputs, dim=1).flatten(0, 1)

    def _run(
        self, unet: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int
    ) -> Tensor:
        """Run a UNet in the model's precision; full fine-tuning holds its weights in fp32 (autocast)."""
        x_t = x_t.to(unet.dtype).contiguous(memory_format=self._format)
        mixed = unet.dtype != self._dtype
        with torch.autocast(x_t.device.type, self._dtype, enabled=mixed):
            return self._text.run(unet, x_t, timesteps, conditioning, copies).float()

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents [B,C,h,w], budget.images at a time: the posterior's mean, or with standard normal
        `noise` [B,C,h,w] a sample of it."""
        drawn = noise.split(self.budget.images) if noise is not None else itertools.repeat(None)
        latents = []
        with self._present(self.vae), lower("images"):
            for part, own in zip(images.split(self.budget.images), drawn, strict=False):
                part = part.to(self.vae.dtype).contiguous(memory_format=self._format)
                posterior = self.vae.encode(part).latent_dist
                latents.append(posterior.mean if own is None else posterior.mean + posterior.std * own)
        encoded = torch.cat(latents)
        if self._statistics:
            mean, std = self._statistics
            encoded = (encoded - mean) / std
        return ((encoded - self._shift) * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        if self._statistics:
            mean, std = self._statistics
            latents = latents * std + mean
        latents = latents.to(self.vae.dtype).contiguous(memory_format=self._format)
        with self._present(self.vae), lower("images"):
            parts = [
                self.vae.decode(part, return_dict=False)[0] for part in latents.split(self.budget.images)
            ]
        return torch.cat(parts).float()

    def feature_model(self) -> DownPath:
        """A frozen copy of the UNet's down path and the text encoders; only before training starts."""
        if self._text.flow:
            raise ValueError(
                "the latent reward model needs a UNet, which the base lacks (backbone.family sd or sdxl); "
                "use SPO, which judges images"
            )
        assert not self._has_adapter() and self._reference is None
        return DownPath(self.unet, self._text, self._dtype, self._format)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Disable gradients. (Not `inference_mode`: training uses the latents of a rollout afterwards.)"""
        with torch.no_grad():
            yield

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of the UNet's blocks in the backward pass instead of storing them."""
        self.unet.enable_gradient_checkpointing()

    def train_fully(self) -> None:
        """Make the full UNet trainable, in fp32; the reference becomes a frozen copy."""
        self._wake()
        self._reference = copy.deepcopy(self.unet)
        self.unet.to(torch.float32).requires_grad_(True)

    def save_pipeline(self, folder: Path) -> None:
        """Save the complete pipeline for `from_pretrained`, in the precision in which it was loaded."""
        same = self.unet.dtype == self._dtype  # else a copy: training may continue in fp32
        setattr(
            self.pipeline, self._text.denoiser, self.unet if same else saving.on_cpu(self.unet, self._dtype)
        )
        self.pipeline.save_pretrained(folder)
        saving.forget_source(folder)
        saving.announce(folder / "scheduler/scheduler_config.json", self.scheduler_config)
        setattr(self.pipeline, self._text.denoiser, self.unet)

    def add_lora(self, settings: config.Lora, seed: int) -> None:
        """Add a trainable adapter to the UNet."""
        self._wake()
        lora.add(self.unet, settings, seed)

    def save_lora(self, folder: Path) -> None:
        """Save the adapter for diffusers' `pipe.load_lora_weights(folder)`."""
        lora.save(self.unet, self._text.denoiser, type(self.pipeline), folder)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return lora.trainable(self.unet)

    def _has_adapter(self) -> bool:
        return bool(getattr(self.unet, "peft_config", None))
