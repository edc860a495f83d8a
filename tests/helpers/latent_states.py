"""The states that a latent reward model sees, from diffusers' own blocks run layer by layer."""

from __future__ import annotations

import torch

PROMPTS = ["a circle", "a blue star on sand", "a large red square"]


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([1, 451, 951])


def states_by_hand(unet, x, timesteps, text, pooled=None) -> list[torch.Tensor]:
    """Means of the states after the last layer of each down block, then of the mid block."""
    embedding = unet.time_embedding(unet.time_proj(timesteps))
    if pooled is not None:
        ids = unet.add_time_proj(torch.tensor([16.0, 16, 0, 0, 16, 16])).reshape(1, -1).expand(len(x), -1)
        embedding = embedding + unet.add_embedding(torch.cat([pooled, ids], dim=-1))
    x, means = unet.conv_in(x), []
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = resnet(x, embedding)
            if attention is not None:
                x = attention(x, encoder_hidden_states=text).sample
        means.append(x.mean((2, 3)))
        for downsampler in block.downsamplers or []:
            x = downsampler(x)
    middle = unet.mid_block
    x = middle.resnets[0](x, embedding)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = resnet(attention(x, encoder_hidden_states=text).sample, embedding)
    return [*means, x.mean((2, 3))]
