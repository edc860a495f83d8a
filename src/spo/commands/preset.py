"""`spo preset`: write a ready-made params.yaml, also for a model and prompts of one's own."""

from pathlib import Path
from typing import Any

from spo import config

REJECTED = 0.1  # of one's own prompts: room for those that the stage `prompts` rejects, such as too long ones


def text(name: str, card: int | None, quick: bool, checkpoint: str | None, prompts: Path | None) -> str:
    """The text of params.yaml.

    Args:
        card: GiB of the GPU to plan for; None: those of this machine's.
        quick: see `config.preset`.
        checkpoint: of one's own, as in backbone.checkpoint.
        prompts: a list of one's own, in the formats of prompts.train, to train on and to evaluate.

    Raises:
        ValueError: one line: a checkpoint of another family than the preset's, or that is refused otherwise;
            a list with too few prompts.
    """
    own: dict[str, Any] = {}
    params = config.validate(config.yaml_text.parse(config.preset(name, card, quick), name), name)
    if checkpoint is not None:
        own["backbone"] = _backbone(name, checkpoint, params.backbone)
    if prompts is not None:
        own["prompts"] = _prompts(prompts, params.prompts)
    return config.preset(name, card, quick, own)


def _backbone(name: str, checkpoint: str, settings: config.Backbone) -> dict[str, Any]:
    from spo.backbones import describe
    from spo.runtime import hub, licence

    place, revision = hub.split_revision(checkpoint)
    own = {"checkpoint": place, "revision": revision, "variant": None, "config": None}
    try:
        describe(settings.model_copy(update=own))
    except ValueError as error:
        raise ValueError(
            f"--checkpoint with the preset {name}, of family {settings.family!r}: {error}"
        ) from None
    return {**own, "license": licence.stated(Path(place))}


def _prompts(file: Path, settings: config.Prompts) -> dict[str, Any]:
    """The list for both training and evaluation, with as many prompts of each as the preset at most."""
    from spo.data.prompts import key
    from spo.ingest.prompt_files import read_prompts

    count = int((1 - REJECTED) * len({key(prompt) for prompt in read_prompts(file)} - {""}))
    left = count - settings.n_validation
    if settings.train is None:
        n_test, n_train = min(settings.n_test, left), 0
    else:
        n_test = min(settings.n_test, left // 4)
        n_train = min(settings.n_train, left - n_test)
    if n_test < 2:
        raise ValueError(
            f"--prompts {file}: {count} prompts are too few (a tenth is not counted, for those that are "
            f"rejected later): {settings.n_validation} are for validation, and at least 8 more are needed"
        )
    own = {"evaluation": str(file), "n_test": n_test, "n_train": n_train}
    return own if settings.train is None else {"train": str(file), **own}
