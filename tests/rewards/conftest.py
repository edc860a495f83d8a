"""Small random checkpoints in the scorers' own formats, and pictures to score."""

import pytest
import torch
from PIL import Image

from spo import config
from spo.scenes import world
from tools.scenes import clips, tokenizer

SIZE = 48


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    return tokenizer.save(sorted(world.vocabulary()), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def pickscore_settings(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickscore")
    clips.save_pickscore(clips.fresh_clip(words, seed=1), words, folder)
    return config.PickScoreConfig(model=str(folder), image_size=SIZE)


@pytest.fixture(scope="session")
def hps_settings(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    torch.manual_seed(2)
    model, model_config, _ = clips.new_open_clip(words)
    clips.save_hps(model, model_config, words, folder)
    return config.HpsConfig(
        architecture=str(folder / "open_clip_config.json"),
        checkpoint=str(folder / "HPS_scenes_compressed.pt"),
        tokenizer=str(folder),
        image_size=SIZE,
    )


@pytest.fixture(scope="session")
def aesthetic_settings(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    clips.save_aesthetic(clips.RatedClip(clips.fresh_clip(words, seed=3)), words, folder)
    return config.AestheticConfig(clip=str(folder), head=str(folder / "head.pth"), image_size=SIZE)


@pytest.fixture(scope="session")
def images():
    """Noise of several shapes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 48), (64, 64), (50, 80), (97, 60), (48, 48)]
    pixels = [torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in shapes]
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.fixture(scope="session")
def prompts():
    """One for each of `images`."""
    return ["a red circle", "a blue square", "a small green triangle", "a red circle", "a large circle"]
