"""The families of models by their names in `backbone.family`."""

from spo.backbones.family import Family
from spo.backbones.flux import Flux
from spo.backbones.sd import Sd
from spo.backbones.sd3 import Sd3
from spo.backbones.sdxl import Sdxl

FAMILIES: dict[str, type[Family]] = {"sd": Sd, "sdxl": Sdxl, "sd3": Sd3, "flux": Flux}
