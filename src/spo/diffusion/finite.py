"""Refuses NaN and infinity: names the part of the model, the denoising step and the prompt they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.types import Conditioning

PRECISION = "if backbone.dtype is fp16, set bf16 or fp32"
WEIGHTS = "check the weights of the checkpoint and of the adapter"
TEXT, UNET, REFERENCE = "text encoder output", "UNet output", "reference UNet output"
LATENTS, STORED, X_T = "latents", "stored latents of a pair", "noised latents"
DECODER, ENCODER, SCORE = "VAE decoder output", "VAE encoder output", "preference model's score"
LOSS = "loss"
VAE = f"{PRECISION}, or name a VAE that is safe in fp16 in backbone.vae (SDXL); else check the VAE's weights"
ADVICE = {
    TEXT: f"{PRECISION}; else check the text encoder's weights",
    UNET: f"{PRECISION}; else {WEIGHTS}",
    REFERENCE: f"{PRECISION}; else check the weights of the checkpoint",
    LATENTS: f"check the checkpoint's scheduler_config.json; {WEIGHTS}",
    STORED: "delete .spo/latents and run the stage again",
    X_T: f"{WEIGHTS}, or try a lower learning rate",
    SCORE: "train it again",
    LOSS: "try a lower optimizer.learning_rate",
    DECODER: VAE,
    ENCODER: VAE,
}


class NotFiniteError(ValueError):
    """An intermediate value is NaN or infinite; the message says which, where, and what to try."""


@dataclass(frozen=True)
class _Note:
    part: str
    finite: Tensor  # bool [B]
    prompts: Sequence[str]  # of the first samples; none: unknown
    timesteps: Tensor | None  # [B]


class FiniteCheck:
    """Notes, sample by sample, whether tensors are finite; `check` reads all notes at once.

    Until then nothing waits for the GPU.
    """

    def __init__(self, timesteps: Tensor | None = None) -> None:
        """`timesteps` of the sampler, by which messages number its steps."""
        self._timesteps = timesteps
        self._notes: list[_Note] = []

    def note(
        self, part: str, values: Tensor, prompts: Sequence[str] = (), timesteps: Tensor | None = None
    ) -> None:
        """What `part`, a key of ADVICE, gave [B,...] for B prompts."""
        finite = values.isfinite().reshape(len(values), -1).all(1)
        self._notes.append(_Note(part, finite, prompts, timesteps))

    def note_text(self, conditioning: Conditioning | None, prompts: Sequence[str]) -> None:
        """What the text encoder gave for B prompts, in each of its tensors."""
        for values in conditioning.tensors.values() if conditioning is not None else ():
            self.note(TEXT, values, prompts)

    def take(self, other: FiniteCheck) -> None:
        """Move the notes of another check here."""
        self._notes += other._notes
        other._notes = []

    def flags(self) -> list[Tensor]:
        """Whether each thing noted is finite, bool [] on its device: to be read with other numbers."""
        return [note.finite.all() for note in self._notes]

    def check(self) -> None:
        """Raise NotFiniteError with the first thing noted that was not finite."""
        reason = self.failure()
        if reason is not None:
            raise NotFiniteError(reason)

    def failure(self) -> str | None:
        """The message of the first thing noted that was not finite."""
        if not self._notes:
            return None
        finite = torch.stack(self.flags()).tolist()
        first = next((note for note, good in zip(self._notes, finite, strict=True) if not good), None)
        return None if first is None else self._message(first)

    def _message(self, note: _Note) -> str:
        row = int((~note.finite).nonzero()[0])
        where = "" if note.timesteps is None else f" at {self._step(note.timesteps[row].item())}"
        prompt = f", prompt {note.prompts[row][:100]!r}" if row < len(note.prompts) else ""
        return f"NaN or infinity in the {note.part}{where}{prompt}: {ADVICE[note.part]}"

    def _step(self, timestep: float) -> str:
        known = [] if self._timesteps is None else self._timesteps.tolist()
        if timestep not in known:
            return f"t={timestep:g}"
        return f"step {known.index(timestep) + 1} of {len(known)} (t={timestep:g})"


def check_finite(part: str, values: Tensor, prompts: Sequence[str] = ()) -> None:
    """Raise NotFiniteError if one tensor [B,...] for B prompts is not finite."""
    check = FiniteCheck()
    check.note(part, values, prompts)
    check.check()
