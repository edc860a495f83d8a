"""Scores that papers publish, for the rows of the same base model, method, guidance, prompts and steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.config import VARIANTS, yaml_text

FILE = Path(__file__).with_name("published.yaml")
PROMPTS, STEPS = "validation_unique", 20
MORE = "_high_guidance"  # ends the name of a variant that is another one at another guidance


def scores(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By variant: the published mean of each metric (None: not known), and `in`, the paper and its table.

    Args:
        params: the content of params.yaml. Of other prompts or steps nothing is published.
    """
    generate = params["generate"]
    if PROMPTS not in params["prompts"]["evaluation"] or generate["num_inference_steps"] != STEPS:
        return {}
    found = {}
    for row in yaml_text.parse(FILE.read_text(encoding="utf-8"), str(FILE)).get(
        params["backbone"]["checkpoint"], []
    ):
        method, guidance = row.pop("method"), row.pop("guidance")
        for variant in (name for name in VARIANTS if name.removesuffix(MORE) == method):
            if generate[variant] is not None and generate[variant]["guidance"] == guidance:
                found[variant] = row
    return found
