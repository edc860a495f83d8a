"""Read a checkpoint's config files, once and before any weights, and refuse what is not supported."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spo import config
from spo.backbones import scheduler, single_file
from spo.backbones.families import FAMILIES
from spo.backbones.family import Family, Rules, is_unset, pixels_of_a_latent
from spo.data.weights import read
from spo.diffusion.announced import schedule_of
from spo.runtime import hub
from spo.types import NoiseSchedule


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


INDEX: Rules = (("requires_aesthetics_score", is_unset, "a refiner; give a base model"),)
VAE: Rules = (
    ("scaling_factor", lambda v: is_number(v) and v > 0, "give a number above 0 (0.18215 for SD 1.5)"),
    ("shift_factor", lambda v: v is None or is_number(v), "give a number, or null"),
)


class Place(NamedTuple):
    """Where a part is stored: a folder or hub id, its revision, and a subfolder ("": none)."""

    name: str
    revision: str | None
    subfolder: str


@dataclass(frozen=True)
class Description:
    """A checkpoint by its config files."""

    settings: config.Backbone
    denoiser: Mapping[str, Any]  # unet/config.json or transformer/config.json
    vae: Mapping[str, Any]  # vae/config.json, or that of backbone.vae
    vae_place: Place
    absent: Sequence[str]  # optional parts that the checkpoint lacks
    scheduler: Any  # of diffusers, of the class that the file names
    scheduler_config: Mapping[str, Any]  # what the files announce, with the overrides of params.yaml

    @property
    def family(self) -> type[Family]:
        return FAMILIES[self.settings.family]

    @property
    def parts(self) -> list[str]:
        """The parts that the checkpoint has."""
        return [part for part in self.family.parts if part not in self.absent]

    @property
    def where(self) -> str:
        """The name of the checkpoint in messages."""
        return f"backbone.checkpoint: {self.settings.checkpoint}"

    def text(self, pipeline: Any) -> Family:
        """The text encoders of a pipeline, with as many tokens of T5 as the settings say."""
        text, length = self.family(pipeline), self.settings.max_sequence_length
        text.max_sequence_length = text.max_sequence_length if length is None else length
        return text

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        side = self.family.latent_shape(self.denoiser, self.vae, self.settings.image_size)[-1]
        return self.family.schedule(self.scheduler_config, num_inference_steps, self.denoiser, side)

    @property
    def prediction(self) -> str:
        if self.family.flow:
            return "flow"
        return self.scheduler_config.get("prediction_type", "epsilon")


def describe(settings: config.Backbone) -> Description:
    """Read what a diffusers folder, a single .safetensors file or a hub id announces.

    Refused is what is not a text-to-image DDPM in discrete time, and parts that do not fit each other.
    """
    name, revision, where = settings.described_by, settings.revision, described_where(settings)
    family = FAMILIES[settings.family]
    if settings.is_single_file:
        single_file.check(read(Path(settings.checkpoint)), settings)
    else:
        _check_folder(name, where)
    index = config_file(name, revision, "model_index.json", where)
    _check_index(index, settings.family, where)
    file = f"{family.denoiser}/config.json"
    denoiser = config_file(name, revision, file, where)
    _check(family.rules, denoiser, f"{where}: {file}")
    place = _vae_place(settings)
    at = where if settings.vae is None else f"backbone.vae: {settings.vae}"
    vae = config_file(place.name, place.revision, str(Path(place.subfolder, "config.json")), at)
    _check_vae(vae, at)
    family.check(denoiser, vae, f"{where}: {file}")
    _check_size(settings.image_size, family, denoiser, vae)
    channels, wanted = vae.get("latent_channels", 4), family.announced_shape(denoiser, vae)[0]
    if channels != wanted:
        raise ValueError(
            f"{at}: the VAE has latent_channels {channels}, but the {family.denoiser} takes {wanted} "
            "(in_channels)"
        )
    absent = [part for part in family.optional if (index.get(part) or [None, None]) == [None, None]]
    if settings.max_sequence_length == 0 and "T5EncoderModel" in [
        kind for part, kind in family.parts.items() if part not in absent
    ]:
        raise ValueError("backbone.max_sequence_length: 0 is for a checkpoint without T5; this has it")
    return Description(settings, denoiser, vae, place, absent, *read_scheduler(settings))


def read_scheduler(settings: config.Backbone) -> tuple[Any, dict[str, Any]]:
    """The scheduler of the class that a checkpoint's files name, and the config with which it is used."""
    where = described_where(settings)
    announced = config_file(
        settings.described_by, settings.revision, "scheduler/scheduler_config.json", where
    )
    marks: Mapping[str, Any] = {}
    if settings.is_single_file:
        marks = single_file.marks(read(Path(settings.checkpoint)), settings.scheduler)
    loaded = scheduler.load(announced, FAMILIES[settings.family].flow, where)
    return loaded, scheduler.effective(loaded, settings, marks, where)


