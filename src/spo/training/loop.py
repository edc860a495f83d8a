"""The one training loop: any objective's batches, any number of processes.

All randomness comes from (seed, iteration) inside the objective, so weights, optimizer state and the
number of the iteration are the whole state: a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from spo import config
from spo.diffusion.finite import FiniteCheck
from spo.runtime.signals import stop_on_signal
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.training.speed import fast
from spo.training.state import TrainingState
from spo.types import Batch, Mean, Objective

Log = Callable[[Mapping[str, float], int], None]


def fit(
    objective: Objective,
    optimizer: config.Optimizer,
    *,
    checkpoints: CheckpointStore | None,
    checkpoint_every: int,
    on_metrics: Log,
    on_resume: Callable[[int], None] = lambda iteration: None,
    watch: Callable[[int, Mapping[str, float]], bool | None] | None = None,
    clock: Clock | None = None,
    ema: float = 0.0,
    scale_loss: bool = False,
    sampler_ema: float = 0.0,
) -> dict[str, Any]:
    """Train the objective's parameters in place for `objective.iterations` iterations.

    Args:
        checkpoints: where to resume from and save to, every `checkpoint_every` iterations.
        on_metrics: called after each iteration with mean metrics, among them the number of updates so far,
            and the number of iterations.
        on_resume: called once with the number of iterations that are done already; what was noted of later
            ones belongs to a process that was killed, and is computed again.
        watch: called before training and after each iteration, before its weights are saved, with the
            number of iterations and mean metrics; where it is true they are saved at once. An error of it
            ends training.
        clock: of the stage; goes on from where the resumed training was saved.
        ema, scale_loss: as of TrainingState.
        sampler_ema: batches are collected by an average of the weights with this decay; 0: by the weights.

    Returns:
        updates, pairs trained on, iterations, and seconds in iterations, all of the whole training, however
        often it was resumed; with scale_loss, skipped_updates.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    parameters = objective.parameters()
    if not parameters:
        raise ValueError(f"{objective.name}: nothing to train: the model has no trainable parameters")
    state = TrainingState(parameters, optimizer, ema, scale_loss, sampler_ema, clock, objective.iterations)
    first = state.resume(checkpoints)
    on_resume(first)
    done, total = first, objective.iterations
    bar = tqdm(total=total, initial=first, desc=objective.name, unit="iteration")
    with stop_on_signal() as stopped, bar:
        if watch and first == 0:
            watch(0, {})
        for iteration in range(first, total):
            with state.clock.training(), fast(parameters[0].device):
                metrics = _iteration(objective, iteration, state)
            done = iteration + 1
            on_metrics(metrics, done)
            bar.update()
            bar.set_postfix(loss=f"{metrics.get('loss', float('nan')):.4f}", pairs=state.pairs, refresh=False)
            kept = watch is not None and watch(done, metrics)
            stop = distributed.any_rank(bool(stopped))
            if checkpoints and (kept or done % checkpoint_every == 0 or done == total or stop):
                state.save(checkpoints, done)
            if stop:
                raise KeyboardInterrupt(f"stopped after iteration {done}; run it again to resume from there")
    state.finish()
    counts = {"skipped_updates": state.skipped} if scale_loss else {}
    return {
        "updates": state.updates,
        "pairs": state.pairs,
        "iterations": done,
        **counts,
        "training_seconds": round(state.clock.training_seconds, 1),
    }


def _iteration(objective: Objective, iteration: int, state: TrainingState) -> dict[str, float]:
    """All updates of one iteration; returns what was collected, means of the updates' metrics, and how many
    updates there have been.
    """
    state.iteration = iteration
    state.optimizer.zero_grad(set_to_none=True)  # what is collected needs their memory
    with state.sampling():
        updates, collected = objective.collect(iteration)
    values = defaultdict[str, list[float]](list)
    for parts in _in_step(updates):
        for name, value in update(objective, parts, state).items():
            values[name].append(value)
    means = {name: sum(v) / len(v) for name, v in values.items()}
    return {"updates": state.updates, **collected, **means}


