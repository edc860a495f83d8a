"""How often training and generation wait for the GPU: never in a loop over denoising steps or layers.

Each wait lets the device run dry until Python has sent the next work. The numbers below are all that is
allowed, by function, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from waits import DEVICE, counted

from spo import config
from spo.diffusion import ddim
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.latent_training import LatentTask
from spo.preference.model import ClipRewardModel
from spo.preference.step_aware import StepAwareTask
from spo.preference.trainer import LabelObjective
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.state import TrainingState
from spo.types import Budget
from spo.validation import generation

pytestmark = pytest.mark.smoke

PROMPTS = ["a circle", "a blue star on sand"]
OPTIMIZER = config.Optimizer(learning_rate=1e-4)
LORA = config.Lora(rank=2, alpha=2)
UPDATE: dict[str, Any] = {"optimizer": OPTIMIZER, "batch_size": 4}


@pytest.fixture
def base(request, load):
    """A backbone on the device."""
    backbone = load(getattr(request, "param", "sd"))
    backbone.pipeline.to(DEVICE)
    backbone.budget = Budget(pairs=2)
    return backbone


def stepwise(backbone, words, model, reward_model: str, steps: int):
    """SPO, or LPO with `latent`, of two prompts and two candidates; the first step is not scored."""
    common: dict[str, Any] = {
        "num_inference_steps": steps,
        "divert_start_step": 1,
        "candidates": 2,
        "guidance": 2.0,
    }
    common |= {"prompts_per_iteration": 2, "iterations": 1, "lora": LORA, **UPDATE}
    schedule = Schedule.from_config(backbone.scheduler_config, steps)
    if reward_model == "latent":
        latent = LatentPreferenceModel(backbone.feature_model(), 2.0).to(DEVICE)
        method = LpoMethod(config.Lpo(**common), schedule, LatentRewardModel(latent, "candidate"), PROMPTS, 0)
    else:
        clip = ClipRewardModel(model.to(DEVICE), words)
        method = SpoMethod(config.Spo(**common), schedule, clip, PROMPTS, 0)
    method.schedule = method.rollout.schedule = schedule.to(DEVICE)  # the steps were chosen on the CPU
    return method


def waited(monkeypatch, run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """The result, and the waits."""
    with counted(monkeypatch) as found:
        result = run()
    return result, found


@pytest.mark.parametrize(
    ("base", "reward_model"),
    [("sd", "step-aware"), ("sd", "latent"), ("sdxl", "step-aware")],
    indirect=["base"],
)
def test_a_rollout_waits_as_often_whatever_its_steps(
    base, words, model, reward_model: str, monkeypatch
) -> None:
    for steps in (3, 5):
        method = stepwise(base, words, model, reward_model, steps)
        _, found = waited(monkeypatch, lambda method=method: method.collect(base, 0))
        assert found == {
            "diffusion/finite.py failure": 1,  # all values of the rollout, after its last step
            "methods/stepwise/method.py _updates": 2,  # which pairs are valid: how many, then which
            "methods/stepwise/method.py _metrics": 3,  # means by step: validity, scores, timesteps
        }


# whether there is a pair, whether all is finite, the norm of the gradients and the metrics, in one copy
ONCE_AN_UPDATE = {"training/loop.py _read": 1}


def test_updates_of_spo(base, words, model, monkeypatch) -> None:
    """An update in two parts, forward and backward through every layer, and AdamW."""
    base.add_lora(LORA, 0)
    method = stepwise(base, words, model, "step-aware", 4)
    ((parts, *_), _), _ = waited(monkeypatch, lambda: method.collect(base, 0))
    assert len(parts) == 2
    assert_one_wait(monkeypatch, Alignment("align.spo", base, method), parts)


def assert_one_wait(monkeypatch, objective: Any, parts: Any) -> None:
    """An update waits once, with a scaled loss too."""
    for scale_loss in (False, True):
        _, found = waited(monkeypatch, lambda scale_loss=scale_loss: update(objective, parts, scale_loss))
        assert found == ONCE_AN_UPDATE


def update(objective: Any, parts: Any, scale_loss: bool) -> None:
    state = TrainingState(objective.parameters(), OPTIMIZER, 0.0, scale_loss)
    assert loop.update(objective, parts, state)["gradient_norm"] == 1 and state.updates == 1


def test_updates_of_diffusion_dpo(base, pairs, monkeypatch) -> None:
    base.add_lora(LORA, 0)
    settings = config.DiffusionDpo(lora=LORA, iterations=1, **UPDATE)
    schedule = Schedule.from_config(base.scheduler_config, 20).to(DEVICE)
    objective = Alignment("align.diffusion_dpo", base, DiffusionDpoMethod(settings, schedule, pairs, 0))
    ((parts,), _), found = waited(monkeypatch, lambda: objective.collect(0))
    assert not found and len(parts) == 2
    assert_one_wait(monkeypatch, objective, parts)


@pytest.mark.parametrize("kind", ["step-aware", "latent"])
def test_updates_of_the_preference_models(base, words, model, pairs, monkeypatch, kind: str) -> None:
    """What they are shown is computed while their batch is collected, and read in the update."""
    schedule = Schedule.from_config(base.scheduler_config, 20).to(DEVICE)
    trained: Any
    if kind == "latent":
        settings = config.LatentPreference(trained="all", steps=1, **UPDATE)
        latent = LatentPreferenceModel(base.feature_model(), 2.0).to(DEVICE)
        trained = LatentTask(latent, base, schedule, settings)
    else:
        settings = config.Preference(init="", steps=1, **UPDATE)
        trained = StepAwareTask(model.to(DEVICE).train(), words, base, schedule, settings)
    trained.prepare()
    objective = LabelObjective(trained, pairs, 0)
    ((parts,), _), found = waited(monkeypatch, lambda: objective.collect(0))
    assert not found and len(parts) == 2
    assert_one_wait(monkeypatch, objective, parts)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_generation_waits_as_often_whatever_its_steps(base, monkeypatch) -> None:
    smoke = config.validate(yaml.safe_load(config.preset("smoke")))
    for steps in (2, 5):
        settings = smoke.generate.model_copy(update={"num_inference_steps": steps, "batch_size": 2})
        params = smoke.model_copy(update={"generate": settings})
        draw = lambda p=params: list(generation.draw(base, p, p.generate.base, PROMPTS, [0, 1]))  # noqa: E731
        images, found = waited(monkeypatch, draw)
        assert len(images) == 2
        assert found == {
            "diffusion/schedule.py to": 3,  # the schedule's tensors
            "diffusion/finite.py failure": 2,  # after the last step, after decoding
            "validation/generation.py batch": 1,  # the images of a batch
        }


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.to("cpu").numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "to": lambda x: torch.zeros(3).to(x.device),
    "copy": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("read", READS)
def test_each_way_to_wait_is_counted(read: str, monkeypatch) -> None:
    x = torch.empty(3, device=DEVICE)
    _, found = waited(monkeypatch, lambda: READS[read](x))
    assert found == {"elsewhere": 1}


def test_what_does_not_wait_is_not(monkeypatch) -> None:
    x = torch.empty(3, device=DEVICE)
    _, found = waited(monkeypatch, lambda: x[torch.zeros(2, dtype=torch.int64, device=DEVICE)].half() + 1)
    assert not found
    _, found = waited(monkeypatch, lambda: torch.zeros(3).to(DEVICE, non_blocking=True)[0])
    assert not found
    _, found = waited(monkeypatch, lambda: torch.zeros(3).sum().item())  # nothing of it is on the device
    assert not found


def test_a_wait_in_the_loop_is_found(base, words, model, monkeypatch) -> None:
    """One more at each of the steps: the one without candidates, and those with."""
    method, sample = stepwise(base, words, model, "latent", 4), ddim.sample

    def waiting(step: ddim.Transition, noise: torch.Tensor) -> torch.Tensor:
        step.mean.sum().item()
        return sample(step, noise)

    monkeypatch.setattr(ddim, "sample", waiting)
    _, found = waited(monkeypatch, lambda: method.collect(base, 0))
    assert found["methods/stepwise/rollout.py run"] == 1 and len(method.rollout.blocks) == 3
    assert found["methods/stepwise/rollout.py _branch"] == 3
