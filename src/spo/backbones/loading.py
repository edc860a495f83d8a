"""Load the weights of a described checkpoint: complete, finite, and the parts fit each other."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spo import config
from spo.backbones import single_file
from spo.backbones.description import Description, Place, config_file, describe, is_number
from spo.backbones.family import Family
from spo.backbones.stable_diffusion import StableDiffusion
from spo.backbones.tensors import check_finite
from spo.backbones.weight_files import by_folder, choose_variants
from spo.data.weights import check_keys, read
from spo.runtime import hub
from spo.types import Budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    settings: config.Backbone, device: torch.device | str, budget: Budget | None = None
) -> StableDiffusion:
    """Load a checkpoint from a diffusers folder, a single .safetensors file or a hub id."""
    return load_described(describe(settings), device, budget)


def load_described(
    description: Description, device: torch.device | str, budget: Budget | None = None
) -> StableDiffusion:
    """Load the weights of a checkpoint that `describe` has read."""
    settings, family = description.settings, description.family
    dtype = DTYPES[settings.dtype]
    given: dict[str, Any] = {"scheduler": description.scheduler, **family.given}
    if settings.vae is not None:
        given["vae"] = _vae(description, dtype)
    pipeline = (_of_file if settings.is_single_file else _of_folder)(description, dtype, given)
    _check_text(pipeline, family, description.where)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            place = f"{description.where}: {name}"
            check_keys((n for n, parameter in part.named_parameters() if parameter.is_meta), (), place)
            check_finite(part, place)
    if (precision := vae_dtype(description, pipeline.vae)) != pipeline.vae.dtype:
        pipeline.vae.to(precision)
    return StableDiffusion(
        pipeline,
        description.text(pipeline),
        settings.channels_last,
        description.scheduler_config,
        budget,
        device,
        settings.true_guidance,
        settings.image_size,
    )


def part_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a part: that of the denoiser, but T5, whose activations overflow in fp16, in bf16."""
    return torch.bfloat16 if kind == "T5EncoderModel" and dtype == torch.float16 else dtype


def vae_dtype(description: Description, vae: Any) -> torch.dtype:
    """The precision of a VAE: that of the denoiser, or fp32 where its activations overflow in fp16."""
    settings, dtype = description.settings, DTYPES[description.settings.dtype]
    fits = description.family.half_vae or (settings.vae is not None and not vae.config.force_upcast)
    return dtype if fits or dtype != torch.float16 else torch.float32


def empty_models(description: Description, device: torch.device | str = "meta") -> dict[str, Any]:
    """The parts of a checkpoint on a device, without its weights."""
    settings, family = description.settings, description.family
    configs = {family.denoiser: description.denoiser, "vae": description.vae}
    models = {}
    for part in description.parts:
        kind = _class(family.parts[part])
        with torch.device(device):
            if part in configs:
                models[part] = kind.from_config(configs[part])
            else:
                found = config_file(
                    settings.described_by, settings.revision, f"{part}/config.json", description.where
                )
                models[part] = kind(kind.config_class.from_dict(found))
    return models


