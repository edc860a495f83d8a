"""What the scorers share, all being CLIPs: loading with one-line errors, pixels, texts and batches."""

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

from spo.data.images import CLIP_MEAN, CLIP_STD
from spo.runtime.hub import is_hub_id
from spo.runtime.messages import first_line
from spo.training import distributed

LONG = 16  # times as long as wide: such an image is cropped while it is resized, not after


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """Normalised pixels [3,size,size]: shortest side to `size` (PIL, bicubic), centre crop.

    Rounds as transformers' CLIPImageProcessor on PIL images does; OpenAI's own crop lies one pixel further
    when it cuts off 4n + 3 pixels.
    """
    image = rgb(image)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) > LONG * short:  # resized whole, 4000 x 1 pixels would take a gigabyte
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min(image.width, (left + size) * x), min(image.height, (top + size) * y))
        return normalise(to_unit(image.resize((size, size), Image.Resampling.BICUBIC, box)))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalise(to_unit(image.crop((left, top, left + size, top + size))))


def rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB.

    Raises:
        ValueError: pixels are floating-point numbers, of which Pillow makes black, NaN or not.
    """
    if image.mode == "F":
        raise ValueError("a scorer was given an image of floating-point pixels; give 8-bit RGB")
    return image.convert("RGB")


def to_unit(image: Image.Image) -> Tensor:
    """RGB pixels [3,h,w] in [0,1]."""
    flat = torch.frombuffer(bytearray(rgb(image).tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """Pixels [3,h,w] in [0,1] by CLIP's mean and standard deviation."""
    return (pixels - CLIP_MEAN) / CLIP_STD


def in_batches(
    score: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    name: str,
    batch_size: int,
) -> list[float]:
    """Scores of N images, each with its own prompt, `batch_size` at a time.

    Raises:
        ValueError: N images and another number of prompts, or a score that is not finite.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} images, but {len(prompts)} prompts; give one for each image")
    scores: list[float] = []
    parts = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    with tqdm(total=len(images), desc=name, unit="image") as bar, torch.no_grad():
        found = distributed.map_round_robin(lambda part: score(images[part], prompts[part]).tolist(), parts)
        for part, told in zip(parts, found, strict=True):
            for value, prompt in zip(told, prompts[part], strict=True):
                if not math.isfinite(value):
                    raise ValueError(
                        f"{name}: the score of prompt {prompt[:100]!r} is {value}; check the weights"
                    )
            scores += told
            bar.update(len(told))
    return scores


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Projected embeddings [B,D], not normalised, of `preprocess`ed pixels [B,3,h,w]."""
    return model.get_image_features(pixel_values=pixels).pooler_output


def load_model(
    name: str, revision: str | None, image_size: int, key: str, device: torch.device | str
) -> CLIPModel:
    """A frozen fp32 CLIP from a folder or a hub id; `key` is the params key that names it.

    Raises:
        ValueError: nothing there, weights missing or of other shapes, or another image size.
    """
    how: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    model, report = _reach(lambda: CLIPModel.from_pretrained(name, **how), name, key)
    check_keys(report["missing_keys"], (), f"{key}: {name}")
    check_image_size(model.config.vision_config.image_size, image_size, key.rpartition(".")[0])
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(name: str, revision: str | None, vocabulary: int, key: str) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder or a hub id, for a model with `vocabulary` token embeddings.

    Raises:
        ValueError: none there, or one with more tokens than the model knows.
    """
    tokenizer = _reach(lambda: CLIPTokenizer.from_pretrained(name, revision=revision or "main"), name, key)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ValueError(f"{key}: {name} holds no CLIP tokenizer (vocab.json, merges.txt or tokenizer.json)")
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{key}: {name} has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}")
    return tokenizer


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """int64 [B,length], padded and truncated. What follows the end token never reaches a CLIP's text
    embedding (attention is causal), so no mask is needed."""
    told = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return told.input_ids


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights, in place.

    Raises:
        ValueError: weights missing, unknown or of another shape.
    """
    try:
        told = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes; the second line names the first of them
        raise ValueError(f"{where} does not fit: {str(error).splitlines()[1].strip()[:200]}") from None
    check_keys(told.missing_keys, told.unexpected_keys, where)


def load_state(file: Path, where: str) -> Mapping[str, Tensor]:
    """The weights of a .safetensors file, or of a torch file that has them plain or under `state_dict`.

    Raises:
        ValueError: no such file, or one without weights.
    """
    if not file.exists():
        raise ValueError(f"{where} is not there; get it, or run `make repro` or `dvc pull data.dvc`")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise several kinds
        raise ValueError(f"{where} cannot be read ({first_line(error, 200)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{where} holds no weights by name")
    return state


def check_keys(missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Weights must fit: what is missing would stay random without a word."""
    for kind, keys in (("misses", sorted(missing)), ("holds unknown", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where} {kind} weights: {keys[0]}{more}; not a checkpoint of this model")


def check_image_size(of_model: int, wanted: int, key: str) -> None:
    if of_model != wanted:
        raise ValueError(f"{key}.image_size: is {wanted}, but the model's is {of_model}; set {of_model}")


def _reach(loader: Callable[[], Any], name: str, key: str) -> Any:
    if not Path(name).exists() and not is_hub_id(name):
        raise ValueError(f"{key}: no {name} there; run `make repro` or `dvc pull data.dvc`")
    try:
        return loader()
    except Exception as error:  # transformers, safetensors and the hub's client raise a dozen kinds
        reason = first_line(error, 200)
        raise ValueError(
            f"{key}: {name} cannot be loaded ({reason}); without a network, give the folder of a local copy"
        ) from None
