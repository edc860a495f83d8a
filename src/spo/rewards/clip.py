"""Shared code of the CLIP-based scorers: loading with one-line errors, preprocessing, batching."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from spo.data.preprocessing import OPENAI, Normalisation
from spo.data.prompts import flaw
from spo.data.tokens import tokenize
from spo.runtime import hub
from spo.runtime.messages import first_line

OPEN_CLIP = "score.hps.tokenizer"  # the key of the tokenizer whose model open_clip trained
LONG = 16  # aspect ratio above which an image is cropped and resized in one step, to bound the memory


def preprocess(image: Image.Image, size: int = 224, normalisation: Normalisation = OPENAI) -> Tensor:
    """Resize the shortest side to `size` (PIL, bicubic), centre-crop and normalise: [3,size,size].

    Rounds like transformers' CLIPImageProcessor on PIL images; OpenAI's own crop is one pixel off from it
    when 4n + 3 pixels are cut off.
    """
    image = rgb(image)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) > LONG * short:  # resizing all of 4000 x 1 pixels would take a gigabyte
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min(image.width, (left + size) * x), min(image.height, (top + size) * y))
        return normalise(to_unit(image.resize((size, size), Image.Resampling.BICUBIC, box)), normalisation)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalise(to_unit(image.crop((left, top, left + size, top + size))), normalisation)


def rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB.

    Raises:
        ValueError: floating-point pixels, which Pillow converts to black.
    """
    if image.mode == "F":
        raise ValueError("a scorer got an image with floating-point pixels; give 8-bit RGB")
    return image.convert("RGB")


def to_unit(image: Image.Image) -> Tensor:
    """Convert an image to RGB pixels [3,h,w] in [0,1]."""
    flat = torch.frombuffer(bytearray(rgb(image).tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def normalise(pixels: Tensor, normalisation: Normalisation = OPENAI) -> Tensor:
    """Normalise pixels [3,h,w] in [0,1] by a mean and a standard deviation, OpenAI's where none are given."""
    return (pixels - normalisation.mean) / normalisation.std


def in_batches(
    score: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    name: str,
    batch_size: int,
) -> list[float]:
    """Score N images, each with its own prompt, `batch_size` at a time.

    Raises:
        ValueError: another number of prompts than images, one that cannot be encoded, or a score that is not
            finite.
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"{name}: {len(images)} images, but {len(prompts)} prompts; give one prompt per image"
        )
    for prompt in prompts:
        if reason := flaw(prompt):
            raise ValueError(f"{name}: the prompt {ascii(prompt)[:100]} has {reason}; it cannot be encoded")
    scores: list[float] = []
    parts = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    single = len(parts) == 1  # a caller with many small batches shows a bar of its own
    with tqdm(total=len(images), desc=name, unit="image", disable=single) as bar, torch.no_grad():
        for part in parts:
            values = score(images[part], prompts[part]).tolist()
            for value, prompt in zip(values, prompts[part], strict=True):
                if not math.isfinite(value):
                    raise ValueError(
                        f"{name}: the score for prompt {prompt[:100]!r} is {value}; check its weights"
                    )
            scores += values
            bar.update(len(values))
    return scores


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed preprocessed pixels [B,3,h,w]: projected embeddings [B,D], not normalised."""
    return model.get_image_features(pixel_values=pixels).pooler_output


def load_model(
    name: str, revision: str | None, image_size: int, key: str, device: torch.device | str
) -> CLIPModel:
    """Load a frozen fp32 CLIP from a folder or hub id; `key` is the params key that names it.

    Raises:
        ValueError: no such model, weights that are missing or of another shape, or another image size.
    """
    how: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    model, report = reach(lambda: CLIPModel.from_pretrained(name, **how), name, key)
    check_keys(report["missing_keys"], (), f"{key}: {name}")
    check_image_size(model.config.vision_config.image_size, image_size, key.rpartition(".")[0])
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(name: str, revision: str | None, vocabulary: int, key: str) -> Any:
    """Load CLIP's tokenizer from a folder or hub id, for a model with `vocabulary` token embeddings.

    That of HPS reads text as open_clip does, all others as transformers.

    Raises:
        ValueError: no tokenizer, or one with more tokens than the model has embeddings.
    """
    tokenizer = reach(lambda: CLIPTokenizer.from_pretrained(name, revision=revision or "main"), name, key)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' result for a folder without one
        raise ValueError(f"{key}: {name} has no CLIP tokenizer (vocab.json, merges.txt or tokenizer.json)")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{key}: {name} has {len(tokenizer)} tokens, but the model's vocabulary {vocabulary}"
        )
    if key == OPEN_CLIP:
        from spo.rewards.open_clip_tokenizer import OpenClipTokenizer

        return OpenClipTokenizer(tokenizer)
    return tokenizer


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Tokenize prompts to int64 [B,length], padded and truncated.

    No mask is needed: attention is causal, so tokens after the end token do not affect the text embedding.
    """
    if not isinstance(tokenizer, CLIPTokenizer):  # open_clip's
        return tokenizer(list(prompts), length)
    return tokenize(tokenizer, prompts, length).input_ids


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights, in place.

    Raises:
        ValueError: weights that are missing, unknown or of another shape.
    """
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes; the second line names the first of them
        raise ValueError(f"{where} does not fit: {str(error).splitlines()[1].strip()[:200]}") from None
    check_keys(result.missing_keys, result.unexpected_keys, where)


def load_state(file: Path, where: str) -> Mapping[str, Tensor]:
    """Read the weights of a .safetensors file, or of a torch file, at its top or under `state_dict`.

    Raises:
        ValueError: no such file, or a file without weights.
    """
    if not file.exists():
        raise ValueError(f"{where}: no such file; run `make repro` or `dvc pull data.dvc`, or download it")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise several types
        raise ValueError(f"{where} cannot be read ({first_line(error, 200)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{where} is not a state dict (weights by name)")
    return state


def check_keys(missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Refuse missing and unexpected weights: missing ones would silently stay random.

    Raises:
        ValueError: the first of them, and their number.
    """
    for kind, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where} {kind} weights: {keys[0]}{more}; not a checkpoint of this model")


def check_image_size(of_model: int, configured: int, key: str) -> None:
    """Compare the configured image size with the model's.

    Raises:
        ValueError: they differ.
    """
    if of_model != configured:
        raise ValueError(f"{key}.image_size: is {configured}, but the model's is {of_model}; set {of_model}")


def reach(loader: Callable[[], Any], name: str, key: str) -> Any:
    """Load a folder or hub id `name`; `key` is the params key that names it.

    Raises:
        ValueError: no such folder or hub id, or one that cannot be loaded.
    """
    try:
        hub.check(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    try:
        return loader()
    except Exception as error:  # transformers, safetensors and the hub's client raise many types
        raise ValueError(f"{key}: {name} cannot be loaded ({hub.reason(name, error)})") from None