def schedules(settings: config.Backbone) -> Callable[[int], NoiseSchedule]:
    """`types.Backbone.schedule` of a checkpoint, from as few of its config files as it takes."""
    if FAMILIES[settings.family].flow:
        return describe(settings).schedule
    return partial(schedule_of, read_scheduler(settings)[1])


def described_where(settings: config.Backbone) -> str:
    """The name of the folder or hub id with the config files in messages."""
    return f"backbone.{'config' if settings.is_single_file else 'checkpoint'}: {settings.described_by}"


def config_file(name: str, revision: str | None, file: str, where: str) -> dict[str, Any]:
    """Read a JSON object in a diffusers folder or hub id."""
    from huggingface_hub import hf_hub_download

    def load() -> str:
        local = Path(name).exists()
        path = Path(name, file) if local else Path(hf_hub_download(name, file, revision=revision))
        return path.read_text(encoding="utf-8")

    return json_object(hub.reach(f"{where}: {file}", name, load), f"{where}: {file}")


def json_object(text: str, place: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be a JSON object, not a {type(content).__name__}")
    return content


def _check(rules: Any, announced: Mapping[str, Any], place: str) -> None:
    """Apply a table of rules."""
    for key, supports, meaning in rules:
        if not supports(announced.get(key)):
            raise ValueError(f"{place}: {key} is {announced.get(key)!r}: {meaning}")


def _check_folder(name: str, where: str) -> None:
    """Refuse what is neither a diffusers pipeline's folder nor of the form OWNER/NAME of a hub id."""
    path = Path(name)
    if not path.exists():
        try:
            hub.check(name)
        except ValueError as error:
            raise ValueError(f"backbone.checkpoint: {error}") from None
    elif path.is_file():
        raise ValueError(f"{where} is not a .safetensors file; convert it, or give a diffusers folder")
    elif not (path / "model_index.json").exists():
        raise ValueError(
            f"{where} is not a diffusers pipeline (no model_index.json); {single_file.AS_ADAPTER}"
        )


def _check_index(index: Mapping[str, Any], family: str, where: str) -> None:
    """Refuse a model_index.json of another pipeline, or with parts of other classes."""
    pipeline = index.get("_class_name")
    facts = FAMILIES[family]
    if pipeline != facts.pipeline:
        raise ValueError(f"{where} is a {pipeline}, but backbone.family is {family!r} ({facts.pipeline})")
    place = f"{where}: model_index.json"
    _check(INDEX, index, place)
    for part, supported in facts.parts.items():
        entry = index.get(part) or [None, None]
        if entry == [None, None] and part in facts.optional:
            continue
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"{place}: {part} is {entry!r}, not [library, class]")
        _check_class(entry[1], supported, f"{place}: {part}")


def _check_size(
    pixels: int | None, family: type[Family], denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> None:
    """Refuse images that are no whole number of tokens, or more than the denoiser has positions for."""
    if pixels is None:
        return
    side, most = family.grid(denoiser)
    token = side * pixels_of_a_latent(vae)
    if pixels % token:
        raise ValueError(f"backbone.image_size: {pixels} is not a multiple of {token} pixels, a token's side")
    if most is not None and pixels // token > most:
        raise ValueError(
            f"backbone.image_size: {pixels} is more than {most * token} pixels, the side of {most} tokens "
            "for which the base has positions (pos_embed_max_size)"
        )


def _check_class(announced: Any, supported: str, where: str) -> None:
    if announced != supported:
        raise ValueError(f"{where} is {announced or 'missing'}; only {supported} is supported")


def _vae_place(settings: config.Backbone) -> Place:
    """Where the VAE is stored; `backbone.vae` may be the folder of a pipeline."""
    if settings.vae is None:
        return Place(settings.described_by, settings.revision, "vae")
    path = Path(settings.vae)
    if path.is_file():
        raise ValueError(
            f"backbone.vae: {path} is a file; give a folder of diffusers' AutoencoderKL.save_pretrained"
        )
    inner = (path / "vae" / "config.json").exists() and not (path / "config.json").exists()
    return Place(*hub.split_revision(settings.vae), "vae" if inner else "")


def _check_vae(vae: Mapping[str, Any], where: str) -> None:
    """Refuse another kind of autoencoder, and statistics of latents that are not numbers."""
    _check_class(vae.get("_class_name", "AutoencoderKL"), "AutoencoderKL", where)
    channels = vae.get("latent_channels", 4)
    place = f"{where}: vae/config.json"
    _check(VAE, {"scaling_factor": 0.18215, **vae}, place)
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is None and std is None:
        return
    values: Any
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != channels or not all(map(is_number, values)):
            raise ValueError(f"{place}: latents_mean and latents_std must both have {channels} numbers")
    if min(values) <= 0:
        raise ValueError(f"{place}: latents_std is {std}; its numbers must be above 0")
