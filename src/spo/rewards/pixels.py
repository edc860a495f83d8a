"""Convert images to the pixels that a scorer's image encoder takes."""

import torch
from PIL import Image
from torch import Tensor

from spo.data.images import resize_and_crop
from spo.data.preprocessing import OPENAI, Normalisation


def preprocess(image: Image.Image, size: int = 224, normalisation: Normalisation = OPENAI) -> Tensor:
    """Resize the shortest side to `size` (PIL, bicubic), centre-crop and normalise: [3,size,size].

    Rounds like transformers' CLIPImageProcessor on PIL images; OpenAI's own crop is one pixel off from it
    when 4n + 3 pixels are cut off.
    """
    image = rgb(image)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    return normalise(to_unit(resize_and_crop(image, (width, height), (size, size))), normalisation)


def rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; floating-point pixels, which Pillow converts to black, are refused."""
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
