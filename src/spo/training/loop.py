"""The one training loop: any method's batches, any backbone's UNet, any number of processes.

All randomness comes from (seed, iteration) inside the method, so weights, optimizer state and the
number of the iteration are the whole state: a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spo import config
from spo.diffusion import finite
from spo.diffusion.guidance import guided, is_guided
from spo.runtime.signals import stop_on_signal
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.optimizer import adamw
from spo.types import Backbone, Batch, Method

LEAST_SCALE = 2.0**-10  # of the loss; gradients that overflow below it are infinite

Log = Callable[[Mapping[str, float], int], None]


def run(
    backbone: Backbone,
    method: Method,
    optimizer: config.Optimizer,
    *,
    seed: int,
    checkpoints: CheckpointStore | None,
    checkpoint_every: int,
    on_metrics: Log,
    watch: Callable[[int, Mapping[str, float], int], None] | None = None,
    scale_loss: bool = False,
) -> dict[str, Any]:
    """Train `backbone.trainable_parameters()` in place for `method.iterations` iterations.

    Args:
        checkpoints: where to resume from and save to, every `checkpoint_every` iterations.
        on_metrics: called once an iteration with mean metrics and the number of updates so far.
        watch: called before training and after each iteration, before its weights are kept, with the
            number of iterations, mean metrics and updates; an error of it ends training.
        scale_loss: for fp16, whose gradients would underflow: the loss is scaled up, the gradients down
            again; an update whose gradients overflow is left out and the scale halved.

    Returns:
        updates, pairs trained on, iterations, and seconds of this process; with scale_loss, skipped_updates.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    parameters = backbone.trainable_parameters()  # a list: an exhausted iterator would clip nothing
    if not parameters:
        raise ValueError("nothing to train: the backbone has no trainable parameters; add an adapter first")
    scaler = torch.amp.GradScaler(backbone.device.type, enabled=scale_loss)
    state = _State(parameters, adamw(parameters, optimizer), scaler)
    first = state.resume(checkpoints)
    started, seen = time.monotonic(), first
    with stop_on_signal() as stopped, tqdm(total=method.iterations, initial=first, unit="iteration") as bar:
        if watch and first == 0:
            watch(0, {}, 0)
        for iteration in range(first, method.iterations):
            batches, collected = method.collect(backbone, iteration)
            metrics = defaultdict[str, list[float]](list)
            for parts in _in_step(_updates(batches)):
                for name, value in update(backbone, method, parts, state, optimizer).items():
                    metrics[name].append(value)
            means = {name: sum(values) / len(values) for name, values in metrics.items()}
            on_metrics({**collected, **means}, state.updates)
            bar.update()
            bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4f}", pairs=state.pairs, refresh=False)
            seen = iteration + 1
            if watch:
                watch(seen, {**collected, **means}, state.updates)
            stop = distributed.any_rank(bool(stopped))
            if checkpoints and (seen % checkpoint_every == 0 or seen == method.iterations or stop):
                state.save(checkpoints, seen)
            if stop:
                raise KeyboardInterrupt(f"stopped after iteration {seen}; run it again to go on from there")
    seconds = round(time.monotonic() - started, 1)
    counts = {"skipped_updates": state.skipped} if scale_loss else {}
    return {
        "updates": state.updates,
        "pairs": state.pairs,
        "iterations": seen,
        **counts,
        "training_seconds": seconds,
    }


def update(
    backbone: Backbone, method: Method, parts: Sequence[Batch], state: _State, optimizer: config.Optimizer
) -> dict[str, float]:
    """One optimizer update on one batch, whole or in parts; one policy and one reference forward a part.

    Without a pair in any process, none.
    """
    total = distributed.all_reduce_sum(torch.stack([batch.weight.sum() for batch in parts]).sum().float())
    if total == 0:  # no valid pair anywhere: AdamW would still decay the weights
        return {}
    state.optimizer.zero_grad(set_to_none=True)
    metrics = defaultdict[str, float](float)
    for batch in parts:
        losses, measured = _forward(backbone, method, batch, state.updates)
        loss = (losses * batch.weight).sum() / total
        state.scaler.scale(loss).backward()
        share = float(batch.weight.sum() / total)
        for name, value in measured.items():
            metrics[name] += share * float(value)
        _check_finite("loss", losses.detach() * batch.weight, [batch], state.updates)
    gradients = distributed.sum_gradients(state.parameters)
    if state.overflow():
        return {}
    norm = torch.nn.utils.get_total_norm(gradients)
    _check_finite("gradient norm", norm, parts, state.updates)
    if optimizer.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.parameters, optimizer.max_grad_norm)
    rate = optimizer.learning_rate * min(1.0, (state.updates + 1) / max(optimizer.warmup_steps, 1))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.updates += 1
    state.pairs += int(distributed.all_reduce_sum(torch.stack([(b.weight > 0).sum() for b in parts]).sum()))
    return {**_over_processes(metrics), "gradient_norm": float(norm), "learning_rate": rate}


