"""Quality against the compute of training, from the validations during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

QUALITIES = ("validation/oracle_aesthetic", "validation/gain")  # the first measured one is shown
COMPUTE = {  # a UNet sample is a forward of one sample; a backward pass counts as two
    "training_seconds": "seconds of training",
    "unet_samples": "UNet samples",
}


def points(
    curve: DataFrame, trained: Mapping[str, Any], first: Sequence[Mapping[str, Any]]
) -> DataFrame | None:
    """The points of a method's validations; None if quality or compute was not measured.

    Args:
        curve: the training CSV of a method by iteration, with the columns of its validations.
        trained: its metrics file; compute grows evenly with the iterations.
        first: the metrics files of the models that were trained for it, whose compute comes before.

    Returns:
        A row for each validation: the columns of COMPUTE up to it, the quality, and whether its weights are
        the result.
    """
    from pandas import DataFrame

    quality = next((c for c in QUALITIES if c in curve and curve[c].notna().any()), None)
    if quality is None or not trained.get("iterations"):
        return None
    if any(key not in facts for facts in (trained, *first) for key in COMPUTE):
        return None
    rows = curve[curve[quality].notna()]
    share = rows["step"] / trained["iterations"]
    compute = {key: sum(float(f[key]) for f in first) + share * float(trained[key]) for key in COMPUTE}
    selected = rows["step"] == trained.get("selected_iteration")
    return DataFrame({**compute, quality: rows[quality], "selected": selected})
