"""The first part of a base's denoiser: the encoder of a latent reward model.

The copy is a UNet of diffusers without its up blocks, or a transformer without its last blocks, so its own
forward pass runs the embeddings of timestep, text and latents, and the blocks that are left.
"""

import abc
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo import config
from spo.backbones import lora
from spo.backbones.family import Family
from spo.types import Backbone, Conditioning


class FirstPart(nn.Module, abc.ABC):
    """What both kinds have in common; frozen until something is made trainable."""

    width: int  # of all features
    facts: dict[str, Any]  # what two bases must have in common to share a latent reward model

    def __init__(self, denoiser: Any, text: Family, dtype: torch.dtype) -> None:
        """`dtype` is the precision of the computation, whatever that of the weights."""
        super().__init__()
        self.unet, self._text, self._dtype = denoiser, text, dtype
        self.text_is_projected = text.is_projected
        self.text_width = text.pooled_width

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text for `features`, and as `pooled` its [B,text_width]; with gradients where it is trained."""

    @abc.abstractmethod
    def empty_prompt(self) -> Conditioning:
        """The empty prompt, encoded once while the text encoders are frozen."""

    def encode_empty_prompt(self) -> None:
        """Encode the empty prompt as any other, where the base takes zeros for it."""
        self._text.zeros = False

    @abc.abstractmethod
    def features(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[list[Tensor], Tensor]:
        """States [B,width] averaged over the image, fp32: those that VFE leaves as they are, and the last."""

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

    def _autocast(self, weights: torch.dtype) -> Any:
        """Compute in the model's precision if the weights are stored in another."""
        return torch.autocast(self.unet.device.type, self._dtype, enabled=weights != self._dtype)


class DownPath(FirstPart):
    """Text encoders, and a UNet without its up blocks."""

    def __init__(
        self, unet: Any, text: Family, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        """Copies both."""
        if unet.mid_block is None:
            raise ValueError(
                "backbone.checkpoint: its UNet has no mid block, which a latent reward model needs"
            )
        super().__init__(without_up_blocks(unet), copy.deepcopy(text), dtype)
        self._format = memory_format
        self.text_encoders: Any = nn.ModuleList(self._text.encoders)
        down = [block.resnets[-1].out_channels for block in self.unet.down_blocks]
        middle = self.unet.mid_block.resnets[-1].out_channels
        self.width = sum(down) + middle
        self.facts = {
            "channels of the UNet's down blocks": down,
            "channels of the UNet's mid block": middle,
        }
        self._empty: Conditioning | None = None
        self.eval().requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        with self._autocast(self.text_encoders[0].dtype):
            return self._text(prompts)

    def empty_prompt(self) -> Conditioning:
        if any(weight.requires_grad for weight in self.text_encoders.parameters()):
            self._empty = None
            return self.encode_prompts([""])
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

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

    def checkpoint_gradients(self) -> None:
        super().checkpoint_gradients()
        for encoder in self.text_encoders:
            encoder.gradient_checkpointing_enable()


class FirstBlocks(FirstPart):
    """A transformer without the last quarter of its blocks.

    The text is the backbone's, encoded once: the text encoders are no part of the model, and stay frozen.
    """

    def __init__(self, backbone: Backbone, transformer: Any, text: Family, dtype: torch.dtype) -> None:
        super().__init__(without_last_blocks(transformer), text, dtype)
        self._backbone = backbone
        self.width = self.unet.inner_dim
        self.facts = {"blocks of the transformer": blocks(self.unet), "width of the transformer": self.width}
        self.eval().requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self._backbone.encode_prompts(prompts)

    def empty_prompt(self) -> Conditioning:
        return self._backbone.empty_prompt()

    def features(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[list[Tensor], Tensor]:
        """The mean over all image tokens [B,width] after the last block, fp32. Where a guidance scale is an
        input it is 1."""
        states: list[Tensor] = []
        hook = self.unet.norm_out.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        conditioning, _ = self._text.guided(self.unet, conditioning, 1.0, None)
        try:
            with self._autocast(self.unet.dtype):
                self._text.run(self.unet, x_t.to(self.unet.dtype), timesteps, conditioning)
        finally:
            hook.remove()
        return [], states[0].float().mean(1)


class _Unread(nn.Module):
    """In place of a transformer's output layers: zeros of their shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        return tokens.new_zeros(*tokens.shape[:2], self.width)


def without_up_blocks(unet: Any) -> Any:
    """A copy whose output is the state after the mid block; the up blocks are not copied on the way."""
    return _copy_with(unet, up_blocks=nn.ModuleList(), conv_norm_out=None, conv_out=nn.Identity())


def blocks(transformer: Any) -> list[int]:
    """How many blocks it has: joint ones, and those of one stream, which only FLUX has."""
    return [len(transformer.transformer_blocks), len(getattr(transformer, "single_transformer_blocks", ()))]


def without_last_blocks(transformer: Any) -> Any:
    """A copy with three quarters of the blocks, rounded up (18 of SD 3's 24, 43 of FLUX's 57)."""
    joint, single = blocks(transformer)
    left = -(-3 * (joint + single) // 4)
    changes = {
        "transformer_blocks": transformer.transformer_blocks[:left],
        "norm_out": _Unread(transformer.proj_out.out_features),
        "proj_out": nn.Identity(),
    }
    if single:
        changes["single_transformer_blocks"] = transformer.single_transformer_blocks[: max(0, left - joint)]
    return _copy_with(transformer, **changes)


def _copy_with(model: Any, **modules: nn.Module | None) -> Any:
    """A copy with other modules; those that they replace are not copied on the way."""
    shell = copy.copy(model)
    shell._modules = {**model._modules, **modules}
    return copy.deepcopy(shell)


def _last(block: Any, states: tuple[Tensor, ...]) -> Tensor:
    """The state after the last layer of a down block, before its downsampler."""
    return states[-1] if block.downsamplers is None else states[-2]


def _pooled(state: Tensor) -> Tensor:
    return state.float().mean((2, 3))
