"""A step of each training at the real sizes of SD 1.5 and SDXL, in bf16, with random weights; docs/gpu.md."""

import json

import pytest
import real_sizes
import torch

from spo import backbones, config
from spo.preference.model import StepAwarePreferenceModel
from tools.scenes import clips, tokenizer


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_step_of_each_training_in_bf16(family: str, tmp_path, capsys) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    from spo.scenes import world

    words = tokenizer.save(world.vocabulary(), tmp_path)
    with torch.device("cuda"):
        pipeline = (real_sizes.sd15 if family == "sd" else real_sizes.sdxl)(words)
        preference = real_sizes.clip_h(words)
    model = real_sizes.backbone(pipeline, family, "cuda", torch.bfloat16)
    measured = real_sizes.measure(family, model, preference, words)
    with capsys.disabled():
        print(
            f"\n{family} on {torch.cuda.get_device_name()}, torch {torch.__version__}: {json.dumps(measured)}"
        )
    assert set(measured) == {"spm", "diffusion_dpo", "spo"}


@pytest.mark.smoke
@pytest.mark.nightly
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_same_at_a_small_size_on_a_cpu(family: str, checkpoints, words) -> None:
    """So that what is timed on a GPU is known to run."""
    settings = config.Backbone(family=family, checkpoint=str(checkpoints[family]), dtype="bf16")
    preference = StepAwarePreferenceModel(clips.fresh_clip(words, seed=0))
    measured = real_sizes.measure(family, backbones.load(settings, "cpu"), preference, words, n=1)
    assert measured["diffusion_dpo"]["updates"] == 1 and measured["spo"]["updates"] >= 5


def test_the_real_sizes_are_those_of_the_released_models(words) -> None:
    """Parameters of the checkpoints on the hub: UNets 859,520,964 and 2,567,463,684, VAE 83,653,863."""
    with torch.device("meta"):
        small, large = real_sizes.sd15(words), real_sizes.sdxl(words)
        preference = real_sizes.clip_h(words)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(small.unet) == 859_520_964 and count(large.unet) == 2_567_463_684
    assert count(small.vae) == count(large.vae) == 83_653_863
    vision = preference.model.vision_model
    assert count(vision) > 630_000_000  # ViT-H/14 (632 M) and its modulation
