"""What a base's models do in a stage, with random weights: to be timed, or measured on the meta device."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spo import config
from spo.backbones import lora
from spo.backbones.features import without_up_blocks
from spo.backbones.sizes import TEXT_TOKENS, empty_models
from spo.training.probe import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_SIDE = 16  # of the latents on which a block is timed


class Models:
    """UNet and VAE of a base on a device, in its precision."""

    def __init__(
        self, settings: config.Backbone, adapter: config.Lora | None, full: bool, device: str
    ) -> None:
        """
        Args:
            adapter: a LoRA on the UNet, with `full` false.
            full: the UNet is trained, in fp32.

        Raises:
            ValueError: config files that cannot be reached.
        """
        unet, vae = empty_models(settings)
        self.settings, self.device, self.full, self.dtype = settings, device, full, DTYPES[settings.dtype]
        self.unet = self._built(unet, torch.float32 if full else self.dtype)
        self.vae = self._built(vae, self.dtype)
        if adapter is not None:
            lora.add(self.unet, adapter, 0)
        elif full:
            self.unet.requires_grad_(True)

    def _built(self, empty: Any, dtype: torch.dtype) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                module = type(empty).from_config(empty.config)
        finally:
            torch.set_default_dtype(before)
        if self.settings.channels_last:
            module.to(memory_format=torch.channels_last)
        return module.eval().requires_grad_(False)

    @property
    def image_side(self) -> int:
        """Pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def runs(self) -> dict[str, Run]:
        """Each kind of work of `training.compute.Work` that the base's models do, of n samples."""
        return {
            "unet": torch.no_grad()(lambda n: self._predict(self.unet, n)),
            "unet_trained": lambda n: self._train(self.unet, n),
            "down": torch.no_grad()(lambda n: self._predict(self._down, n)),
            "down_trained": lambda n: self._train(self._down.requires_grad_(True), n),
            "decoded": torch.no_grad()(self._decode),
        }

    @cached_property
    def _down(self) -> Any:
        return without_up_blocks(self.unet)

    def _predict(self, unet: Any, n: int) -> Tensor:
        x_t, t, text, added = unet_inputs(unet, n, self.device, self.dtype)
        kind = torch.device(self.device).type
        kind = "cpu" if kind == "meta" else kind  # autocast does not know meta
        with torch.autocast(kind, self.dtype, enabled=unet.dtype != self.dtype):
            return unet(x_t, t, text, added_cond_kwargs=added, return_dict=False)[0].float()

    def _train(self, unet: Any, n: int) -> None:
        self._predict(unet, n).square().mean().backward()
        for parameter in unet.parameters():
            parameter.grad = None

    def _decode(self, n: int) -> Tensor:
        side, channels = self.unet.config.sample_size, self.vae.config.latent_channels
        latents = torch.zeros(n, channels, side, side, device=self.device, dtype=self.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float()


def unet_inputs(
    unet: Any, n: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
    """Latents, timesteps, text, and SDXL's added conditions of n samples."""
    shape: Any = unet.config
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    x_t = torch.zeros(n, shape.in_channels, shape.sample_size, shape.sample_size, **place)
    text, added = torch.zeros(n, TEXT_TOKENS, shape.cross_attention_dim, **place), None
    if shape.addition_embed_type == "text_time":
        pooled = shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(n, pooled, **place), "time_ids": torch.zeros(n, 6, **place)}
    return x_t, torch.full((n,), 501, device=device), text, added


def first_attending_block(settings: config.Backbone, device: str) -> Run:
    """The UNet's first down block with attention, at a few per cent of its weights.

    On a CPU in fp32: in half precision one call may take minutes there.
    """
    unet, _ = empty_models(settings)
    block: Any = next((b for b in unet.down_blocks if hasattr(b, "attentions")), unet.down_blocks[0])
    first, width, dtype = block.resnets[0], unet.config.cross_attention_dim, DTYPES[settings.dtype]
    dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
    block = block.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(std=0.02)
    channels, time = first.in_channels, first.time_emb_proj.in_features
    text = hasattr(block, "attentions")

    @torch.no_grad()
    def run(n: int) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        x = torch.zeros(n, channels, SMALL_SIDE, SMALL_SIDE, **place)
        given = {"encoder_hidden_states": torch.zeros(n, TEXT_TOKENS, width, **place)} if text else {}
        block(x, torch.zeros(n, time, **place), **given)

    return run


def image_side(settings: config.Backbone) -> int:
    """Pixels."""
    unet, vae = empty_models(settings)
    return unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
