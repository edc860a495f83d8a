"""The experiment's configuration: the sections of params.yaml, how they are read, and ready-made presets."""

from spo.config.data import Pairs, Prompts
from spo.config.evaluation import VARIANTS, Generate, Registry, Report, Score, Variant
from spo.config.models import (
    SINGLE_FILE_CONFIG,
    AestheticConfig,
    Backbone,
    HpsConfig,
    PickScoreConfig,
    Scheduler,
)
from spo.config.params import Params
from spo.config.reading import ConfigError, code_defaults, load, preset, preset_names, validate
from spo.config.training import (
    METHODS,
    Align,
    DiffusionDpo,
    Lora,
    Optimizer,
    Preference,
    PseudoLabels,
    Rollout,
    Spo,
    Validation,
)

__all__ = [
    "AestheticConfig",
    "Align",
    "Backbone",
    "ConfigError",
    "DiffusionDpo",
    "Generate",
    "HpsConfig",
    "Lora",
    "METHODS",
    "Optimizer",
    "Pairs",
    "Params",
    "PickScoreConfig",
    "Preference",
    "Prompts",
    "PseudoLabels",
    "Registry",
    "Report",
    "Rollout",
    "SINGLE_FILE_CONFIG",
    "Scheduler",
    "Score",
    "Spo",
    "VARIANTS",
    "Validation",
    "Variant",
    "code_defaults",
    "load",
    "preset",
    "preset_names",
    "validate",
]
