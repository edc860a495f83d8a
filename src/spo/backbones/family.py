"""What the other modules need of a family of models: one class in a module of its own (families.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from spo.data.tokens import tokenize
from spo.diffusion.announced import schedule_of
from spo.runtime.transfer import send
from spo.types import Conditioning, NoiseSchedule

# (key, whether a value is supported, what another one means)
Rules = tuple[tuple[str, Callable[[Any], bool], str], ...]


def is_unset(value: Any) -> bool:
    return value is None or value is False


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


QUANTIZED: Rules = (("quantization_config", is_unset, "quantized weights; give those in fp16, bf16 or fp32"),)


class Family:
    """Facts of the family as class attributes; an instance has the text encoders of one checkpoint."""

    title: ClassVar[str]  # in model cards
    pipeline: ClassVar[str]  # the class of diffusers
    parts: ClassVar[Mapping[str, str]]  # the supported class of each part
    optional: ClassVar[Sequence[str]] = ()  # parts that a checkpoint may lack
    denoiser: ClassVar[str] = "unet"  # the part that predicts
    rules: ClassVar[Rules] = QUANTIZED  # of its config file
    tokenizers: ClassVar[Mapping[str, str]]  # of the text encoders
    given: ClassVar[Mapping[str, Any]] = {}  # what `from_pretrained` gets beside the parts
    half_vae: ClassVar[bool] = True  # whether the VAE's activations fit in fp16
    scheduler: ClassVar[Mapping[str, Any]] = {}  # what diffusers' pipeline sets, whatever the file says
    flow: ClassVar[bool] = False  # trained by flow matching, not as a discrete-time DDPM
    encodes_once: ClassVar[bool] = False  # text encoders too large to stay beside the denoiser
    # of single files; none: they are not read
    text_prefixes: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = ()

    encoders: list[Any]
    pooled_width: int  # of the text that the latent reward model compares with
    zeros: bool = False  # whether the empty prompt is encoded as zeros
    is_projected: bool  # whether that text went through a projection

    def __init__(self, pipeline: Any) -> None:
        """`pipeline` has the parts, tokenizers, `vae_scale_factor`, and model_index.json as `config`."""
        raise NotImplementedError

    @classmethod
    def latent_shape(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
        """The shape of square latents by the two config files."""
        raise NotImplementedError

    @classmethod
    def schedule(
        cls, scheduler_config: Mapping[str, Any], steps: int, denoiser: Mapping[str, Any], side: int
    ) -> NoiseSchedule:
        """The noise schedule for a sampler of so many steps; `side`: of the latents."""
        return schedule_of(scheduler_config, steps)

    @classmethod
    def check(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any], place: str) -> None:
        """Refuse a denoiser's config file at `place` that no rule for one key refuses."""
        raise NotImplementedError

    @staticmethod
    def widths(pipeline: Any) -> dict[str, tuple[Any, int]]:
        """Keys of the denoiser's config with the width of text that they announce, and the encoders'."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The text of B prompts, with gradients where an encoder is trained."""
        raise NotImplementedError

    def guided(
        self, denoiser: Any, conditioning: Conditioning, guidance: float, true_guidance: float | None
    ) -> tuple[Conditioning, float]:
        """As `types.Backbone.guided`."""
        return conditioning, guidance

    def run(
        self, denoiser: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int = 1
    ) -> Tensor:
        """The denoiser's output [B,C,h,w]; `copies` as in `types.Backbone.predict`."""
        raise NotImplementedError


def tokenized(tokenizer: Any, prompts: Sequence[str], encoder: Any) -> Any:
    """Tokenize to input_ids and attention_mask int64 [B,L] on the encoder's device, padded and truncated.

    L is the encoder's length where a tokenizer has no `model_max_length`.
    """
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenize(tokenizer, prompts, length)
    for name, values in tokens.items():
        tokens[name] = send(values, encoder.device)
    return tokens


def t5_states(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    """T5's last hidden states [B,length,width]; as in diffusers' pipelines, the padding is not masked."""
    ids = tokenize(tokenizer, prompts, length).input_ids
    states: Tensor = encoder(send(ids, encoder.device))[0]
    return states
