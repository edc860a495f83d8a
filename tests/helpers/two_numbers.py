"""A model of two numbers for the training loop, where every step can be worked out by hand."""

import torch
from fake_backbone import Whole

from spo import config
from spo.training import loop
from spo.training.alignment import Alignment
from spo.types import Conditioning, UNetBatch


class Numbers(Whole):
    """Predicts its two numbers, whatever it is shown; the reference predicts zeros."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.values = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.forwards = {"policy": 0, "reference": 0}

    def encode_prompts(self, prompts):
        return Conditioning({"text": torch.zeros(len(prompts), 1)})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        self.forwards["reference" if reference else "policy"] += 1
        values = torch.zeros(2) if reference else self.values
        return values.view(1, 2, 1, 1).expand_as(x_t)

    def trainable_parameters(self):
        return [self.values]


class Squares:
    """loss = (policy - target)^2 of each sample; one batch an iteration."""

    guidance = 1.0

    def __init__(self, iterations: int, weight: float = 1.0, target: float = 3.0) -> None:
        self.iterations, self.weight, self.target = iterations, weight, target

    def collect(self, backbone, iteration):
        x_t = torch.full((2, 2, 1, 1), float(iteration))
        conditioning = backbone.encode_prompts(["", ""])
        batch = UNetBatch(
            x_t=x_t,
            timesteps=torch.zeros(2, dtype=torch.int64),
            conditioning=conditioning,
            weight=torch.full((2,), self.weight),
        )
        return [[batch]], {"collected": float(iteration)}

    def loss(self, policy, reference, batch):
        losses = (policy - reference - self.target).square().flatten(1).sum(1)
        return losses, {"distance": (policy - reference).detach().abs().flatten(1).sum(1)}


def settings(**changes) -> config.Optimizer:
    return config.Optimizer(**{"learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": None} | changes)


def run(model, method, store=None, on_metrics=lambda m, s: None, every=1, scale_loss=False, **changes):
    options = {"checkpoints": store, "checkpoint_every": every, "on_metrics": on_metrics}
    objective = Alignment("align.squares", model, method)
    return loop.fit(objective, settings(**changes), scale_loss=scale_loss, **options)
