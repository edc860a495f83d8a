"""The start of a UNet, computed once for the halves of a guided batch: equal results, and where it ends."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from spo import config
from spo.backbones.shared_start import shared_start
from spo.types import Conditioning

LORA = config.Lora(rank=2, alpha=2, target_modules=["to_q", "conv1"])


def doubled(backbone) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x_t = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 300, 500, 900])
    texts = [backbone.encode_prompts(["", *three]) for three in (["a", "b", "c"], ["red", "blue", "circle"])]
    return torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat(texts)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("trained", ["adapter", "all"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_predictions_and_gradients_are_those_of_the_whole_batch(load, family, trained, checkpointed) -> None:
    backbone = load(family)
    if trained == "adapter":  # conv1 lies before the first attention
        backbone.add_lora(LORA, seed=0)
        for number, parameter in enumerate(backbone.trainable_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = 0.1 * noise
    else:
        backbone.train_fully()
    if checkpointed:
        backbone.unet.train()  # diffusers checkpoints in training mode alone
        backbone.checkpoint_gradients()
    results = []
    for copies in (1, 2):
        output = backbone.predict(*doubled(backbone), copies=copies)
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in backbone.trainable_parameters()]
        for parameter in backbone.trainable_parameters():
            parameter.grad = None
        results.append((output.detach(), torch.cat([g.flatten() for g in gradients])))
    (plain, plain_gradient), (shared, shared_gradient) = results
    assert (shared - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert (shared_gradient - plain_gradient).abs().max() <= 1e-5 * plain_gradient.abs().max()
    with backbone.inference():
        reference = [backbone.predict(*doubled(backbone), reference=True, copies=n) for n in (1, 2)]
    assert (reference[0] - reference[1]).abs().max() <= 1e-5 * reference[0].abs().max()


def small(**changes) -> UNet2DConditionModel:
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 2, "norm_num_groups": 4, "sample_size": 8}
    text = {"cross_attention_dim": 8, "attention_head_dim": 2}
    ends = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return UNet2DConditionModel(**{**sizes, **text, **ends, **changes}).eval()


def batches(unet: UNet2DConditionModel, copies: int, samples: int = 8, **more) -> dict[str, int]:
    """The batch size that each convolution sees."""
    seen: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, output, name=name: seen.__setitem__(name, len(output)))
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    with torch.no_grad(), shared_start(unet, samples, copies):
        unet(torch.zeros(samples, 4, 8, 8), torch.zeros(samples), torch.zeros(samples, 3, 8), **more)
    for hook in hooks:
        hook.remove()
    return seen


def test_all_before_the_first_attention_is_computed_once() -> None:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    seen = batches(small(**blocks), 2)
    once = {name for name, size in seen.items() if size == 4}
    resnets = ("down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.1.resnets.0")
    inside = {f"{resnet}.{name}" for resnet in resnets for name in ("conv1", "conv2")}
    assert once == inside | {"conv_in", "down_blocks.0.downsamplers.0.conv"}
    assert set(batches(small(**blocks), 1).values()) == {8}
    assert set(batches(small(**blocks), 2, samples=6).values()) == {6}, "bits could differ"


def test_of_a_block_with_attention_only_the_first_resnet_is() -> None:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    seen = batches(small(**blocks), 2)
    once = {name for name, size in seen.items() if size == 4}
    assert once == {"conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2"}


def test_where_the_time_embedding_holds_the_text_only_the_first_convolution_is() -> None:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 20,
    }
    unet = small(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), **added)
    given = {"text_embeds": torch.zeros(8, 8), "time_ids": torch.zeros(8, 6)}
    seen = batches(unet, 2, added_cond_kwargs=given)
    assert {name for name, size in seen.items() if size == 4} == {"conv_in"}