def _of_folder(description: Description, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    """The pipeline of a folder or hub id, with the parts that are given."""
    settings, where = description.settings, description.where
    name, revision, classes = settings.checkpoint, settings.revision, description.family.parts
    names = [part for part in description.parts if part not in given]
    files = hub.reach(where, name, lambda: by_folder(name, revision))
    variants = choose_variants({part: files.get(part, []) for part in names}, settings.variant, where)
    parts = {
        part: _part(
            classes[part],
            Place(name, revision, part),
            variants[part],
            part_dtype(classes[part], dtype),
            f"{where}: {part}",
        )
        for part in names
    }
    for part in set(classes) - set(description.parts):
        parts |= {part: None, description.family.tokenizers[part]: None}
    kind = _class(description.family.pipeline)
    return hub.reach(where, name, lambda: kind.from_pretrained(name, revision=revision, **given, **parts))


def _of_file(description: Description, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    """The pipeline of a single file, with the parts that are given."""
    settings, where = description.settings, description.where
    described_by = settings.described_by

    def load() -> Any:
        kind = _class(description.family.pipeline)
        try:
            return kind.from_single_file(settings.checkpoint, config=described_by, torch_dtype=dtype, **given)
        except NotImplementedError:  # a tensor that the file lacks is still on the meta device
            raise ValueError(
                f"the file lacks tensors {single_file.UNET}* or {single_file.VAE}* of the models that "
                f"{described_by} describes: damaged, or backbone.config of another model"
            ) from None

    pipeline = hub.reach(where, described_by, load)
    weights = read(Path(settings.checkpoint))
    parts = {"unet": single_file.UNET} | ({} if "vae" in given else {"vae": single_file.VAE})
    for part, prefix in parts.items():  # diffusers drops what it does not know
        has, needs = single_file.count(weights, prefix), len(getattr(pipeline, part).state_dict())
        if has != needs:
            raise ValueError(
                f"{where}: {has} tensors {prefix}* in the file, but {needs} in the {part} that "
                f"{described_by} describes; a damaged file, or backbone.config of another model"
            )
    return pipeline


def _class(name: str) -> Any:
    """A class of diffusers or transformers."""
    import diffusers
    import transformers

    return getattr(diffusers, name, None) or getattr(transformers, name)


def _vae(description: Description, dtype: torch.dtype) -> Any:
    """The autoencoder of `backbone.vae`."""
    place, where = description.vae_place, f"backbone.vae: {description.settings.vae}"
    files = hub.reach(where, place.name, lambda: by_folder(place.name, place.revision))
    variants = choose_variants({"vae": files.get(place.subfolder, [])}, None, where)
    return _part("AutoencoderKL", place, variants["vae"], dtype, where)


def _part(kind: str, place: Place, variant: str | None, dtype: torch.dtype, where: str) -> Any:
    """Load one model, all of whose tensors must come from its files."""
    options = {"revision": place.revision, "subfolder": place.subfolder, "variant": variant, "dtype": dtype}

    def load() -> Any:
        return _class(kind).from_pretrained(place.name, output_loading_info=True, **options)

    with _quiet():
        model, report = hub.reach(where, place.name, load)
    missing, unknown = (
        [name for name in report[key] if not name.endswith("position_ids")]
        for key in ("missing_keys", "unexpected_keys")
    )
    check_keys(missing, unknown, where)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own reports of missing tensors; `_part` gives one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_text(pipeline: Any, family: type[Family], where: str) -> None:
    """Check that tokenizers, text encoders and denoiser fit each other."""
    lengths = []
    for part, tokens in family.tokenizers.items():
        if getattr(pipeline, part) is None:
            continue
        encoder, tokenizer = getattr(pipeline, part).config, getattr(pipeline, tokens)
        if tokenizer is None:
            raise ValueError(f"{where}: {tokens} is missing")
        length, size = tokenizer.model_max_length, len(tokenizer)
        problems = {
            # transformers builds such a tokenizer from a folder without its files
            "has an empty vocabulary; its folder needs tokenizer.json, or vocab.json and merges.txt": (
                tokenizer.vocab_size <= len(tokenizer.all_special_ids)
            ),
            f"has {size} tokens, but {part} a vocabulary of {encoder.vocab_size}": size > encoder.vocab_size,
            "has no pad_token, with which prompts are padded": tokenizer.pad_token is None,
            f"has model_max_length {length!r}; give a number (77 for CLIP)": (
                not is_number(length) or length < 3
            ),
        }
        for problem, is_there in problems.items():
            if is_there:
                raise ValueError(f"{where}: {tokens} {problem}")
        if hasattr(encoder, "max_position_embeddings"):  # T5 has no such length
            lengths.append(min(length, encoder.max_position_embeddings))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{where}: tokenizer and tokenizer_2 pad to different lengths {lengths} (model_max_length)"
        )
    for key, (wanted, given) in family.widths(pipeline).items():
        if isinstance(wanted, int) and wanted != given:
            raise ValueError(
                f"{where}: {family.denoiser}/config.json: {key} is for {wanted} numbers of text, but the "
                f"text encoders give {given}"
            )
