"""The header of a .safetensors file, in the keys of ModelSpec and those that A1111 reads."""

from typing import NamedTuple


class BaseModel(NamedTuple):
    """A base model by the names of kohya's trainer and of ModelSpec."""

    version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture
    is_v2: bool
    prediction: str  # epsilon or v

    def checkpoint(self, title: str) -> dict[str, str]:
        """The header of a whole model."""
        return {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": self.architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.title": title,
            "modelspec.prediction_type": self.prediction,
        }

    def adapter(self, title: str, ranks: set[int], alphas: set[float]) -> dict[str, str]:
        """The header of a LoRA; several ranks or alphas are `Dynamic`, as in kohya's own files."""
        rank, alpha = (f"{min(found):g}" if len(found) == 1 else "Dynamic" for found in (ranks, alphas))
        return {
            **self.checkpoint(title),
            "modelspec.architecture": f"{self.architecture}/lora",
            "ss_base_model_version": self.version,
            "ss_v2": str(self.is_v2),
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": alpha,
            "ss_output_name": title,
        }


def base_model(family: str, text_width: int, prediction_type: str) -> BaseModel:
    """The base model of a family; `text_width` is the UNet's cross_attention_dim, 1,024 in SD 2."""
    prediction = "v" if prediction_type == "v_prediction" else "epsilon"
    if family == "sdxl":
        return BaseModel("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", False, prediction)
    is_v2 = text_width == 1024
    version, architecture = ("sd_v2", "stable-diffusion-v2") if is_v2 else ("sd_v1", "stable-diffusion-v1")
    return BaseModel(version, architecture, is_v2, prediction)
