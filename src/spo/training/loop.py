"""The one training loop: any objective's batches, any number of processes.

All randomness comes from (seed, iteration) inside the objective, so weights, optimizer state and the
number of the iteration are the whole state: a resumed run equals an uninterrupted one bit for bit.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from spo import config
from spo.diffusion import finite
from spo.runtime.signals import stop_on_signal
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.training.speed import fast
from spo.training.state import TrainingState
from spo.types import FIRST_UPDATE, Batch, Mean

Log = Callable[[Mapping[str, float], int], None]
BatchT = TypeVar("BatchT", bound=Batch)


class Objective(Protocol[BatchT]):
    """What `fit` trains: some parameters, their batches and a loss."""

    name: str  # its section of params.yaml, for messages
    iterations: int

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, all on one device."""
        ...

    def collect(self, iteration: int) -> tuple[list[list[BatchT]], dict[str, float]]:
        """The updates of one iteration, each in parts whose gradients are accumulated, and metrics.

        A function of the weights, the seed and `iteration` alone. Every process collects its own share.
        """
        ...

    def loss(self, batch: BatchT, check: finite.FiniteCheck) -> tuple[Tensor, dict[str, Mean]]:
        """The losses [P] of a batch, and metrics without gradients.

        Args:
            check: notes what must be finite and the losses do not show. It is read
                once an update, with all else.
        """
        ...


