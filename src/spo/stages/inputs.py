"""Stage `inputs`: pin every outside input by content, so that DVC reruns just what a change touches."""

from __future__ import annotations

from pathlib import Path

from spo.config import Params, PseudoLabels
from spo.data.inputs import manifest
from spo.stages.common import stage, write_json

OUTPUT = Path("outputs/inputs")


def run(params: Params, item: str | None = None) -> None:
    score = params.score
    named: dict[str, list[tuple[str | None, str | None]]] = {
        "base": [(params.backbone.checkpoint, params.backbone.revision), (params.backbone.vae, None)],
        "clip": [(params.preference.init, params.preference.revision)],
        "prompts": [(params.prompts.train, None), (params.prompts.evaluation, None)],
        "pairs": [(params.pairs.source, None)],
        "pickscore": [(score.pickscore.model, score.pickscore.revision), (score.pickscore.processor, None)],
        "hps": [(score.hps.checkpoint, None), (score.hps.tokenizer, None)],
        "aesthetic": [(score.aesthetic.clip, score.aesthetic.revision), (score.aesthetic.head, None)],
        "oracle": [(score.oracle, None)],
    }
    named["prompts"] += [(params.prompts.vocabulary, None), (params.prompts.block_list, None)]
    if labels := params.preference.labels:
        named["clip"] += _of_labels(labels)
    with stage("inputs", params):
        for role, sources in named.items():
            found = [manifest(name, revision) for name, revision in sources if name is not None]
            write_json(OUTPUT / f"{role}.json", found)


def _of_labels(labels: PseudoLabels) -> list[tuple[str | None, str | None]]:
    if labels.pickscore:
        return [(labels.pickscore.model, labels.pickscore.revision), (labels.pickscore.processor, None)]
    if labels.hps:
        return [(labels.hps.checkpoint, None), (labels.hps.tokenizer, None)]
    assert labels.aesthetic
    return [(labels.aesthetic.clip, labels.aesthetic.revision), (labels.aesthetic.head, None)]
