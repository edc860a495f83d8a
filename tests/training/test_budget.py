"""The budget of a device by its memory; numbers by hand from the table of costs."""

import pytest

from spo import config
from spo.training import budget
from spo.types import Budget

GIB = 2**30


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("kind", list(budget.COSTS["sd"]))
def test_more_memory_never_makes_a_call_smaller(family: str, kind: str) -> None:
    cuts = [budget.automatic(family, kind, gib * GIB) for gib in (8, 16, 24, 48, 80, 141)]
    for smaller, larger in zip(cuts, cuts[1:], strict=False):
        if (smaller.checkpointing, smaller.offload) == (larger.checkpointing, larger.offload):
            assert all(a <= b for a, b in zip(smaller[:3], larger[:3], strict=True))
        assert smaller.offload >= larger.offload and smaller.checkpointing >= larger.checkpointing
    assert min(min(cut[:3]) for cut in cuts) >= 1


def test_by_hand() -> None:
    """Of 80 GiB, 85.9 GB, a fifth less 2.5 GB is left free. SPO on SD 1.5: models 1.8 GB, 5.6 GB besides."""
    cost = budget.COSTS["sd"]["spo"]
    found = budget.automatic("sd", "spo", 80 * GIB)
    room = 0.8 * 80 * GIB / 1e9 + 2.5
    assert not found.checkpointing and not found.offload
    assert found.pairs == int((room - cost.trained - cost.others) / cost.pair)
    assert found.images == 16 and found.samples == 128


def test_what_params_name_goes_first(monkeypatch) -> None:
    params = config.validate(config.yaml_text.parse(config.preset("sdxl", 24), "preset"))
    found = budget.of(params, "spo")
    assert found == budget.automatic("sdxl", "spo", 24 * GIB)
    device = config.Device(memory=24, pairs=7, checkpointing=False)
    assert budget.of(params.model_copy(update={"device": device}), "spo") == found._replace(
        pairs=7, checkpointing=False
    )
    monkeypatch.setattr(budget.torch.cuda, "is_available", lambda: False)
    own = params.model_copy(update={"device": config.Device()})
    assert budget.of(own, "spo") == Budget()  # a CPU


@pytest.mark.parametrize(
    ("stage", "variant", "kind"),
    [
        ("align", "lpo", "lpo"),
        ("align", None, "spo"),
        ("preference", None, "preference"),
        ("preference", "unconditioned", "preference"),
        ("preference", "latent", "latent_preference"),
        ("generate", "base", "generate"),
    ],
)
def test_kinds(stage: str, variant: str | None, kind: str) -> None:
    assert budget.kind(stage, variant) == kind


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_larger_images_make_calls_smaller(family: str) -> None:
    """By their area: at twice the side, a quarter of what the models leave."""
    usual = budget.ANNOUNCED[family]
    small, own, large = (budget.automatic(family, "generate", 48 * GIB, s) for s in (None, usual, 4 * usual))
    assert small == own and large.images < own.images and large.samples < own.samples
    assert budget.automatic(family, "spo", float("inf"), 4 * usual) == budget.WHOLE
