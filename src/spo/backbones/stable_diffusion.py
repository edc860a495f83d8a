"""Stable Diffusion 1.5 and XL checkpoints of diffusers as a `types.Backbone`."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo import config
from spo.backbones import checks, external, lora, parts, scheduler, single_file, sizes, unet_file, weights
from spo.backbones.checks import latent_side
from spo.backbones.features import DownPath
from spo.backbones.layer_names import COMPONENTS
from spo.backbones.shared_start import shared_start
from spo.backbones.text import SdText, SdxlText
from spo.runtime import hub
from spo.training import distributed, placement
from spo.training.placement import lower
from spo.types import Budget, Conditioning


class StableDiffusion:
    """UNet, VAE and text encoders of one checkpoint; trainable is an adapter, the full UNet, or nothing.

    The caller provides timesteps and latents: this class draws no random number. The VAE may have another
    dtype than the UNet (SDXL's own overflows in fp16), which encode and decode hide.

    `budget` says how many samples a call takes. With budget.offload text encoders and VAE rest in host memory
    between calls, and the UNet from `rest` to its next call.
    """

    def __init__(
        self,
        pipeline: Any,
        text: SdText | SdxlText,
        channels_last: bool,
        scheduler_config: Mapping[str, Any],
        budget: Budget | None = None,
    ) -> None:
        self.pipeline, self.pipeline_class = pipeline, type(pipeline)
        self.budget = budget or Budget()
        self._resting: torch.device | None = None  # the UNet's device while it is in host memory
        self._empty: Conditioning | None = None
        self._reference: Any = None  # only for full fine-tuning; an adapter is disabled instead
        self.unet, self.vae, self._text = pipeline.unet, pipeline.vae, text
        self.text_encoder = pipeline.text_encoder
        self.scheduler_config = scheduler_config
        side = latent_side(self.unet.config.sample_size, "backbone.checkpoint")
        self.latent_shape = (self.unet.config.in_channels, side, side)
        self.image_size = (side * pipeline.vae_scale_factor, side * pipeline.vae_scale_factor)
        self._latents_mean, self._latents_std = (
            self._statistics("latents_mean"),
            self._statistics("latents_std"),
        )
        self._dtype = self.unet.dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        for module in (self.unet, self.vae):
            module.to(memory_format=self._format)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
                if self.budget.offload and module is not self.unet:
                    placement.move(module, "cpu")

    @property
    def device(self) -> torch.device:
        return self._resting or self.unet.device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        with self._present(*self._text.encoders):
            return self._text(prompts)

    def empty_prompt(self) -> Conditioning:
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

    @contextmanager
    def _present(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within, modules that rest in host memory are on the device."""
        if not self.budget.offload:
            yield
            return
        for module in modules:
            placement.move(module, self.device)
        yield
        for module in modules:
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
        if self._resting is not None:
            placement.move(self.unet, self._resting)
            self._resting = None
        unet = self._reference if reference and self._reference is not None else self.unet
        adapted = unet is self.unet and reference and self._has_adapter()
        if adapted:
            self.unet.disable_adapters()
        try:
            return self._in_calls(unet, x_t, timesteps, conditioning, copies)
        finally:
            if adapted:
                self.unet.enable_adapters()

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
        text = self._text.unet_arguments(conditioning)
        with (
            torch.autocast(x_t.device.type, self._dtype, enabled=mixed),
            shared_start(unet, len(x_t), copies),
        ):
            return unet(x_t, timesteps, return_dict=False, **text)[0].float()

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
        if self._latents_mean is not None and self._latents_std is not None:
            encoded = (encoded - self._latents_mean) / self._latents_std
        return ((encoded - self._shift) * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        if self._latents_mean is not None and self._latents_std is not None:
            latents = latents * self._latents_std + self._latents_mean
        latents = latents.to(self.vae.dtype).contiguous(memory_format=self._format)
        with self._present(self.vae), lower("images"):
            parts = [
                self.vae.decode(part, return_dict=False)[0] for part in latents.split(self.budget.images)
            ]
        return torch.cat(parts).float()

    def _statistics(self, key: str) -> Tensor | None:
        """Statistics per latent channel [1,C,1,1]; None if the VAE announces none."""
        values = self.vae.config.get(key)
        return None if values is None else torch.tensor(values, device=self.device).view(1, -1, 1, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def feature_model(self) -> DownPath:
        """A frozen copy of the UNet's down path and the text encoders; only before training starts."""
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
        self._reference = copy.deepcopy(self.unet)
        self.unet.to(torch.float32).requires_grad_(True)

    def save_pipeline(self, folder: Path) -> None:
        """Save the complete pipeline for `from_pretrained`, in the precision in which it was loaded."""
        same = self.unet.dtype == self._dtype  # else a copy: training may continue in fp32
        self.pipeline.unet = self.unet if same else _on_cpu(self.unet, self._dtype)
        self.pipeline.save_pretrained(folder)
        weights.forget_source(folder)
        self.pipeline.unet = self.unet

    def add_lora(self, settings: config.Lora, seed: int) -> None:
        """Add a trainable adapter to the UNet."""
        lora.add(self.unet, settings, seed)

    def save_lora(self, folder: Path) -> None:
        """Save the adapter for diffusers' `pipe.load_lora_weights(folder)`."""
        lora.save(self.unet, self.pipeline_class, folder)

    def load_lora(self, path: Path) -> str:
        """Load a LoRA (file or folder) into UNet and text encoders; returns a summary of its changes."""
        file = external.lora_file_of(path)
        external.check_prediction(file, self._prediction)
        names = [name for name in COMPONENTS if getattr(self.pipeline, name, None) is not None]
        models = {name: getattr(self.pipeline, name) for name in names}
        changed = lora.load(models, file)
        self._empty = None
        for model in models.values():
            model.eval().requires_grad_(False)
        return f"{file}: LoRA, changes " + ", ".join(
            f"{n} layers of the {name}" for name, n in changed.items()
        )

    def load_unet(self, files: Sequence[Path], described_by: Path | None) -> str:
        """Load the weights of another UNet of the same architecture; returns a summary of its changes.

        Args:
            described_by: its config.json, if any.
        """
        changed, total = unet_file.load(self.unet, files, described_by)
        return f"{files[0]}: UNet, {changed} of {total} tensors differ from the base's"

    @property
    def _prediction(self) -> str:
        return self.scheduler_config.get("prediction_type", "epsilon")

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return lora.trainable(self.unet)

    def _has_adapter(self) -> bool:
        return bool(getattr(self.unet, "peft_config", None))


def _on_cpu(module: Any, dtype: torch.dtype) -> Any:
    """A copy of a module with its weights in another precision, for which its device needs no memory."""
    memo: dict[int, Any] = {}
    for weight in module.parameters():
        memo[id(weight)] = torch.nn.Parameter(weight.detach().to(dtype).cpu(), requires_grad=False)
    for value in module.buffers():
        memo[id(value)] = value.to(dtype if value.is_floating_point() else value.dtype).cpu()
    return copy.deepcopy(module, memo)


def load(
    settings: config.Backbone, device: torch.device | str, budget: Budget | None = None
) -> StableDiffusion:
    """Load a checkpoint from a diffusers folder, a single .safetensors file or a hub id.

    Raises:
        ValueError: no such checkpoint, no network, another family, parts that are missing, damaged or do not
            fit each other, or a model that is not a discrete-time DDPM.
    """
    sdxl = settings.family == "sdxl"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]
    where = f"backbone.checkpoint: {settings.checkpoint}"
    marks: Mapping[str, Any] = {}
    if settings.is_single_file:
        header = single_file.Header(settings.checkpoint)
        single_file.check(header, settings)
        marks = single_file.marks(header, settings.scheduler)
    else:
        _check_folder(settings)
        parts.check_index(parts.index_of(settings, where), settings.family, where)
    pipeline = _pipeline(settings, dtype, where)
    checks.check(pipeline, sdxl, where)
    used = scheduler.effective(pipeline.scheduler, settings.family, marks, settings.scheduler, where)
    # so that a saved full fine-tune announces the same
    pipeline.scheduler.register_to_config(**{**marks, **scheduler.overridden(settings.scheduler)})
    pipeline.to(device)
    if sdxl and dtype == torch.float16 and (settings.vae is None or pipeline.vae.config.force_upcast):
        pipeline.vae.to(torch.float32)  # its activations overflow in fp16
    return StableDiffusion(pipeline, _text(pipeline, sdxl), settings.channels_last, used, budget)


def _pipeline(settings: config.Backbone, dtype: torch.dtype, where: str) -> Any:
    """Build the diffusers pipeline from parts that are loaded and checked one by one."""
    import diffusers

    kind = getattr(diffusers, parts.PIPELINES[settings.family])
    checks.check_unet(sizes.unet_config(settings), settings.family == "sdxl", where)
    given: dict[str, Any] = {"scheduler": scheduler.load(settings.described_by, settings.revision, where)}
    if settings.vae is not None:
        given["vae"] = parts.load_vae(settings.vae, dtype)
    if settings.family == "sd":
        given |= {"safety_checker": None, "requires_safety_checker": False}
    name = settings.checkpoint
    if settings.is_single_file:
        given |= {"config": settings.described_by, "torch_dtype": dtype}
        return parts.reach(where, settings.described_by, lambda: kind.from_single_file(name, **given))
    given |= {**parts.load(settings, dtype, where), "revision": settings.revision}
    return parts.reach(where, name, lambda: kind.from_pretrained(name, **given))


def load_aligned(
    settings: config.Backbone,
    adapter: str | Path | None,
    device: torch.device | str,
    budget: Budget | None = None,
) -> StableDiffusion:
    """Load the base model with an adapter: a LoRA, a UNet, or a complete pipeline that replaces it.

    Raises:
        ValueError: as `load`, and for an adapter that does not fit or is not recognised by its files.
    """
    if adapter is None:
        return load(settings, device, budget)
    source = external.find(Path(adapter))
    if source.files[0].is_file():
        external.check_family(source.files[0], settings.family)
    if source.kind == "pipeline":
        replaced = {"checkpoint": str(source.files[0]), "revision": None, "config": settings.described_by}
        backbone = load(settings.model_copy(update=replaced), device, budget)
        if source.files[0].is_file():
            external.check_prediction(source.files[0], backbone._prediction)
        return backbone
    backbone = load(settings, device, budget)
    if source.kind == "unet":
        summary = backbone.load_unet(source.files, source.config)
    else:
        summary = backbone.load_lora(source.files[0])
    if distributed.is_main_process():
        print(f"spo: {summary}", file=sys.stderr)
    return backbone


def _text(pipeline: Any, sdxl: bool) -> SdText | SdxlText:
    if not sdxl:
        return SdText(pipeline.tokenizer, pipeline.text_encoder)
    side = latent_side(pipeline.unet.config.sample_size, "backbone.checkpoint") * pipeline.vae_scale_factor
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    zeros = pipeline.config.force_zeros_for_empty_prompt
    return SdxlText([pipeline.tokenizer, pipeline.tokenizer_2], encoders, side, zeros)


def _check_folder(settings: config.Backbone) -> None:
    """Check that a checkpoint is a diffusers pipeline folder, or has the form OWNER/NAME of a hub id.

    Raises:
        ValueError: what the path is instead.
    """
    name = settings.checkpoint
    path, where = Path(name), f"backbone.checkpoint: {name}"
    if not path.exists():
        try:
            hub.check(name)
        except ValueError as error:
            raise ValueError(f"backbone.checkpoint: {error}") from None
        return
    if path.is_file():
        raise ValueError(f"{where} is not a .safetensors file; convert it, or give a diffusers folder")
    if (path / "model_index.json").exists():
        return
    reason = "is not a diffusers pipeline (no model_index.json)"
    if (path / "adapter_config.json").exists() or (path / lora.FILE).exists():
        reason += (
            "; give a LoRA by `spo generate --lora` or generate.VARIANT.adapter, and its base model here"
        )
    elif (path / "config.json").exists():
        reason += (
            "; give a UNet by `spo generate --unet` or generate.VARIANT.adapter, and its base model here"
        )
    raise ValueError(f"{where} {reason}")
