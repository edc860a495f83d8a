"""The model card of an aligned model: base model, data, recipe and scores.

It is the `README.md` beside the weights, with the front matter that model hubs read. The same run gives the
same text, because the card is part of a DVC output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo.config import Params, yaml_text
from spo.methods import method_spec
from spo.runtime.files import write_text
from spo.runtime.hub import is_hub_id
from spo.runtime.messages import public

TIMES = ("seconds", "training_seconds")  # differ between runs, so they are not on the card


def write(folder: Path, params: Params, method: str, trained: Mapping[str, Any]) -> None:
    """Write `folder`/README.md.

    Args:
        trained: counts of the training; its times are omitted.
    """
    write_text(folder / "README.md", text(params, method, trained))


def text(params: Params, method: str, trained: Mapping[str, Any]) -> str:
    """The text of the card, without the passwords of URLs and the paths of this machine."""
    return public(_text(params, method, trained))


def _text(params: Params, method: str, trained: Mapping[str, Any]) -> str:
    section, base = getattr(params.align, method), params.backbone
    kind = "LoRA" if section.lora is not None else "full fine-tune of the UNet"
    known = licence(base.checkpoint) or base.license
    head = {
        **({"base_model": base.checkpoint} if is_hub_id(base.checkpoint) else {}),
        **({"license": known} if known else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", *(["lora"] if section.lora is not None else []), method.replace("_", "-")],
    }
    at = f", revision {base.revision}" if base.revision else ""
    terms = known or "not stated; ask its makers before you share what was made of it"
    load = (
        'pipe.load_lora_weights("this folder")'
        if section.lora is not None
        else 'pipe = DiffusionPipeline.from_pretrained("this folder")'
    )
    recipe = yaml_text.dump(public(section.model_dump(mode="json", exclude_none=True)))
    counts = "\n".join(f"- {k.replace('_', ' ')}: {v}" for k, v in trained.items() if k not in TIMES)
    return f"""---
{yaml_text.dump(head).strip()}
---
# {params.name}: {kind} by {method_spec(method).paper}

- base model: {public(base.checkpoint)}{at} ({"SDXL" if base.family == "sdxl" else "Stable Diffusion"} family)
- licence of the base model: {terms}
- training prompts: {public(params.prompts.train)}
- preference pairs: {public(params.pairs.source)}
{counts}

```python
{load}
```

## Recipe

```yaml
{recipe.strip()}
```
"""


def licence(checkpoint: str) -> str | None:
    """The licence in the front matter of the README of a local checkpoint, or None."""
    path = Path(checkpoint) / "README.md"
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front_matter = yaml_text.parse(parts[1], str(path))
    except ValueError:
        return None
    name = front_matter.get("license") if isinstance(front_matter, dict) else None
    return name if isinstance(name, str) else None


def scores(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """The section with the scores of a method, from the rows of reports/comparisons.json."""
    lines = [
        "## Scores",
        "",
        "Paired by prompt and seed; mean difference and its 95 % bootstrap interval.",
        "",
        "| score | mean | over | by | 95 % interval | better | prompts |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["method"] == method:
            ends = "–" if r["ci_low"] is None else f"{r['ci_low']:+.3f} to {r['ci_high']:+.3f}"
            lines.append(
                f"| {r['metric']} | {r['mean_method']:.3f} | {r['baseline']} | {r['mean_difference']:+.3f} | "
                f"{ends} | {100 * r['win_rate']:.0f} % | {r['n']} |"
            )
    return "\n".join(lines) + "\n"