def update(objective: Objective, parts: Sequence[Batch], state: TrainingState) -> dict[str, float]:
    """One optimizer update on one batch, whole or in parts whose gradients are accumulated.

    Without a pair in any process, or if the gradients overflow in fp16, nothing is updated or measured. All
    that Python must know is read from the device at once, so that it waits once.
    """
    check, losses_of, metrics = FiniteCheck(), [], []
    total = distributed.all_reduce_sum(torch.stack([batch.weight.sum() for batch in parts]).sum().float())
    state.optimizer.zero_grad(set_to_none=True)
    for batch in parts:
        losses, measured = objective.loss(batch, check)
        weighted = losses * batch.weight
        state.scaler.scale(weighted.sum() / total.where(total != 0, 1.0)).backward()
        losses_of.append(weighted.detach())
        metrics.append({"loss": Mean(losses.detach(), batch.weight), **measured})
    norm = state.gradient_norm()
    read = _read(parts, metrics, [total, norm, *check.flags(), *(x.isfinite().all() for x in losses_of)])
    weight, gradient_norm, *finite = read.local
    if weight == 0:  # no valid pair anywhere: AdamW would still decay the weights
        state.leave()
        return {}
    if not all(finite):
        _stop(objective.name, check, losses_of, parts, state.updates)
    if not math.isfinite(gradient_norm):
        if state.overflow():
            return {}
        _check_finite(objective.name, "gradient norm", norm, parts, state.updates)
    rate = state.step(norm)
    state.pairs += read.pairs
    return {**read.means, "gradient_norm": gradient_norm, "learning_rate": rate}


class _Read(NamedTuple):
    """Numbers of an update, read from the device."""

    pairs: int  # with weight, in all processes
    means: dict[str, float]  # of the metrics that have weight, over parts and processes
    local: list[float]  # the numbers of this process alone


def _read(parts: Sequence[Batch], metrics: Sequence[Mapping[str, Mean]], numbers: Sequence[Tensor]) -> _Read:
    pairs = torch.stack([(batch.weight > 0).sum() for batch in parts]).sum().float()
    sums = torch.stack([torch.stack([_sums(mean) for mean in row.values()]) for row in metrics]).sum(0)
    # all processes have the same metrics in the same order
    shared = distributed.all_reduce_sum(torch.cat([pairs.view(1), sums.flatten()]))
    read = torch.cat([shared, torch.stack([number.float() for number in numbers])]).tolist()
    count, local = int(read[0]), read[len(shared) :]
    pairwise = zip(metrics[0], read[1 : len(shared) : 2], read[2 : len(shared) : 2], strict=True)
    return _Read(count, {name: total / weight for name, total, weight in pairwise if weight}, local)


def _sums(mean: Mean) -> Tensor:
    return torch.stack([(mean.values * mean.weights).sum(), mean.weights.sum()]).float()


def _in_step(updates: list[list[Batch]]) -> Iterator[list[Batch]]:
    """As many updates in every process: those with fewer of them repeat their last batch at weight 0."""
    count = len(updates)
    if distributed.count() > 1:
        weight = updates[0][0].weight
        count = int(distributed.gather(torch.tensor([count], device=weight.device)).max())
    for i in range(count):
        if i < len(updates):
            yield updates[i]
        else:
            last = updates[-1][-1]
            yield [replace(last, weight=torch.zeros_like(last.weight))]


def _stop(
    name: str, check: FiniteCheck, losses: Sequence[Tensor], parts: Sequence[Batch], updates: int
) -> None:
    """
    Raises:
        FloatingPointError: with the first of what the update found not finite.
    """
    reason = check.failure()
    if reason is not None:
        raise FloatingPointError(f"{name}: update {updates + 1}: {reason}; nothing was updated")
    for batch, values in zip(parts, losses, strict=True):
        _check_finite(name, "loss", values, [batch], updates)


def _check_finite(name: str, what: str, value: Tensor, parts: Sequence[Batch], updates: int) -> None:
    """`value` is one number, or one for each pair of a batch: then the first bad one is named.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    if bool(value.isfinite().all()):
        return
    bad = (~value.isfinite()).flatten().nonzero().flatten().tolist()
    timesteps = [t for batch in parts for t in batch.timesteps.tolist()]
    prompts = [p for batch in parts for p in batch.prompts]
    if value.ndim and len(prompts) == len(value):
        where = f"timestep {timesteps[bad[0]]}, prompt {prompts[bad[0]][:80]!r}"
    else:
        several = [prompt[:80] for prompt in dict.fromkeys(prompts)][:4]
        where = f"timesteps {sorted(set(timesteps))[:8]}, prompts {several}"
    raise FloatingPointError(
        f"{name}: {what} {value.flatten()[bad[0]].item()} at update {updates + 1}, {where}: "
        f"stopped before the update; try a lower {name}.optimizer.learning_rate"
    )
