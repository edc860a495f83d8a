"""Sections of the data: prompts and preference pairs."""

from __future__ import annotations

from spo.config.base import Count, Fraction, Positive, Section


class Prompts(Section):
    """Prompt lists, and how they are cleaned and split."""

    train: str  # a file of captions: .json, .jsonl, .csv, .tsv, .txt or .parquet
    evaluation: str  # the same, for the test and validation prompts
    pairs: str  # folder of preference shards, whose captions are excluded from the evaluation prompts
    vocabulary: str | None = None  # a file of allowed words, one per line
    block_list: str | None = None  # a file of forbidden words and phrases, one per line
    max_tokens: Positive = 77
    n_train: Positive
    n_validation: Count
    n_test: Positive


class Pairs(Section):
    """Preference pairs in Pick-a-Pic's schema."""

    source: str  # folder of parquet shards
    validation_fraction: Fraction = 0.1
    rows_per_shard: Positive = 1000
    max_bad_fraction: Fraction = 0.01
    drop_ties: bool = False
