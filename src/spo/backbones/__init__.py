"""Text-to-image models behind `types.Backbone`: the only package that knows diffusers and model families."""

from spo.backbones.stable_diffusion import StableDiffusion, load, load_aligned

__all__ = ["StableDiffusion", "load", "load_aligned"]
