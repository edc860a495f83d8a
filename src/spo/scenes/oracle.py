"""Measure an image of the scenes world: its quality, and whether it shows its caption.

The oracle is a network that was trained on (image, ground truth). It only measures results: no model, label
or checkpoint is chosen by it. The synthetic annotators' labels come from a second network of the same class,
but of another size, seed and training set (see `tools.scenes`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.runtime.files import write_text
from spo.runtime.messages import first_line
from spo.scenes import world
from spo.scenes.world import ABSENT, CHOICES, QUALITY

CHUNK = 128  # images per forward pass


class Perception(nn.Module):
    """A small convolutional network that predicts the quality and the attributes of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            _Residual(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            _Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            _Residual(4 * width),
            nn.Conv2d(4 * width, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, 256),
            nn.SiLU(),
        )
        self.quality = nn.Linear(256, len(QUALITY))
        self.attributes = nn.ModuleList(nn.Linear(256, len(c) + 1) for c in CHOICES)  # the last: absent

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predict quality [N,4] and logits [N,choices+1] per attribute of images [N,3,48,48] in [-1,1]."""
        features = self.features(images)
        return self.quality(features), [head(features) for head in self.attributes]

    @torch.no_grad()
    def perceive(self, images: Tensor, captions: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Predict quality [N,4] in [0,1] and the log-probabilities of each attribute.

        Args:
            captions: name images in errors.
        """
        _check_finite(images, captions, "the pixels are", "check the model that generated them")
        parts = [self(chunk) for chunk in images.split(CHUNK)]
        quality = torch.cat([p[0] for p in parts])
        logits = [torch.cat(columns) for columns in zip(*(p[1] for p in parts), strict=True)]
        outputs = torch.cat([quality, *logits], 1)
        _check_finite(outputs, captions, "the network's output is", "run `dvc pull data.dvc`")
        return quality.clamp(0, 1), [column.log_softmax(-1) for column in logits]

    def save(self, folder: Path) -> None:
        """Write model.safetensors (fp16) and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors"
        )
        write_text(folder / "config.json", json.dumps({"width": self.width}) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Perception:
        """Load a network in evaluation mode."""
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder}: no such oracle; run `make repro` or `dvc pull data.dvc`")
        try:
            model = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            weights = load_file(folder / "model.safetensors")
            model.load_state_dict({k: v.float() for k, v in weights.items()})
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise ValueError(f"{folder}: a damaged oracle ({reason}); run `dvc pull data.dvc`") from None
        return model.eval().requires_grad_(False)


def _check_finite(values: Tensor, captions: Sequence[str], what: str, advice: str) -> None:
    bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        where = f"prompt {captions[bad[0]][:100]!r}" if captions else f"image {bad[0] + 1}"
        raise ValueError(f"oracle: {what} NaN or infinite, {where}; {advice}")


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        norms = [nn.GroupNorm(8, width) for _ in range(2)]
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.body = nn.Sequential(norms[0], nn.SiLU(), convolutions[0], norms[1], nn.SiLU(), convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def named_attributes(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The attributes int64 [N,8] that captions name, the last class for absent ones, and their mask [N,8]."""
    attributes = torch.stack([world.parse(c) for c in captions])
    named = attributes != ABSENT
    last = torch.tensor([len(c) for c in CHOICES])
    return torch.where(named, attributes, last), named


def fidelity(log_probs: Sequence[Tensor], captions: Sequence[str], soft: bool = False) -> Tensor:
    """The fraction [N] of the named attributes that an image shows; `soft`: their mean probability."""
    attributes, named = named_attributes(captions)
    columns = []
    for i, column in enumerate(log_probs):
        truth = attributes[:, i]
        hit = column.gather(1, truth[:, None])[:, 0].exp() if soft else (column.argmax(1) == truth).float()
        columns.append(hit)
    hits = torch.stack(columns, dim=1) * named
    return hits.sum(1) / named.sum(1)


class Oracle:
    """The oracle as a scorer, with two metrics in [0,1].

    `oracle_aesthetic` is the mean of the four quality factors, `oracle_alignment` the fraction of the
    attributes named in the caption that the image shows.
    """

    metrics = ("oracle_aesthetic", "oracle_alignment")

    def __init__(self, folder: str | Path) -> None:
        self.model = Perception.load(folder)

    def score(self, images: Tensor, captions: Sequence[str]) -> dict[str, list[float]]:
        """Score images [N,3,48,48] in [-1,1], each for its own caption."""
        if len(images) != len(captions):
            raise ValueError(f"oracle: {len(images)} images, but {len(captions)} prompts")
        quality, log_probs = self.model.perceive(images, captions)
        return {
            "oracle_aesthetic": quality.mean(1).tolist(),
            "oracle_alignment": fidelity(log_probs, captions).tolist(),
        }
