"""Training and measuring the preference model.

Everything random follows from (seed, step), so weights, optimizer state and the number of the step
are all a checkpoint needs: a resumed training equals an uninterrupted one bit for bit.

Departures from the official code:
1. `preference.ema` averages the weights over training (0, as published, does not).
2. `preference.trained: heads` leaves the towers as they are (all, as published, trains every weight).
3. `preference.kept` averages the result with the weights that the labels began with (arXiv 2109.01903; 0, as
   published, does not): few and noisy labels would undo what the CLIP knew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spo.config import Optimizer, Preference
from spo.diffusion.noise import shuffled
from spo.diffusion.schedule import Schedule
from spo.preference.loss import preference_loss
from spo.preference.model import StepAwarePreferenceModel, token_ids
from spo.preference.noising import clean_pair, draw, noised_pair
from spo.runtime.signals import stop_on_signal
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.optimizer import adamw
from spo.types import Backbone, LatentPairs

EVALUATION_BATCH = 64  # pairs


def train(
    model: StepAwarePreferenceModel,
    tokenizer: Any,
    backbone: Backbone,
    schedule: Schedule,
    pairs: LatentPairs,
    settings: Preference,
    *,
    seed: int,
    checkpoint: CheckpointStore | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
) -> None:
    """Train `model` in place for settings.steps updates.

    Raises:
        ValueError: there are no pairs.
        FloatingPointError: a loss or gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    check_pairs(pairs)
    if settings.trained == "heads":
        model.train_heads()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], settings.optimizer)
    before = {k: v.detach().clone() for k, v in model.state_dict().items()} if settings.kept else {}
    first, averaged = _resume(model, optimizer, checkpoint)
    schedule = schedule.to(backbone.device)
    model.train()
    if settings.gradient_checkpointing:
        model.checkpoint_gradients()
    bar = tqdm(range(first, settings.steps), "preference model", settings.steps, initial=first, unit="step")
    with stop_on_signal() as stopped:
        for step in bar:
            metrics = _update(model, tokenizer, backbone, schedule, pairs, settings, optimizer, seed, step)
            _average(averaged, model, min(settings.ema, step / (step + 10)))
            on_metrics(metrics, step + 1)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            stop = distributed.any_rank(bool(stopped))
            save = (step + 1) % settings.checkpoint_every == 0 or stop
            if checkpoint and save and distributed.is_main_process():
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(step + 1, {**state, "averaged": averaged})
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to go on from there")
    if settings.ema:
        model.load_state_dict(averaged)
    if settings.kept:
        _average(before, model, settings.kept)
        model.load_state_dict(before)
    model.eval()


