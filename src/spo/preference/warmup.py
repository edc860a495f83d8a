"""Before the labels: the CLIP learns to see quality from harmed copies of unlabelled pictures.

Two copies of a picture, harmed by different strengths, are embedded; from the difference alone a linear
head tells which of them is more blurred, grainier, paler and darker. Beside it the CLIP goes on telling
which caption a harmed picture has. The head is dropped; labels then decide what of it people care for.

Not in the paper, whose preference model starts from PickScore, a CLIP that was taught quality by 580,000
labels. In scenes, within the candidates of one step, the correlation of scores with the annotators' view of
quality rose from .18 to .25 (other trainings: .34, .27); SPO gained no more at equal layout (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spo import processes
from spo.checkpoint import CheckpointStore, stop_on_signal
from spo.config import Degradations
from spo.diffusion.noise import generator, shuffled
from spo.optimizer import adamw
from spo.preference.degradations import DEGRADATIONS, Draws, degrade
from spo.preference.model import STEP_CONDITION, StepAwarePreferenceModel, token_ids
from spo.preference.train import LatentPairs, check_pairs, take_step
from spo.types import Backbone

GAIN = 40.0  # logits a unit of the head: embeddings of copies of one picture differ by little
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
    head = _head(model, seed)
    left = (*STEP_CONDITION, "logit_scale")
    trained = [p for n, p in model.named_parameters() if not any(part in n for part in left)]
    optimizer = adamw([*trained, *head.parameters()], settings.optimizer)
    first = 0
    if checkpoint and (found := checkpoint.latest()):
        first, state = found
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    if first >= settings.steps:
        return
    pictures, captions = _pictures(model, backbone, pairs, settings.pictures, seed)
    ids = token_ids(tokenizer, captions, model)
    model.train()
    bar = tqdm(range(first, settings.steps), "degradations", settings.steps, initial=first, unit="step")
    with stop_on_signal() as stopped:
        for step in bar:
            metrics = _update(model, head, pictures, ids, settings, optimizer, seed, step)
            on_metrics(metrics, step + 1)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            stop = processes.anywhere(bool(stopped))
            save = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stop
            if checkpoint and save and processes.is_first():
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(step + 1, {**state, "head": head.state_dict()})
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to go on from there")
    model.eval()


def _head(model: StepAwarePreferenceModel, seed: int) -> nn.Linear:
    """No bias: equal copies have no order."""
    width = model.model.config.projection_dim
    head = nn.Linear(width, len(DEGRADATIONS), bias=False)
    drawn = torch.rand(head.weight.shape, generator=generator(seed, "degradations head"))
    head.weight.data.copy_((drawn * 2 - 1) / math.sqrt(width))
    return head.to(model.model.logit_scale.device)


def _pictures(
    model: StepAwarePreferenceModel, backbone: Backbone, pairs: LatentPairs, most: int, seed: int
) -> tuple[Tensor, list[str]]:
    """At most `most` pictures of pairs, uint8 [N,3,size,size] as the model sees them, and their captions.

    Decoded once and kept in memory: 8,000 of 224 pixels a side are 1.2 GB.
    """
    chosen = shuffled(2 * len(pairs.captions), 0, min(most, 2 * len(pairs.captions)), seed)
    sides = torch.tensor([i for _, i in chosen])
    parts = []
    for part in tqdm(sides.split(DECODED), "decode pictures", unit="batch"):
        both = torch.stack(pairs.read(part // 2))
        latents = both[part % 2, torch.arange(len(part))]
        with backbone.inference():
            images = model.fitted(backbone.decode(latents.to(backbone.device))).clamp(-1, 1)
        parts.append(((images + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts), [pairs.captions[i] for i in (sides // 2).tolist()]


def _update(
    model: StepAwarePreferenceModel,
    head: nn.Linear,
    pictures: Tensor,
    ids: Tensor,
    settings: Degradations,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One optimizer update on the pictures of `step`: each process its share."""
    count = min(settings.batch_size, len(pictures))
    processes.check_share(count, "preference.degradations.batch_size")
    everyone = shuffled(len(pictures), step * count, count, seed)
    side = int(torch.randint(8, 49, (), generator=generator(seed, f"grain {step}")))
    chosen = processes.share(everyone)
    device = ids.device
    images = pictures[torch.tensor([i for _, i in chosen])].to(device).float() / 127.5 - 1
    copies = []
    for copy in ("first", "second"):
        drawn = Draws.of([generator(seed, f"{copy} copy {e} {i}") for e, i in chosen], side).to(device)
        copies.append((degrade(images, drawn), drawn.strengths))
    embedded = model.encode_image(torch.cat([c[0] for c in copies]), ids.new_zeros(2 * len(chosen)))
    one, other = F.normalize(embedded, dim=-1).chunk(2)
    order = order_loss(head(GAIN * (one - other)), copies[0][1] - copies[1][1])
    captions = _caption_losses(model, one, ids, [i for _, i in everyone], [i for _, i in chosen])
    losses = torch.stack([order.sum(), captions.sum()]) / count
    loss = losses[0] + CAPTION_WEIGHT * losses[1]
    model.zero_grad(set_to_none=True)  # of the step condition too, which is not trained here
    head.zero_grad(set_to_none=True)
    loss.backward()
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    norm = take_step(optimizer, settings.optimizer, step, key="preference.degradations", share=cosine)
    order_mean, caption_mean = processes.total(losses.detach()).tolist()
    return {
        "loss": order_mean + CAPTION_WEIGHT * caption_mean,
        "order": order_mean,
        "caption": caption_mean,
        "gradient_norm": norm.item(),
    }


def order_loss(logits: Tensor, difference: Tensor) -> Tensor:
    """Cross-entropy [B], summed over the degradations, of which copy is harmed more.

    Args:
        logits: [B,4], positive where the first copy looks more harmed.
        difference: [B,4], its strength minus the other's; where it is 0 there is no order and no loss.
    """
    losses = F.binary_cross_entropy_with_logits(logits, (difference > 0).to(logits), reduction="none")
    return (losses * (difference != 0)).sum(1)


def _caption_losses(
    model: StepAwarePreferenceModel, image: Tensor, ids: Tensor, batch: Sequence[int], mine: Sequence[int]
) -> Tensor:
    """Cross-entropy [b] of my images' captions among the different captions of the whole batch."""
    texts, place = ids[torch.tensor(batch, device=ids.device)].unique(dim=0, return_inverse=True)
    where = dict(zip(batch, place.tolist(), strict=True))
    target = torch.tensor([where[i] for i in mine], device=ids.device)
    return F.cross_entropy(CAPTION_SCALE * image @ model.encode_text(texts).T, target, reduction="none")
