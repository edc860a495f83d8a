"""LoRA as one matrix product: the numbers of peft's layer to rounding, gradients included."""

import pytest
import rounding
import torch
from peft.tuners.lora import Linear

from spo import config
from spo.backbones.lora_linear import MergedLoraLinear

LORA = config.Lora(rank=4, alpha=8)


@pytest.fixture(params=["sd", "sdxl"])
def backbone(request, load):
    model = load(request.param)
    model.add_lora(LORA, 0)
    torch.manual_seed(1)
    for parameter in model.trainable_parameters():
        parameter.data.normal_(std=0.1)
    return model


def inputs(backbone, count: int = 2):
    torch.manual_seed(2)
    x_t = torch.randn(count, *backbone.latent_shape)
    return x_t, torch.arange(1, count + 1) * 100, backbone.encode_prompts(["a red circle", "a star"])


def plain(backbone, x_t, timesteps, conditioning):
    """diffusers' own forward."""
    arguments = backbone._text.unet_arguments(conditioning)
    return backbone.unet(x_t, timesteps, return_dict=False, **arguments)[0]


def gradients(backbone, output) -> torch.Tensor:
    found = torch.autograd.grad(output.square().sum(), backbone.trainable_parameters())
    return torch.cat([g.flatten() for g in found])


def assert_equal(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    """To that share of the norm: sums are taken in another order."""
    assert float((one - other).detach().norm()) <= tolerance * float(other.detach().norm())


def test_lora_in_one_product_is_pefts_lora(backbone) -> None:
    layers = [m for m in backbone.unet.modules() if isinstance(m, MergedLoraLinear)]
    assert layers
    merged = plain(backbone, *inputs(backbone))
    of_merged = gradients(backbone, merged)
    for layer in layers:
        layer.__class__ = Linear
    pefts = plain(backbone, *inputs(backbone))
    limit = rounding.bound(backbone.unet)
    assert_equal(merged, pefts, limit)
    assert_equal(of_merged, gradients(backbone, pefts), 2 * limit)  # the way there and back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_layer_is_pefts(dtype: torch.dtype) -> None:
    """W + BA rounded to bf16 would lose a small BA: here it is below half a unit of W's last digit."""
    base = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer = MergedLoraLinear(base, "default", config=peft_config(), r=2, lora_alpha=2)
    with torch.no_grad():
        base.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(0.02)
        layer.lora_B["default"].weight.fill_(0.02)
    base.to(dtype)
    x = torch.eye(4, dtype=dtype) * 0.001
    merged = layer(x)
    layer.__class__ = Linear
    assert torch.equal(merged, layer(x))


def peft_config():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=2)
