"""Two processes train the preference model as one does, before the labels and by them."""

import pytest
import torch
from group import check_alike, run_in

from spo import config
from spo.diffusion.schedule import Schedule
from spo.preference import trainer as spm
from spo.preference.pretraining import warm_up

OPTIMIZER = {"learning_rate": 1e-3}


def test_two_processes_train_the_preference_model_as_one(load, model, words, pairs) -> None:
    settings = config.Preference(
        init="x",
        optimizer=config.Optimizer(**OPTIMIZER),
        steps=3,
        batch_size=4,
        gradient_accumulation=2,
        guidance=2.0,
    )

    backbone = load("sd")

    def body() -> dict:
        seen: list[dict] = []
        common = (model, words, backbone, Schedule.from_config(backbone.scheduler_config, 4), pairs)
        spm.train(*common, settings, seed=0, on_metrics=lambda m, s: seen.append(m))
        accuracy = spm.evaluate(*common, [0, 501], 2.0, seed=0)
        return {
            "metrics": seen,
            "gradients": torch.cat([p.grad.flatten() for p in model.parameters()]),
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "counts": {t: m["accuracy"] for t, m in accuracy.items()},
        }

    (one,), several = run_in(1, body), run_in(2, body)
    check_alike(one, several)


def test_two_processes_learn_degradations_as_one(load, model, words, pairs) -> None:
    """Five images per update: two and three."""
    settings = config.Degradations(steps=3, batch_size=5, optimizer=OPTIMIZER)
    backbone = load("sd")

    def body() -> dict:
        seen: list[dict] = []
        frozen = ("adaLN", "t_embedder", "logit_scale")  # not trained here: no sum over processes
        learned = [p for n, p in model.named_parameters() if not any(part in n for part in frozen)]

        def note(metrics, step) -> None:
            gradients = [p.grad.flatten().clone() for p in learned] if step == 1 else []
            seen.append({"metrics": metrics, "gradients": torch.cat(gradients) if gradients else None})

        warm_up(model, words, backbone, pairs, settings, seed=0, on_metrics=note)
        return {"seen": seen, "weights": torch.cat([p.detach().flatten() for p in model.parameters()])}

    (one,), several = run_in(1, body), run_in(2, body)
    assert torch.equal(several[0]["weights"], several[1]["weights"])
    for result in several:
        first, alone = result["seen"][0], one["seen"][0]
        assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        error = (first["gradients"] - alone["gradients"]).abs().max() / alone["gradients"].abs().max()
        assert error < 1e-5
        # AdamW makes more of rounding where gradients are small; a wrong share gives .1 and more
        for later, alone in zip(result["seen"], one["seen"], strict=True):
            assert later["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
