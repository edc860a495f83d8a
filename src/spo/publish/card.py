"""The card of an aligned model, the README.md beside its weights, as model hubs read it.

`align` writes base model, data and recipe; `spo register` adds scores, `spo publish` scores and samples. All
are one template, card.md. The same run gives the same text, because the card is part of a DVC output.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from spo.backbones import FAMILIES
from spo.config import Params, yaml_text
from spo.methods import method_spec
from spo.runtime import hub
from spo.runtime.files import write_text
from spo.runtime.licence import README, metadata, stated
from spo.runtime.messages import public, redact

FILE = README
TEMPLATE = Path(__file__).with_name("card.md")
LICENCE = "- licence of the base model:"  # a line of the template
TIMES = ("seconds", "training_seconds")  # differ between runs, so they are not on the card
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$<>&])")


class Sample(NamedTuple):
    """A prompt and its images, as paths from the card."""

    prompt: str
    baseline: str
    method: str


def write(folder: Path, params: Params, method: str, trained: Mapping[str, Any], **released: Any) -> None:
    """Write the card of a training, or of `released` weights, to `folder`."""
    write_text(folder / FILE, of_training(params, method, trained, **released))


def of_training(
    params: Params,
    method: str,
    trained: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
    lora: bool | None = None,
) -> str:
    """The card of a training, without passwords of URLs and paths of this machine.

    Args:
        origin: of released weights, as `released.Released` has it.
        lora: whether these are a LoRA; None: as params.yaml says.
    """
    section, base = getattr(params.align, method), params.backbone
    lora, terms = section.lora is not None if lora is None else lora, stated(base.checkpoint) or base.license
    kind = "LoRA" if lora else "full fine-tune of the UNet"
    data = ModelCardData(
        base_model=base.checkpoint if hub.is_hub_id(base.checkpoint) else None,
        license=(origin and origin["licence"]) or terms,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", *(["lora"] if lora else []), method.replace("_", "-")],
    )
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        title=f"{params.name}: {kind} by {method_spec(method).paper}",
        base=public(base.checkpoint),
        revision=base.revision,
        family=FAMILIES[base.family].title,
        terms=terms,
        origin=origin,
        prompts=public(params.prompts.train),
        pairs=public(params.pairs.source),
        counts={name: value for name, value in trained.items() if name not in TIMES},
        lora=lora,
        recipe=yaml_text.dump(public(section.model_dump(mode="json", exclude_none=True))).strip(),
    )
    return str(public(str(card)))


def with_scores(card: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Add the scores of a method, its rows of reports/comparisons.json, to the card of its training."""
    body = ModelCard(card).text.strip()
    return str(ModelCard.from_template(metadata(card), str(TEMPLATE), body=body, rows=rows))


def published(
    card: str,
    params: Params,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    place: str,
    base_model: str | None,
    licence: str | None,
    webui: str | None = None,
) -> str:
    """Add scores and sample images to the card of a training; the scores as the hub reads them, too.

    Args:
        rows: the method's rows of reports/comparisons.json.
        place: where the code on the card loads the model from: a hub id, or `this folder`.
        licence: None: as on the card.
        webui: the name of the LoRA's file in kohya's key names.
    """
    from spo.evaluation.verdict import name

    known = ModelCard(public(card))
    data: Any = known.data  # a ModelCardData
    data.base_model, data.license = base_model, licence or data.license
    data.model_name = f"{params.name}-{method}".replace("_", "-")
    data.eval_results = _results(params, rows)
    data["widget"] = [{"text": s.prompt, "output": {"url": s.method}} for s in samples]
    body = known.text.replace('"this folder"', f'"{place}"').strip()
    if licence:
        body, found = re.subn(rf"(?m)^{LICENCE}.*$", lambda _: f"{LICENCE} {licence}", body, count=1)
        if not found:
            raise ValueError(f"publish: {FILE} of the adapter has no line {LICENCE!r}; run `spo align` again")
    text = ModelCard.from_template(
        data,
        str(TEMPLATE),
        body=body,
        webui=webui,
        rows=rows,
        samples=[sample._replace(prompt=_plain(sample.prompt)) for sample in samples],
        columns=[name(rows[0]["baseline"]), name(method)],
    )
    return str(redact(str(text)))


def _results(params: Params, rows: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The method's mean scores as the hub's evaluation results."""
    from spo.evaluation.verdict import name

    source = params.prompts.evaluation
    dataset = hub.place(source).repository if hub.is_hub_url(source) else "prompts"
    return [
        EvalResult(
            task_type="text-to-image",
            task_name="Text to image",
            dataset_type=dataset,
            dataset_name=f"{row['n']} {params.generate.split} prompts of {params.name}",
            dataset_split=params.generate.split,
            metric_type=row["metric"],
            metric_name=name(row["metric"]),
            metric_value=row["mean_method"],
        )
        for row in rows
        if row["baseline"] == rows[0]["baseline"]
    ]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))
