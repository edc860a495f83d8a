"""The down path of a base's UNet: the encoder of a latent reward model.

The copy is a UNet of diffusers without its up blocks, so its own forward pass runs the timestep embedding,
SDXL's added conditions, the down blocks and the mid block, for both families.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo import config
from spo.backbones import lora
from spo.backbones.family import Family
from spo.types import Conditioning


class DownPath(nn.Module):
    """Text encoders, and a UNet without its up blocks; frozen until something is made trainable."""

    def __init__(
        self, unet: Any, text: Family, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        """Copies both; `dtype` is the precision of the computation, whatever that of the weights."""
        super().__init__()
        if unet.mid_block is None:
            raise ValueError(
                "backbone.checkpoint: its UNet has no mid block, which a latent reward model needs"
            )
        self.unet: Any = without_up_blocks(unet)
        self._text, self._dtype, self._format = copy.deepcopy(text), dtype, memory_format
        self.text_encoders: Any = nn.ModuleList(self._text.encoders)
        self.text_is_projected = self._text.is_projected
        self.text_width = self._text.pooled_width
        self.down_widths = tuple(block.resnets[-1].out_channels for block in self.unet.down_blocks)
        self.mid_width = self.unet.mid_block.resnets[-1].out_channels
        self._empty: Conditioning | None = None
        self.eval().requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text for `features`, and as `pooled` its [B,text_width]; with gradients where they are trained."""
        with self._autocast(self.text_encoders[0].dtype):
            return self._text(prompts)

    def empty_prompt(self) -> Conditioning:
        """The empty prompt, encoded once while the text encoders are frozen."""
        if any(weight.requires_grad for weight in self.text_encoders.parameters()):
            self._empty = None
            return self.encode_prompts([""])
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

    def encode_empty_prompt(self) -> None:
        """Encode the empty prompt as any other, where the base takes zeros for it."""
        self._text.zeros = False

    def features(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[list[Tensor], Tensor]:
        """Means over h and w of each down block's last state [B,width] before downsampling, and of the mid
        block's; fp32."""
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda block, _, output: states.append(_last(block, output[1])))
            for block in self.unet.down_blocks
        ]
        try:
            x_t = x_t.to(self.unet.dtype).contiguous(memory_format=self._format)
            with self._autocast(self.unet.dtype):
                middle = self._text.run(self.unet, x_t, timesteps, conditioning)
        finally:
            for hook in hooks:
                hook.remove()
        return [_pooled(state) for state in states], _pooled(middle)

    def train_fully(self) -> None:
        self.to(torch.float32).requires_grad_(True)

    def add_lora(self, settings: config.Lora, seed: int) -> None:
        lora.add(self.unet, settings, seed)

    def merge_lora(self) -> None:
        if getattr(self.unet, "peft_config", None):
            self.unet.fuse_lora()
            self.unet.unload_lora()

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.unet.enable_gradient_checkpointing()
        for encoder in self.text_encoders:
            encoder.gradient_checkpointing_enable()

    def _autocast(self, weights: torch.dtype) -> Any:
        """Compute in the model's precision if the weights are stored in another."""
        return torch.autocast(self.unet.device.type, self._dtype, enabled=weights != self._dtype)


def without_up_blocks(unet: Any) -> Any:
    """A copy whose output is the state after the mid block; the up blocks are not copied on the way."""
    shell = copy.copy(unet)
    unused = {"up_blocks": nn.ModuleList(), "conv_norm_out": None, "conv_out": nn.Identity()}
    shell._modules = {**unet._modules, **unused}
    return copy.deepcopy(shell)


def _last(block: Any, states: tuple[Tensor, ...]) -> Tensor:
    """The state after the last layer of a down block, before its downsampler."""
    return states[-1] if block.downsamplers is None else states[-2]


def _pooled(state: Tensor) -> Tensor:
    return state.float().mean((2, 3))