def _update(
    model: StepAwarePreferenceModel,
    tokenizer: Any,
    backbone: Backbone,
    schedule: Schedule,
    pairs: LatentPairs,
    settings: Preference,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> dict[str, float]:
    """One optimizer update on the batch of `step`: each process its share, in parts of equal size."""
    count = min(settings.batch_size, len(pairs.captions))
    distributed.check_shards(count, "preference.batch_size")
    chosen = distributed.shard(shuffled(len(pairs.captions), step * count, count, seed))
    weight = pairs.weight[torch.tensor([i for _, i in chosen])].to(backbone.device)
    total = distributed.all_reduce_sum(weight.sum())
    optimizer.zero_grad(set_to_none=True)
    size = -(-count // settings.gradient_accumulation)
    sums = torch.zeros(3, device=backbone.device)  # the loss, right and clear labels
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        score_0, score_1, label_0, timesteps, captions = _scores(
            model, tokenizer, backbone, schedule, pairs, settings, seed, part
        )
        loss = preference_loss(score_0, score_1, label_0, weight[start : start + size], total)
        if not loss.isfinite():
            where = _where(torch.stack([score_0, score_1]), timesteps, captions)
            raise FloatingPointError(_not_finite(f"loss {loss.item()} at step {step}{where}"))
        loss.backward()
        decided = label_0 != 0.5
        right = ((score_0 > score_1) == (label_0 > 0.5))[decided]
        sums += torch.stack([loss.detach(), right.sum().float(), decided.sum().float()])
    norm = take_step(optimizer, settings.optimizer, step, key="preference")
    mean_loss, right, clear = distributed.all_reduce_sum(sums)
    return {
        "loss": mean_loss.item(),
        "accuracy": (right / clear).item() if clear > 0 else 0.5,
        "gradient_norm": norm.item(),
    }


def take_step(
    optimizer: torch.optim.Optimizer, settings: Optimizer, step: int, *, key: str, share: float = 1.0
) -> Tensor:
    """Update by the gradients of all processes, clipped, at `share` of the learning rate after its warm-up.

    Returns:
        The norm of the gradients before they were clipped.

    Raises:
        FloatingPointError: it is not finite; nothing was updated. `key` names the section of params.yaml.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
    if not norm.isfinite():
        raise FloatingPointError(_not_finite(f"gradient norm {norm.item()} at step {step}", key))
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * warm * share
    optimizer.step()
    return norm


def check_pairs(pairs: LatentPairs) -> None:
    """
    Raises:
        ValueError: there are none.
    """
    if not len(pairs.captions):
        raise ValueError("preference: there are no training pairs; look at outputs/pairs/summary.json")


def _scores(
    model: StepAwarePreferenceModel,
    tokenizer: Any,
    backbone: Backbone,
    schedule: Schedule,
    pairs: LatentPairs,
    settings: Preference,
    seed: int,
    chosen: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Scores [B] of both images of pairs (epoch, pair), and their label_0, timesteps and captions."""
    indices = torch.tensor([i for _, i in chosen])
    captions = [pairs.captions[i] for i in indices.tolist()]
    timesteps, noise = draw(seed, [f"spm {e} {i}" for e, i in chosen], schedule, backbone)
    if settings.noised:
        told = backbone.encode_prompts(captions)
        images = noised_pair(
            backbone, schedule, pairs.read(indices), timesteps, noise, told, settings.guidance, captions
        )
    else:
        images = clean_pair(backbone, pairs.read(indices), captions)
        timesteps = torch.zeros_like(timesteps)
    text = model.encode_text(token_ids(tokenizer, captions, model))
    scores = model.score_features(torch.cat(images), text.repeat(2, 1), timesteps.repeat(2))
    score_0, score_1 = scores.chunk(2)
    return score_0, score_1, pairs.label_0[indices].to(scores.device), timesteps, captions


def _not_finite(what: str, key: str = "preference") -> str:
    return f"{key}: {what}: stopped before the update; try a lower {key}.optimizer.learning_rate"


def _where(scores: Tensor, timesteps: Tensor, captions: Sequence[str]) -> str:
    """Timestep and prompt of the first pair [2,B] whose scores are not finite; nothing if all are."""
    bad = (~scores.isfinite()).any(0).nonzero().flatten().tolist()
    return f", timestep {int(timesteps[bad[0]])}, prompt {captions[bad[0]][:100]!r}" if bad else ""


@torch.no_grad()
def evaluate(
    model: StepAwarePreferenceModel,
    tokenizer: Any,
    backbone: Backbone,
    schedule: Schedule,
    pairs: LatentPairs,
    timesteps: Sequence[int],
    guidance: float,
    *,
    seed: int,
) -> dict[int, dict[str, float]]:
    """Share of clear labels (no ties) that the model agrees with, at each timestep: {t: {accuracy, n}}.

    The noise belongs to the pair and the timestep, so models are compared on the same pictures.

    Raises:
        ValueError: an image or a score is not finite.
    """
    schedule, model = schedule.to(backbone.device), model.eval()
    decided = (pairs.label_0 != 0.5).nonzero().flatten()
    parts = decided.split(EVALUATION_BATCH)
    rank, n = distributed.state().process_index, distributed.count()
    report: dict[int, dict[str, float]] = {}
    with tqdm(total=len(parts) * len(timesteps), desc="preference accuracy", unit="batch") as bar:
        for t in timesteps:
            right = torch.zeros((), dtype=torch.int64, device=backbone.device)
            for indices in parts[rank::n]:
                captions = [pairs.captions[i] for i in indices.tolist()]
                keys = [f"evaluation {i}" for i in indices.tolist()]
                at, noise = draw(seed, keys, schedule, backbone, t)
                told = backbone.encode_prompts(captions)
                images = noised_pair(
                    backbone, schedule, pairs.read(indices), at, noise, told, guidance, captions
                )
                text = model.encode_text(token_ids(tokenizer, captions, model))
                scores = [model.score_features(x, text, at) for x in images]
                if where := _where(torch.stack(scores), at, captions):
                    raise ValueError(f"preference model: a score is not finite{where}; train it again")
                first_wins = pairs.label_0[indices].to(scores[0].device) > 0.5
                right += ((scores[0] > scores[1]) == first_wins).sum()
                bar.update(n)
            accuracy = int(distributed.all_reduce_sum(right)) / max(len(decided), 1)
            report[t] = {"accuracy": accuracy, "n": len(decided)}
    return report


def _resume(
    model: StepAwarePreferenceModel, optimizer: torch.optim.Optimizer, store: CheckpointStore | None
) -> tuple[int, dict[str, Tensor]]:
    """The step to begin with, and the average of the weights so far."""
    found = store.latest() if store else None
    if found is None:
        return 0, {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, state = found
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step, {k: v.to(model.state_dict()[k].device) for k, v in state["averaged"].items()}


def _average(averaged: dict[str, Tensor], model: StepAwarePreferenceModel, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * weights, in place."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            averaged[name].lerp_(value.detach(), 1 - decay)
        else:
            averaged[name].copy_(value)
