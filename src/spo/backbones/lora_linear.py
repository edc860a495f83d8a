"""A linear layer with a plain LoRA that takes less time and memory than peft's forward.

In fp32 it is one matrix product: x (W + s BA)^T + bias instead of three. Rounded to bf16 or fp16,
W + s BA would lose most of a small BA, so a base in half precision has three products, with A and B, both
fp32, rounded as under autocast: peft would keep a copy of x in fp32 for each layer (30 to 39 % of an update's
memory). Everything else (DoRA, dropout, several adapters) runs peft's own forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor


class MergedLoraLinear(Linear):
    """peft's LoRA layer with another forward: parameters, state dict and everything else are peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs or self.merged else self._plain_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        if self.disable_adapters:
            return F.linear(x, base.weight, base.bias)
        down: Any = self.lora_A[adapter].weight
        up: Any = self.lora_B[adapter].weight
        if x.dtype != torch.float32:
            added = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
            return F.linear(x, base.weight, base.bias) + self.scaling[adapter] * added
        return _MergedLinear.apply(x, base.weight, base.bias, down, up, self.scaling[adapter])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The adapter, if it is the only one, plain LoRA without dropout or bias, with fp32 weights."""
        if len(self.active_adapters) != 1 or len(self.lora_A) != 1:
            return None
        adapter = self.active_adapters[0]
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        base: Any = self.get_base_layer()
        weights = (self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        plain = all(w.dtype == torch.float32 for w in weights) and type(base) is torch.nn.Linear
        plain = plain and x.dtype == base.weight.dtype
        dropout = isinstance(self.lora_dropout[adapter], torch.nn.Dropout)
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if not plain or dropout or base.weight.requires_grad or autocast:
            return None
        return adapter


class _MergedLinear(torch.autograd.Function):
    """Gradients of x, A and B. The backward pass recomputes W + s BA, so no copy of W is stored."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """
        Args:
            x: [...,I].
            weight: W [O,I], frozen as `bias` [O] is.
            down, up: A [R,I] and B [O,R].
        """
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ torch.addmm(weight, up, down, alpha=ctx.scale)).view_as(x)
        of_up = ctx.scale * (gradient.T @ (rows @ down.T))
        of_down = ctx.scale * ((gradient @ up).T @ rows)
        return of_x, None, None, of_down, of_up, None


def use_merged_layers(settings: LoraConfig) -> LoraConfig:
    """Make peft build `MergedLoraLinear` for linear layers."""
    settings._register_custom_module({torch.nn.Linear: MergedLoraLinear})
    return settings
