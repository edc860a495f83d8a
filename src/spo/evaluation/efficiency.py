"""Quality against the compute of training, from the validations during a run's own trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

QUALITIES = ("validation/oracle_aesthetic", "validation/gain")  # the first that was measured is shown


@dataclass(frozen=True)
class Course:
    """What a method's validations measured on the way."""

    seconds: Sequence[float]  # of training up to each validation, with the models trained first
    unet_samples: Sequence[float]  # UNet forwards of one sample likewise; a backward pass counts as two
    quality: Sequence[float]
    selected: int | None  # index of the validation whose weights are the result


def course(
    curve: DataFrame, trained: Mapping[str, Any], first: Sequence[Mapping[str, Any]]
) -> tuple[str, Course] | None:
    """The column of the quality and its course over compute; None where something was not measured.

    Args:
        curve: the training CSV of a method by iteration, with the columns of its validations.
        trained: its metrics file; compute grows evenly with the iterations.
        first: the metrics files of the models that were trained for it, whose compute comes before.
    """
    column = next((c for c in QUALITIES if c in curve and curve[c].notna().any()), None)
    needed = ("training_seconds", "unet_samples")
    if column is None or not trained.get("iterations"):
        return None
    if any(key not in facts for facts in (trained, *first) for key in needed):
        return None
    rows = curve[curve[column].notna()]
    share = rows["step"] / trained["iterations"]
    seconds, samples = (sum(float(f[key]) for f in first) + share * float(trained[key]) for key in needed)
    chosen = (rows["step"] == trained.get("selected_iteration")).to_numpy().nonzero()[0]
    return column, Course(
        seconds=seconds.tolist(),
        unet_samples=samples.tolist(),
        quality=rows[column].tolist(),
        selected=int(chosen[0]) if len(chosen) else None,
    )
