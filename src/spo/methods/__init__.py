"""The alignment methods by name: a new one is a file here, and a line below."""

from spo.methods import diffusion_dpo, spo
from spo.methods.spec import MethodSpec

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in (spo.SPEC, diffusion_dpo.SPEC)}
