"""The card of a published model: that of `model_card`, with scores and pictures as the hub reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spo.config import Params
from spo.evaluation import model_card
from spo.evaluation.verdict import name
from spo.runtime import hub
from spo.runtime.messages import public, redact

FILE = "README.md"
LICENCE = "- licence of the base model:"


@dataclass(frozen=True)
class Sample:
    """The images of a prompt, as paths from the card."""

    prompt: str
    baseline: str
    method: str


@dataclass(frozen=True)
class Publication:
    """What a published card says beside what `align` knew."""

    place: str  # in the code that loads the model: a hub id, or `this folder`
    base_model: str | None  # its hub id
    licence: str | None  # None: as on the card


def metadata(card: str) -> dict[str, Any]:
    """The front matter of a card, as the hub reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def text(
    card: str,
    params: Params,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    publication: Publication,
) -> str:
    """The card that `align` wrote, with scores in the hub's metadata format (model-index) and sample images.

    Args:
        rows: the method's rows of reports/comparisons.json.
    """
    from huggingface_hub import ModelCard

    known = ModelCard(public(card))
    data: Any = known.data  # a ModelCardData
    title = f"{params.name}-{method}".replace("_", "-")
    data.base_model, data.license = publication.base_model, publication.licence or data.license
    data.model_name, data.eval_results = title, _results(params, rows)
    data["widget"] = [{"text": s.prompt, "output": {"url": s.method}} for s in samples]
    body = known.text.replace('"this folder"', f'"{publication.place}"').strip()
    if publication.licence:
        body = _with_licence(body, publication.licence)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        body,
        model_card.scores(rows, method),
        _pictures(samples, rows[0], method),
    ]
    return redact("\n\n".join(part.strip() for part in parts) + "\n")


def _with_licence(body: str, licence: str) -> str:
    """
    Raises:
        ValueError: a card without the line of the licence.
    """
    lines = body.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith(LICENCE)]
    if not places:
        raise ValueError(f"publish: {FILE} of the adapter has no line {LICENCE!r}; run `spo align` again")
    lines[places[0]] = f"{LICENCE} {licence}"
    return "\n".join(lines)


def _results(params: Params, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The method's mean scores as the hub's evaluation results."""
    from huggingface_hub import EvalResult

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


def _pictures(samples: Sequence[Sample], row: Mapping[str, Any], method: str) -> str:
    """The section with the sample images; a prompt may be Markdown or HTML and is shown as it is."""
    baseline = row["baseline"]
    lines = [
        "## Samples",
        "",
        "The first test prompts in order, not selected; both images start from the same noise.",
        "",
        f"| prompt | {name(baseline)} | {name(method)} |",
        "|---|---|---|",
    ]
    for sample in samples:
        lines.append(f"| {_plain(sample.prompt)} | ![]({sample.baseline}) | ![]({sample.method}) |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$<>&])", r"\\\1", " ".join(text.split()))
