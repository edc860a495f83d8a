"""The experiment's configuration: the sections of params.yaml, how they are read, and ready-made presets."""

from spo.config.data import PairFilter, Pairs, Prompts
from spo.config.device import Device
from spo.config.evaluation import VARIANTS, Generate, Registry, Report, Score, Variant
from spo.config.models import SINGLE_FILE_CONFIG, Backbone, Scheduler
from spo.config.params import PREFERENCE_MODELS, Params
from spo.config.presets import QUICK, counted, preset, preset_names
from spo.config.reading import ConfigError, code_defaults, load, validate
from spo.config.scorers import (
    SCORERS,
    AestheticConfig,
    ClipScoreConfig,
    HpsConfig,
    ImageRewardConfig,
    PickScoreConfig,
    ScorerConfig,
    Scorers,
    Source,
)
from spo.config.training import (
    METHODS,
    PREFERENCE_BASELINES,
    Align,
    DiffusionDpo,
    LatentPreference,
    Lora,
    Lpo,
    Optimizer,
    Preference,
    PseudoLabels,
    Rollout,
    Spo,
    Stepwise,
    Validation,
)
