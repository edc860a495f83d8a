"""Two processes train the preference model as one does, before the labels and by them."""

import pytest
import torch
from group import check_alike, run_in

from spo import config
from spo.diffusion.schedule import Schedule
from spo.preference import trainer as spm
from spo.preference.step_aware import StepAwareTask
from spo.types import Budget

pytestmark = pytest.mark.smoke

OPTIMIZER = {"learning_rate": 1e-3}


def test_two_processes_train_the_preference_model_as_one(load, model, words, pairs) -> None:
    settings = config.Preference(
        init="x",
        optimizer=config.Optimizer(**OPTIMIZER),
        steps=3,
        batch_size=4,
        guidance=2.0,
    )

    backbone = load("sd")
    backbone.budget = Budget(samples=4, pairs=2)  # the same calls, however many processes

    def body() -> dict:
        seen: list[dict] = []
        schedule = Schedule.from_config(backbone.scheduler_config, 4)
        setup = StepAwareTask(model, words, backbone, schedule, settings)
        spm.train(setup, pairs, seed=0, on_metrics=lambda m, s: seen.append(m))
        accuracy = spm.evaluate(setup, pairs, [0, 501], seed=0)
        return {
            "metrics": seen,
            "gradients": torch.cat([p.grad.flatten() for p in model.parameters()]),
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "counts": {t: m["accuracy"] for t, m in accuracy.items()},
        }

    (one,), several = run_in(1, body), run_in(2, body)
    check_alike(one, several)
