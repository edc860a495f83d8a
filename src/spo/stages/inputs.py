"""Stage `inputs`: pin every external input by its content, so that DVC reruns only affected stages."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from spo import config
from spo.config import SCORERS, Params, Source
from spo.data.manifest import manifest
from spo.runtime.files import write_json
from spo.stages.common import stage

OUTPUT = Path("outputs/inputs")
DEFAULTS = "defaults.json"  # the defaults of keys that params.yaml omits


def run(params: Params, variant: str | None = None) -> None:
    """Write outputs/inputs: the pins of every role, and the defaults of the code."""
    with stage("inputs", params):
        for role, named in sources(params).items():
            write_json(OUTPUT / f"{role}.json", [manifest(n, revision) for n, revision in named if n])
        write_json(OUTPUT / DEFAULTS, config.code_defaults(params))


def sources(params: Params) -> dict[str, list[Source]]:
    """The sources that `outputs/inputs/ROLE.json` pins, by role; a path is None if params.yaml has none."""
    base, preference, prompts = params.backbone, params.preference, params.prompts
    described = base.described_by if base.described_by != base.checkpoint else None
    lists = (prompts.train, prompts.evaluation, prompts.vocabulary, prompts.block_list, prompts.pairs)
    trained = {params.pairs.source} - {prompts.pairs}  # whose captions are not evaluated
    suites = params.generate.suites.values()
    scorers = dict.fromkeys(SCORERS, list[Source]()) | _of_scorers(params.score)
    scorers["oracle"] = [(params.score.oracle, None)]
    return {
        "base": [(base.checkpoint, base.revision), (base.vae, None), (described, None)],
        "clip": [
            (preference.init, preference.revision),
            (preference.tokenizer, None),
            *chain(*_of_scorers(preference.labels).values()),
        ],
        "latent": [(params.latent_preference.text_projection, params.latent_preference.revision)],
        "prompts": [(name, None) for name in (*lists, *suites, *trained)],
        "pairs": [(params.pairs.source, None), *chain(*_of_scorers(params.pairs.filter).values())],
        "adapters": [(a, None) for a in _adapters(params.generate) if Path(a).parts[:1] != ("outputs",)],
        **scorers,
    }


def _of_scorers(section: config.Scorers | None) -> dict[str, list[Source]]:
    """The sources of each scorer in a section."""
    scorers = section.configured() if section else {}
    return {name: list(settings.sources().values()) for name, settings in scorers.items()}


def _adapters(section: config.Generate) -> list[str]:
    """The adapters of the variants; those in outputs/ are outputs of `align`, which DVC tracks."""
    adapters = [getattr(section, variant).adapter for variant in config.VARIANTS]
    return [adapter for adapter in adapters if adapter is not None]
