"""Before the labels: the CLIP learns to see quality from harmed copies of unlabelled pictures.

Two copies of a picture are harmed alike but for one of four degradations (blur, grain, paleness, darkness),
and the CLIP's own score for the picture's caption learns which of them is harmed less. Beside it the CLIP
goes on telling which caption a harmed picture has. So the score that labels then train begins with an
opinion: harm is bad. It is ours, not that of the people who labelled.

Not in the paper, whose preference model starts from PickScore, a CLIP that was taught quality by 580,000
labels. What it brings in scenes is in docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spo.config import Degradations
from spo.diffusion import finite
from spo.diffusion.noise import generator, shuffled
from spo.preference.degradations import Draws, degrade
from spo.preference.model import STEP_CONDITION, StepAwarePreferenceModel, token_ids
from spo.preference.trainer import check_pairs, take_step
from spo.runtime.signals import stop_on_signal
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.optimizer import adamw
from spo.types import Backbone, LatentPairs

ORDER_WEIGHT, ORDER_SCALE = 2.0, 40.0  # logits a unit of cosine: copies of one picture differ by little
CAPTION_WEIGHT, CAPTION_SCALE = 0.5, 20.0
DECODED = 64  # pictures a decoder call


def warm_up(
    model: StepAwarePreferenceModel,
    tokenizer: Any,
    backbone: Backbone,
    pairs: LatentPairs,
    settings: Degradations,
    *,
    seed: int,
    checkpoint: CheckpointStore | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
) -> None:
    """Train `model` in place for settings.steps updates on pictures and captions of `pairs`, not on labels.

    The step condition stays as it is: pictures are whole, at t = 0. Everything random follows from (seed,
    step), so a resumed training equals an uninterrupted one bit for bit, and n processes equal one.

    Raises:
        ValueError: there are no pairs.
        FloatingPointError: a gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    check_pairs(pairs)
    left = (*STEP_CONDITION, "logit_scale")
    trained = [p for n, p in model.named_parameters() if not any(part in n for part in left)]
    optimizer = adamw(trained, settings.optimizer)
    first = 0
    if checkpoint and (found := checkpoint.latest()):
        first, state = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if first >= settings.steps:
        return
    pictures, captions = _pictures(model, backbone, pairs, settings.pictures, seed)
    ids = token_ids(tokenizer, captions, model)
    model.train()
    bar = tqdm(range(first, settings.steps), "degradations", settings.steps, initial=first, unit="step")
    with stop_on_signal() as stopped:
        for step in bar:
            metrics = _update(model, pictures, ids, settings, optimizer, seed, step)
            on_metrics(metrics, step + 1)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            stop = distributed.any_rank(bool(stopped))
            save = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stop
            if checkpoint and save and distributed.is_main_process():
                checkpoint.save(step + 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to go on from there")
    model.eval()


def _pictures(
    model: StepAwarePreferenceModel, backbone: Backbone, pairs: LatentPairs, most: int, seed: int
) -> tuple[Tensor, list[str]]:
    """At most `most` pictures of pairs, uint8 [N,3,size,size] as the model sees them, and their captions.

    Decoded once and kept in memory: 8,000 of 224 pixels a side are 1.2 GB.

    Raises:
        ValueError: latents or what the VAE makes of them are NaN or infinite.
    """
    chosen = shuffled(2 * len(pairs.captions), 0, min(most, 2 * len(pairs.captions)), seed)
    sides = torch.tensor([i for _, i in chosen])
    captions, parts = pairs.captions, []
    for part in tqdm(sides.split(DECODED), "decode pictures", unit="batch"):
        both = torch.stack(pairs.read(part // 2))
        latents = both[part % 2, torch.arange(len(part))]
        check, texts = finite.FiniteCheck(), [captions[i] for i in (part // 2).tolist()]
        check.note(finite.STORED, latents, texts)
        with backbone.inference():
            decoded = backbone.decode(latents.to(backbone.device))
        check.note(finite.DECODER, decoded, texts)
        check.check()
        images = model.fitted(decoded).clamp(-1, 1)
        parts.append(((images + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts), [captions[i] for i in (sides // 2).tolist()]


def _update(
    model: StepAwarePreferenceModel,
    pictures: Tensor,
    ids: Tensor,
    settings: Degradations,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One optimizer update on the pictures of `step`: each process its share."""
    count = min(settings.batch_size, len(pictures))
    distributed.check_shards(count, "preference.degradations.batch_size")
    everyone = shuffled(len(pictures), step * count, count, seed)
    chosen = distributed.shard(everyone)
    images = pictures[torch.tensor([i for _, i in chosen])].to(ids.device).float() / 127.5 - 1
    copies, difference = _copies(images, chosen, seed, step)
    embedded = model.encode_image(torch.cat(copies), ids.new_zeros(2 * len(chosen)))
    one, other = F.normalize(embedded, dim=-1).chunk(2)
    texts, place = ids[torch.tensor([i for _, i in everyone], device=ids.device)].unique(
        dim=0, return_inverse=True
    )
    own, texts = distributed.shard(place), model.encode_text(texts)
    order = order_loss(ORDER_SCALE * ((one - other) * texts[own]).sum(1), difference)
    captions = F.cross_entropy(CAPTION_SCALE * one @ texts.T, own, reduction="none")
    losses = torch.stack([order.sum(), captions.sum()]) / count
    loss = ORDER_WEIGHT * losses[0] + CAPTION_WEIGHT * losses[1]
    model.zero_grad(set_to_none=True)  # of the step condition too, which is not trained here
    loss.backward()
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    norm = take_step(optimizer, settings.optimizer, step, key="preference.degradations", share=cosine)
    order_mean, caption_mean = distributed.all_reduce_sum(losses.detach()).tolist()
    return {
        "loss": ORDER_WEIGHT * order_mean + CAPTION_WEIGHT * caption_mean,
        "order": order_mean,
        "caption": caption_mean,
        "gradient_norm": norm.item(),
    }


def _copies(
    images: Tensor, chosen: Sequence[tuple[int, int]], seed: int, step: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two harmed copies of each picture, and by how much the first is harmed more [B]."""
    side = int(torch.randint(8, 49, (), generator=generator(seed, f"grain {step}")))
    first = Draws.of([generator(seed, f"first copy {e} {i}") for e, i in chosen], side)
    second = first.but_one([generator(seed, f"second copy {e} {i}") for e, i in chosen])
    difference = (first.strengths - second.strengths).sum(1)
    copies = degrade(images, first.to(images.device)), degrade(images, second.to(images.device))
    return copies, difference.to(images.device)


def order_loss(gap: Tensor, difference: Tensor) -> Tensor:
    """Cross-entropy [B] of which copy is harmed less.

    Args:
        gap: [B], logits: the first copy's score minus the second's.
        difference: [B], the first copy's harm minus the second's; where it is 0 there is no loss.
    """
    losses = F.binary_cross_entropy_with_logits(gap, (difference < 0).to(gap), reduction="none")
    return losses * (difference != 0)