def _forward(
    backbone: Backbone, method: Method, batch: Batch, updates: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The method's loss and metrics of both models' outputs.

    Raises:
        FloatingPointError: the outputs are not finite. Losses do not always show it: a clamped ratio, or
            logsigmoid, makes infinity finite.
    """
    unconditional = None
    if is_guided(method.guidance):
        unconditional = backbone.encode_prompts([""]).repeat(len(batch.x_t))
    inputs = (backbone, batch.x_t, batch.timesteps, batch.conditioning, unconditional, method.guidance)
    with torch.no_grad():
        reference = guided(*inputs, reference=True)
    policy = guided(*inputs)
    _check_outputs(policy.detach(), reference, batch, updates)
    return method.loss(policy, reference, batch, method.schedule, method.config)


class _State:
    """What a checkpoint holds."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.parameters, self.optimizer, self.scaler = parameters, optimizer, scaler
        self.updates = self.pairs = self.skipped = 0

    def overflow(self) -> bool:
        """Unscale the gradients, which are the same in all processes; whether that left some not finite. Then
        the update is left out and the scale halved.

        Raises:
            FloatingPointError: no scale helps.
        """
        if not self.scaler.is_enabled():
            return False
        self.scaler.unscale_(self.optimizer)
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters):
            return False
        self.scaler.step(self.optimizer)  # does nothing but note it
        self.scaler.update()
        self.skipped += 1
        if self.scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(
                f"gradients are not finite at update {self.updates + 1}, whatever the loss is scaled by: "
                "stopped before the update; try backbone.dtype bf16 or fp32"
            )
        return True

    def save(self, store: CheckpointStore, iteration: int) -> None:
        if not distributed.is_main_process():
            return
        weights = [p.detach() for p in self.parameters]
        optimizer = self.optimizer.state_dict()
        counts: dict[str, Any] = {"updates": self.updates, "pairs": self.pairs}
        if self.scaler.is_enabled():
            counts |= {"scaler": self.scaler.state_dict(), "skipped": self.skipped}
        store.save(iteration, {"weights": weights, "optimizer": optimizer, **counts})

    def resume(self, store: CheckpointStore | None) -> int:
        """The iteration to begin with."""
        found = store.latest() if store else None
        if found is None:
            return 0
        iteration, state = found
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.pairs = state["updates"], state["pairs"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
            self.skipped = state["skipped"]
        return iteration


def _updates(batches: list[Batch]) -> list[list[Batch]]:
    """The batches of each optimizer update."""
    updates: list[list[Batch]] = [[]]
    for batch in batches:
        updates[-1].append(batch)
        if not batch.accumulate:
            updates.append([])
    return [parts for parts in updates if parts]


def _in_step(updates: list[list[Batch]]) -> Iterator[list[Batch]]:
    """As many updates in every process: those with fewer of them repeat their last batch at weight 0."""
    device = updates[0][0].x_t.device
    count = int(distributed.gather(torch.tensor([len(updates)], device=device)).max())
    for i in range(count):
        if i < len(updates):
            yield updates[i]
        else:
            last = updates[-1][-1]
            yield [replace(last, weight=torch.zeros_like(last.weight))]


def _over_processes(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each process has its pairs' part of the weighted means; all have the same metrics in the same order."""
    if distributed.count() == 1:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), device=distributed.state().device)
    return dict(zip(metrics, distributed.all_reduce_sum(values).tolist(), strict=True))


def _check_outputs(policy: Tensor, reference: Tensor, batch: Batch, updates: int) -> None:
    check = finite.FiniteCheck()
    prompts = [*batch.prompts] * (2 if len(policy) == 2 * len(batch.prompts) else 1)  # winners, then losers
    check.note(finite.X_T, batch.x_t, prompts, batch.timesteps)
    check.note_text(batch.conditioning, prompts)
    check.note(finite.REFERENCE, reference, prompts, batch.timesteps)
    check.note(finite.UNET, policy, prompts, batch.timesteps)
    if reason := check.failure():
        raise FloatingPointError(f"update {updates + 1}: {reason}; nothing was updated")


def _check_finite(name: str, value: Tensor, parts: Sequence[Batch], updates: int) -> None:
    """`value` is one number, or one for each pair of a batch: then the first bad one is named."""
    bad = (~value.isfinite()).flatten().nonzero().flatten().tolist()
    if not bad:
        return
    timesteps = [t for batch in parts for t in batch.timesteps.tolist()]
    prompts = [p for batch in parts for p in batch.prompts]
    if value.ndim and len(prompts) == len(value):
        where = f"timestep {timesteps[bad[0]]}, prompt {prompts[bad[0]][:80]!r}"
    else:
        several = [prompt[:80] for prompt in dict.fromkeys(prompts)][:4]
        where = f"timesteps {sorted(set(timesteps))[:8]}, prompts {several}"
    raise FloatingPointError(
        f"{name} {value.flatten()[bad[0]].item()} at update {updates + 1}, {where}: "
        "stopped before the update; try a lower learning rate"
    )
