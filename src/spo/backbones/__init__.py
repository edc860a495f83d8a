"""Text-to-image models behind `types.Backbone`: the only package that knows diffusers."""

from spo.backbones.description import Description, describe
from spo.backbones.families import FAMILIES
from spo.backbones.loading import load, load_described
from spo.backbones.stable_diffusion import StableDiffusion

__all__ = ["FAMILIES", "Description", "StableDiffusion", "describe", "load", "load_described"]
