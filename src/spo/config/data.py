"""Sections of the data: prompts and preference pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config.base import Count, Fraction, Positive, Section, Seed
from spo.config.scorers import Scorers

Bound = Annotated[float, Field(ge=-1e9, le=1e9)]  # in a scorer's units


class Prompts(Section):
    """Prompt lists, and how they are cleaned and split."""

    seed: Seed = 0  # of the split, not of training, so that runs of several training seeds are comparable
    # a file of captions: .json, .jsonl, .csv, .tsv, .txt or .parquet; None: nothing is trained on prompts
    train: str | None
    evaluation: str  # the same, for the test and validation prompts
    # preference shards; like pairs.source's, their captions are no evaluation prompts
    pairs: str | None
    vocabulary: str | None = None  # a file of allowed words, one per line
    block_list: str | None = None  # a file of forbidden words and phrases, one per line
    max_tokens: Annotated[int, Field(ge=3, le=77)] = 77  # of a CLIP text encoder; start and end count too
    n_train: Count
    n_validation: Count
    n_test: Positive


class PairFilter(Scorers):
    """Select training pairs by the gaps between the scores of their two images.

    The gap of a pair with a winner is the winner's score less the loser's; that of a tie is absolute.
    """

    win_lose_above: dict[str, Bound] = {}  # by scorer: a pair with a winner passes if each gap is above
    tie_below: dict[str, Annotated[Bound, Field(gt=0)]] = {}  # by scorer: a tie passes if each gap is below

    @model_validator(mode="after")
    def _rules_have_scorers(self) -> PairFilter:
        ruled = [*self.win_lose_above, *self.tie_below]
        if without := [name for name in ruled if name not in self.configured()]:
            raise ValueError(f"has a rule for {without[0]}, but no section {without[0]}; add it")
        if unused := [name for name in self.configured() if name not in ruled]:
            raise ValueError(f"has a section {unused[0]}, but no rule for it; set {unused[0]} to null")
        if not ruled:
            raise ValueError("has no rule in win_lose_above or tie_below; set filter to null instead")
        return self


class Pairs(Section):
    """Preference pairs in Pick-a-Pic's schema."""

    source: str | None  # folder of parquet shards; None: nothing is trained on pairs
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    rows_per_shard: Positive = 1000
    max_bad_fraction: Fraction = 0.01
    drop_ties: bool = False
    latents: Literal["mean", "sample"] = "mean"  # of the VAE's posterior, for all training on pairs
    filter: PairFilter | None = None  # of the training pairs
