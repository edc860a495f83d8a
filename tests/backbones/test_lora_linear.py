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
def test_in_half_precision_a_small_adapter_counts(dtype: torch.dtype) -> None:
    """W + BA rounded to bf16 would lose a small BA: here it is below half a unit of W's last digit. Where W x
    is 0, only BA x is left; gradients of A and B are those of fp32 to the rounding of a few products."""
    layer, x = half_layer(dtype), torch.tensor([[1.0, -1.0, 0.5, 0.25]], dtype=dtype)
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    down, up = (w["default"].weight for w in (layer.lora_A, layer.lora_B))
    output = layer(x)
    expected = x.float() @ (up @ down).T
    few = 8 * torch.finfo(dtype).eps  # the rounding of A, B, A x, B A x and of sums of four
    assert (
        output.dtype == dtype and float((output.float() - expected).abs().max() / expected.abs().max()) < few
    )
    found = torch.autograd.grad(output.float().sum(), [down, up])
    by_hand = torch.autograd.grad(expected.sum(), [down, up])
    for ours, theirs in zip(found, by_hand, strict=True):
        assert ours.dtype == torch.float32 and not differs(ours, theirs, few)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stores_no_fp32_copy_of_the_input(dtype: torch.dtype) -> None:
    layer, kept = half_layer(dtype), []
    x = torch.ones(64, 4, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert kept and not [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]


def differs(one: torch.Tensor, other: torch.Tensor, share: float) -> bool:
    """By more than a share of the largest value."""
    return float((one - other).abs().max()) > share * float(other.abs().max())


def half_layer(dtype: torch.dtype) -> MergedLoraLinear:
    """Of weights 1 in half precision, with an adapter of .02 * .02 in fp32."""
    base = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer = MergedLoraLinear(base, "default", config=peft_config(), r=2, lora_alpha=2)
    with torch.no_grad():
        base.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(0.02)
        layer.lora_B["default"].weight.fill_(0.02)
    base.to(dtype)
    return layer


def peft_config():
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=2)
