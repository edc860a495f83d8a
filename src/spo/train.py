"""The one training loop: any method's batches, any backbone's UNet, any number of processes.

All randomness comes from (seed, iteration) inside the method, so weights, optimizer state and the
number of the iteration are the whole state: a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

from spo import config
from spo.checkpoint import CheckpointStore, stop_on_signal
from spo.diffusion.guidance import guided
from spo.types import Backbone, Batch, Method

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
) -> dict[str, Any]:
    """Train `backbone.trainable_parameters()` in place for `method.iterations` iterations.

    Args:
        checkpoints: where to resume from and save to, every `checkpoint_every` iterations.
        on_metrics: called once an iteration with mean metrics and the number of updates so far.

    Returns:
        updates, pairs and UNet samples trained on, and seconds of this process.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the weights are those before the update.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after the state was saved.
    """
    parameters = backbone.trainable_parameters()  # a list: an exhausted iterator would clip nothing
    state = _State(parameters, _adamw(parameters, optimizer))
    first = state.resume(checkpoints)
    started, seen = time.monotonic(), first
    with stop_on_signal() as stopped, tqdm(total=method.iterations, initial=first, unit="iteration") as bar:
        for iteration in range(first, method.iterations):
            batches, collected = method.collect(backbone, iteration)
            metrics = defaultdict[str, list[float]](list)
            for batch in _in_step(batches):
                for name, value in update(backbone, method, batch, state, optimizer).items():
                    metrics[name].append(value)
            means = {name: sum(values) / len(values) for name, values in metrics.items()}
            on_metrics({**collected, **means}, state.updates)
            bar.update()
            bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4f}", pairs=state.pairs, refresh=False)
            seen = iteration + 1
            if checkpoints and (seen % checkpoint_every == 0 or seen == method.iterations or stopped):
                state.save(checkpoints, seen)
            if stopped:
                raise KeyboardInterrupt(f"stopped after iteration {seen}; run it again to go on from there")
    seconds = round(time.monotonic() - started, 1)
    return {"updates": state.updates, "pairs": state.pairs, "iterations": seen, "training_seconds": seconds}


def update(
    backbone: Backbone, method: Method, batch: Batch, state: _State, optimizer: config.Optimizer
) -> dict[str, float]:
    """One optimizer update on one batch; one policy and one reference forward. Without a pair, none."""
    total = _sum_over_processes(batch.weight.sum())
    if total == 0:  # no valid pair anywhere: AdamW would still decay the weights
        return {}
    unconditional = None
    if method.guidance != 1:
        unconditional = backbone.encode_prompts([""]).repeat(len(batch.x_t))
    inputs = (backbone, batch.x_t, batch.timesteps, batch.conditioning, unconditional, method.guidance)
    with torch.no_grad():
        reference = guided(*inputs, reference=True)
    policy = guided(*inputs)
    losses, metrics = method.loss(policy, reference, batch, method.schedule, method.config)
    loss = (losses * batch.weight).sum() / total
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = _synchronise(state.parameters)
    _check_finite(loss, norm, batch)
    if optimizer.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.parameters, optimizer.max_grad_norm)
    rate = optimizer.learning_rate * min(1.0, (state.updates + 1) / max(optimizer.warmup_steps, 1))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.updates += 1
    state.pairs += int(_sum_over_processes((batch.weight > 0).sum()))
    return {**{k: float(v) for k, v in metrics.items()}, "gradient_norm": float(norm), "learning_rate": rate}


class _State:
    """What a checkpoint holds."""

    def __init__(self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.updates = self.pairs = 0

    def save(self, store: CheckpointStore, iteration: int) -> None:
        if not PartialState().is_main_process:
            return
        weights = [p.detach() for p in self.parameters]
        optimizer = self.optimizer.state_dict()
        counts = {"updates": self.updates, "pairs": self.pairs}
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
        return iteration


def _adamw(parameters: list[torch.nn.Parameter], settings: config.Optimizer) -> torch.optim.AdamW:
    if not parameters:
        raise ValueError("nothing to train: the backbone has no trainable parameters; add an adapter first")
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        parameters, settings.learning_rate, betas, settings.epsilon, settings.weight_decay
    )


def _in_step(batches: list[Batch]) -> Iterator[Batch]:
    """As many updates in every process: those with fewer batches repeat their last one at weight 0."""
    count = int(_max_over_processes(torch.tensor(len(batches))))
    for i in range(count):
        if i < len(batches):
            yield batches[i]
        else:
            yield replace(batches[-1], weight=torch.zeros_like(batches[-1].weight))


def _synchronise(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Sum gradients over processes, in one flat tensor; returns the norm of the sum."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    if PartialState().num_processes > 1:
        flat = reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        sizes = [g.numel() for g in gradients]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _check_finite(loss: Tensor, norm: Tensor, batch: Batch) -> None:
    if loss.isfinite() and norm.isfinite():
        return
    timesteps = sorted(set(batch.timesteps.tolist()))
    raise FloatingPointError(
        f"loss {loss.item()}, gradient norm {norm.item()} at timesteps {timesteps[:8]}: "
        "stopped before the update; try a lower learning rate"
    )


def _sum_over_processes(value: Tensor) -> Tensor:
    return reduce(value.float(), "sum") if PartialState().num_processes > 1 else value.float()


def _max_over_processes(value: Tensor) -> Tensor:
    if PartialState().num_processes == 1:
        return value
    from accelerate.utils import gather

    return gather(value.to(PartialState().device).view(1)).max()
