"""Training state: weights, optimizer, averages of the weights, loss scale and counters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spo import config
from spo.runtime.messages import TransientError
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.training.optimizer import adamw

LEAST_SCALE = 2.0**-10  # of the loss in fp16; gradients that overflow below it are infinite


class TrainingState:
    """All that a resumed run needs, since batches follow from (seed, iteration) alone."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        settings: config.Optimizer,
        ema: float,
        scale_loss: bool,
        sampler_ema: float = 0.0,
        clock: Clock | None = None,
        iterations: int = 1,
    ) -> None:
        """
        Args:
            ema: in [0,1], how far an average of the weights, which they become at the end, reaches back as a
                part of the updates: those after update t count in proportion to t^(1/ema - 1), the power
                function of EDM2 (arXiv 2312.02696, Sec. 3.1); 1: all the same; 0: no average.
            sampler_ema: decay in [0,1) of an average that the weights are within `sampling` instead; 0: none.
            scale_loss: for fp16, whose gradients would underflow: the loss is scaled up, the gradients down
                again; an update whose gradients overflow is skipped and the scale halved.
            clock: of the stage; None: one that starts now.
            iterations: of the whole training, at whose end a linear decay of the learning rate would reach 0.
        """
        self.parameters, self.settings = parameters, settings
        self.ema, self.sampler_ema = ema, sampler_ema
        self.optimizer = adamw(parameters, settings)
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=scale_loss)
        self.average = _copies(parameters) if ema else []
        self.sampler = _copies(parameters) if sampler_ema else []
        self.updates = self.pairs = self.skipped = 0
        self.iteration, self.iterations = 0, iterations
        self.clock = clock or Clock()

    @property
    def learning_rate(self) -> float:
        """The rate of the next update: linear warm-up by updates, then constant, or decayed by iterations.

        The decay is that of DeepSpeed's WarmupDecayLR where an iteration is one update.
        """
        warmup = self.settings.warmup_steps
        factor = min(1.0, (self.updates + 1) / max(warmup, 1))
        if self.settings.decay == "linear":
            factor = min(factor, (self.iterations - self.iteration) / max(self.iterations - warmup, 1))
        return self.settings.learning_rate * factor

    def gradient_norm(self) -> Tensor:
        """Sum the gradients over processes, undo the scale of the loss, and return their norm [], unread."""
        gradients = distributed.sum_gradients(self.parameters)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, norm: Tensor) -> float:
        """Clip the gradients, of norm [], and update weights and averages; returns the learning rate."""
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()  # not by the scaler, which would wait for the device to look for overflow
        self.scaler.update()
        if self.ema:
            _move(self.average, self.parameters, 1 - self.updates / (self.updates + 1 / self.ema))
        if self.sampler_ema:
            _move(self.sampler, self.parameters, 1 - self.sampler_ema)
        self.updates += 1
        return rate

    def skip(self) -> None:
        """Make no update with these gradients; the scale of the loss stays the same."""
        self.scaler.update(self.scaler.get_scale())

    def overflow(self) -> bool:
        """After a norm that is not finite: whether the scale of the loss made some gradients so. Then the
        update is skipped and the scale halved, down to LEAST_SCALE.
        """
        if not self.scaler.is_enabled():
            return False
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters):
            return False
        self.scaler.update()
        self.skipped += 1
        if self.scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(
                f"gradients are not finite at update {self.updates + 1}, whatever the loss is scaled by: "
                "stopped before the update; try backbone.dtype bf16 or fp32"
            )
        return True

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, the weights are the average of `sampler_ema`, if there is one."""
        if not self.sampler_ema:
            yield
            return
        own = _copies(self.parameters)
        _assign(self.parameters, self.sampler)
        try:
            yield
        finally:
            _assign(self.parameters, own)

    def finish(self, iterations: int) -> dict[str, Any]:
        """Give the parameters the average of `ema`; returns what all of the training took, however often it
        was resumed: updates, pairs, `iterations`, seconds and, with a scaled loss, skipped updates."""
        if self.ema:
            _assign(self.parameters, self.average)
        counts = {"updates": self.updates, "pairs": self.pairs, "iterations": iterations}
        skipped = {"skipped_updates": self.skipped} if self.scaler.is_enabled() else {}
        return {**counts, **skipped, "training_seconds": round(self.clock.training_seconds, 1)}

    def save(self, store: CheckpointStore, iteration: int) -> None:
        """Write the state after `iteration` iterations, by the main process."""
        if not distributed.is_main_process():
            return
        state: dict[str, Any] = {
            "weights": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "sampler": self.sampler,
            "updates": self.updates,
            "pairs": self.pairs,
            "clock": self.clock.state(),
        }
        if self.scaler.is_enabled():
            state |= {"scaler": self.scaler.state_dict(), "skipped": self.skipped}
        store.save(iteration, state)

    def resume(self, store: CheckpointStore | None) -> int:
        """Load the newest state that the main process finds; returns the iteration to begin with.

        Raises:
            TransientError: another process cannot read that state yet.
        """
        iteration, state = _newest(store) if store else (0, None)
        if state is None:
            return 0
        _assign(self.parameters, state["weights"])
        _assign(self.average, state["average"])
        _assign(self.sampler, state["sampler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.pairs = state["updates"], state["pairs"]
        self.clock.resume(state["clock"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
            self.skipped = state["skipped"]
        return iteration


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _move(averages: Sequence[Tensor], values: Sequence[Tensor], share: float) -> None:
    """averages += share * (values - averages)."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, share)


def _newest(store: CheckpointStore) -> tuple[int, dict[str, Any] | None]:
    """The state that the main process finds newest; a shared file system may show others an older one."""
    main = distributed.is_main_process()
    iteration, state = (main and store.latest()) or (0, None)
    iteration = distributed.broadcast(iteration)
    if iteration and not main:
        state = store.read(iteration)
    if distributed.any_rank(bool(iteration) and state is None):
        raise TransientError(
            f"{store.folder}: not every process can read checkpoint {iteration} yet; try again"
        )
    return iteration, state