def fit(
    objective: Objective,
    optimizer: config.Optimizer,
    *,
    checkpoints: CheckpointStore | None,
    checkpoint_every: int,
    on_metrics: Log,
    on_resume: Callable[[int], None] = lambda iteration: None,
    watch: Callable[[int, Mapping[str, float]], bool | None] | None = None,
    ended: Callable[[], bool] = lambda: False,
    clock: Clock | None = None,
    ema: float = 0.0,
    scale_loss: bool = False,
    sampler_ema: float = 0.0,
) -> dict[str, Any]:
    """Train the objective's parameters in place for `objective.iterations` iterations.

    Args:
        checkpoints: where to resume from and save to, every `checkpoint_every` iterations.
        on_metrics: called after each iteration with its mean metrics and the number of iterations so far.
        on_resume: called once with the number of iterations that are done already. Later
            iterations were logged by a killed process, and are computed again.
        watch: called before training and after each iteration with the number of iterations and its metrics;
            where it is true, the state is saved at once. An error in it ends training.
        ended: asked before each iteration whether training ends there, the same in all processes.
        clock, ema, scale_loss, sampler_ema: as of TrainingState.

    Returns:
        As `TrainingState.finish`.

    Raises:
        ValueError: there is nothing to train, or no iteration had a valid pair.
        FloatingPointError: a loss or gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    parameters, total = objective.parameters(), objective.iterations
    if not parameters:
        raise ValueError(f"{objective.name}: nothing to train: the model has no trainable parameters")
    state = TrainingState(parameters, optimizer, ema, scale_loss, sampler_ema, clock, total)
    first = state.resume(checkpoints)
    on_resume(first)
    bar = tqdm(total=total, initial=first, desc=objective.name, unit="iteration")
    with stop_on_signal() as stopped, bar:
        if watch and first == 0:
            watch(0, {})
        done = first
        while done < total and not ended():
            done += 1
            with state.clock.training(), fast(parameters[0].device):
                metrics = _iteration(objective, done - 1, state)
            on_metrics(metrics, done)
            bar.update()
            bar.set_postfix(loss=f"{metrics.get('loss', float('nan')):.4f}", pairs=state.pairs, refresh=False)
            save = watch is not None and watch(done, metrics)
            stop = distributed.any_rank(bool(stopped))
            if checkpoints and (save or done % checkpoint_every == 0 or done == total or stop):
                state.save(checkpoints, done)
            if stop:
                raise KeyboardInterrupt(f"stopped after iteration {done}; run it again to resume from there")
    if not state.updates:
        overflow = "every gradient overflowed in fp16; set backbone.dtype bf16 or fp32"
        why = overflow if state.skipped else f"no pair was valid; lower {objective.name}.threshold"
        raise ValueError(f"{objective.name}: {done} iterations without an update, since {why}")
    return state.finish(done)


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
    check, metrics = finite.FiniteCheck(), []
    total = distributed.all_reduce_sum(torch.stack([batch.weight.sum() for batch in parts]).sum().float())
    state.optimizer.zero_grad(set_to_none=True)
    for batch in parts:
        losses, measured = objective.loss(batch, check)
        weighted = losses * batch.weight
        state.scaler.scale(weighted.sum() / total.where(total != 0, 1.0)).backward()
        check.note(finite.LOSS, weighted.detach(), batch.prompts, batch.timesteps)
        metrics.append({"loss": Mean(losses.detach(), batch.weight), **measured})
    norm = state.gradient_norm()
    read = _read(parts, metrics, [total, norm, *check.flags()])
    weight, gradient_norm, *good = read.local
    if weight == 0:  # no valid pair anywhere: AdamW would still decay the weights
        state.skip()
        return {}
    if not all(good):
        reason = f"update {state.updates + 1}: {check.failure()}; nothing was updated"
        raise FloatingPointError(f"{objective.name}: {reason}")
    if not math.isfinite(gradient_norm):
        if state.overflow():
            return {}
        at = f"update {state.updates + 1}, {_where(parts)}"
        raise FloatingPointError(
            f"{objective.name}: gradient norm {gradient_norm} at {at}: "
            f"stopped before the update; try a lower {objective.name}.optimizer.learning_rate"
        )
    rate = state.step(norm)
    state.pairs += read.pairs
    return {**read.means, "gradient_norm": gradient_norm, "learning_rate": rate}


class _Read(NamedTuple):
    """Metrics of an update, read from the device."""

    pairs: int  # with weight, in all processes
    means: dict[str, float]  # of the metrics that have weight, over parts and processes
    local: list[float]  # the numbers of this process alone


def _read(parts: Sequence[Batch], metrics: Sequence[Mapping[str, Mean]], numbers: Sequence[Tensor]) -> _Read:
    pairs = torch.stack([(batch.weight > 0).sum() for batch in parts]).sum().float()
    sums = torch.stack([torch.stack([_sums(mean) for mean in row.values()]) for row in metrics]).sum(0)
    # all processes have the same metrics in the same order
    shared = distributed.all_reduce_sum(torch.cat([pairs.view(1), sums.flatten()]))
    first = [name for name in metrics[0] if name.startswith(FIRST_UPDATE)]
    largest = _largest([row[name] for name in first] for row in metrics) if first else shared[:0]
    read = torch.cat([shared, largest, torch.stack([number.float() for number in numbers])]).tolist()
    count, local = int(read[0]), read[len(shared) + len(first) :]
    pairwise = zip(metrics[0], read[1 : len(shared) : 2], read[2 : len(shared) : 2], strict=True)
    means = {name: total / weight for name, total, weight in pairwise if weight}
    return _Read(count, means | dict(zip(first, read[len(shared) :], strict=False)), local)


def _sums(mean: Mean) -> Tensor:
    return torch.stack([(mean.values * mean.weights).sum(), mean.weights.sum()]).float()


def _largest(parts: Iterable[Sequence[Mean]]) -> Tensor:
    """The largest value with weight of each metric [n], over parts and processes."""
    values = [torch.stack([mean.values.where(mean.weights > 0, 0).amax() for mean in row]) for row in parts]
    return distributed.gather(torch.stack(values)).amax(0).float()


def _in_step(updates: list[list[Batch]]) -> Iterator[list[Batch]]:
    """Make all processes do as many updates: one with fewer repeats its last batch at weight 0."""
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


def _where(parts: Sequence[Batch]) -> str:
    """The first timesteps and prompts of an update."""
    timesteps = sorted({round(t, 1) for batch in parts for t in batch.timesteps.tolist()})
    prompts = dict.fromkeys(prompt[:80] for batch in parts for prompt in batch.prompts)
    return f"timesteps {timesteps[:8]}, prompts {[*prompts][:4]}"
