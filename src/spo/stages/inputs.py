"""Stage `inputs`: pin every external input by its content, so that DVC reruns only affected stages."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from spo import config
from spo.config import SCORERS, Params, Source
from spo.ingest.manifest import manifest
from spo.runtime import hub, licence, released
from spo.runtime.files import write_json
from spo.stages.common import stage
from spo.types import NoiseSchedule

OUTPUT = Path("outputs/inputs")
DEFAULTS = "defaults.json"  # the defaults of keys that params.yaml omits


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/inputs: the pins of every role, and the defaults of the code."""
    with stage("inputs", params):
        for role, named in sources(params).items():
            pins = [manifest(n, revision) for n, revision in named if n]
            write_json(OUTPUT / f"{role}.json", [_with_licence(role, pin) for pin in pins])
        for model in (name for name in config.PREFERENCE_MODELS if not params.wants(name)):
            why = {released.UNUSED: f"no method is trained with {model}"}
            write_json(OUTPUT / f"{released.role(model)}.json", [why])
        write_json(OUTPUT / DEFAULTS, config.code_defaults(params))
        check_before_training(params)


def _with_licence(role: str, pin: dict[str, Any]) -> dict[str, Any]:
    """Add to the pin of a released model on the hub the licence that its README states, if it has one."""
    if not role.startswith(released.ROLE) or "hub" not in pin:
        return pin
    at = hub.place(pin["hub"])
    try:
        readme = hub.download(f"{hub.SCHEME}{at.page}@{pin['revision']}/{licence.README}")
        return {**pin, "licence": licence.stated(readme[licence.README].parent)}
    except ValueError:
        return {**pin, "licence": None}


def check_before_training(params: Params) -> None:
    """Refuse settings that would fail only after hours: a missing oracle, or timesteps that do not exist."""
    from spo.backbones.description import schedules

    for name in ("preference", "latent_preference"):
        if params.wants(name) and getattr(params, name).local_prompts and params.score.oracle is None:
            raise ValueError(f"{name}.local_prompts: needs score.oracle, which only scenes has; set it to 0")
    try:
        schedule = schedules(params.backbone)
    except ValueError:  # the next stage says so: it reads the base's tokenizer
        return
    sections = {name: getattr(params, name) for name in ("generate", "preference", "latent_preference")}
    sections |= {f"align.{method}": getattr(params.align, method) for method in config.METHODS}
    for name, section in sections.items():
        if hasattr(section, "num_inference_steps"):
            _check_timesteps(name, section, schedule)


def _check_timesteps(name: str, section: Any, schedule_of: Callable[[int], NoiseSchedule]) -> None:
    from spo.methods.stepwise import pairs

    try:
        schedule = schedule_of(section.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    last = float(schedule.train_timesteps.max())
    if beyond := [t for t in getattr(section, "eval_timesteps", ()) if t > last]:
        raise ValueError(f"{name}.eval_timesteps: {beyond[0]} is above {last:g}, the last of the base model")
    if isinstance(section, config.Rollout):
        pairs.blocks(section, schedule, name)


def sources(params: Params) -> dict[str, list[Source]]:
    """The sources that `outputs/inputs/ROLE.json` pins, by role; a path is None if params.yaml has none.

    What no stage needs is not pinned, since pinning may download it.
    """
    base, preference, latent = params.backbone, params.preference, params.latent_preference
    prompts = params.prompts
    described = base.described_by if base.described_by != base.checkpoint else None
    lists = (prompts.train, prompts.evaluation, prompts.vocabulary, prompts.block_list, prompts.pairs)
    trained = {params.pairs.source} - {prompts.pairs}  # whose captions are not evaluated
    suites = params.generate.suites.values()
    adapters = [variant.adapter for variant in params.generate.variants().values()]
    labels, rules = (preference.labels, params.pairs.filter) if params.pairs.source else (None, None)
    clip = [(preference.init, preference.revision), (preference.tokenizer, None)]
    projection = [(latent.text_projection, latent.revision)]
    scorers = dict.fromkeys(SCORERS, list[Source]()) | _of_scorers(params.score)
    scorers["oracle"] = [(params.score.oracle, None)]
    return {
        "base": [(base.checkpoint, base.revision), (base.vae, None), (described, None)],
        "clip": clip if params.wants("preference") else [],
        "labels": [*chain(*_of_scorers(labels).values())],
        "latent": projection if params.trains_model("latent_preference") else [],
        "prompts": [(name, None) for name in (*lists, *suites, *trained)],
        "pairs": [(params.pairs.source, None), *chain(*_of_scorers(rules).values())],
        # those in outputs/ are outputs of `align`, which DVC tracks
        "adapters": [(a, None) for a in adapters if a is not None and Path(a).parts[:1] != ("outputs",)],
        **scorers,
        **_released(params),
    }


def _released(params: Params) -> dict[str, list[Source]]:
    """The released models in place of training, by the role of the section that names them."""
    sections = {name: getattr(params, name) for name in config.PREFERENCE_MODELS if params.wants(name)}
    sections |= {name: getattr(params.align, name) for name in config.METHODS}
    names = {released.role(name): own and own.pretrained for name, own in sections.items()}
    return {role: [(released.address(name), None)] if name else [] for role, name in names.items()}


def _of_scorers(section: config.Scorers | None) -> dict[str, list[Source]]:
    """The sources of each scorer in a section."""
    scorers = section.configured() if section else {}
    return {name: list(settings.sources().values()) for name, settings in scorers.items()}
