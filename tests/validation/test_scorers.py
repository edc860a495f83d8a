"""The scorers of a training's validations, with small random models of the released formats."""

import pytest
import small_experiment
import torch
import yaml
from PIL import Image

from spo import config, rewards
from spo.rewards.aesthetic import Aesthetic
from spo.scenes import world
from spo.scenes.oracle import Perception
from spo.training import placement
from spo.validation.scorers import Scorers
from spo.validation.scoring import score_images
from tools.scenes import tokenizer

PROMPTS = [
    "a large red circle above a small blue ring on sand",
    "a small blue ring above a large red circle on sand",
    "a large blue circle above a small red ring on sand",
]


@pytest.fixture
def params(tmp_path, monkeypatch) -> config.Params:
    monkeypatch.chdir(tmp_path)
    words = tokenizer.save(sorted(world.vocabulary()), tmp_path / "words")
    small_experiment.inputs(tmp_path / "data", words)
    raw = yaml.safe_load(config.preset("smoke"))
    torch.manual_seed(0)
    Perception(16).save(tmp_path / "oracle")
    raw["score"] |= {"batch_size": 2, "oracle": "oracle"}
    return config.validate(raw)


@pytest.fixture
def images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(256, (48, 48, 3), generator=generator, dtype=torch.uint8) for _ in PROMPTS]
    return [Image.fromarray(p.numpy()) for p in pixels]


def test_each_is_loaded_once_and_scores_as_if_it_were_fresh(params, images, monkeypatch) -> None:
    expected = score_images(params, images, PROMPTS, "cpu")
    loaded, load = [], rewards.load_scorer
    monkeypatch.setattr(rewards, "load_scorer", lambda name, *rest: loaded.append(name) or load(name, *rest))
    scorers = Scorers(params, "cpu")
    for _ in range(2):
        scores, embeddings = scorers.score(images, PROMPTS)
        assert scores == expected and list(scores) == list(expected)
    assert sorted(loaded) == sorted(params.score.configured())
    own = Aesthetic(params.score.aesthetic, batch_size=2)
    assert torch.equal(embeddings, own.normalised(own.features(images)))


def test_the_clip_of_the_aesthetic_score_sees_each_image_once(params, images, monkeypatch) -> None:
    seen, original = [], Aesthetic.pixels
    monkeypatch.setattr(Aesthetic, "pixels", lambda self, part: seen.extend(part) or original(self, part))
    Scorers(params, "cpu").score(images, PROMPTS)
    assert len(seen) == len(images) and all(a is b for a, b in zip(seen, images, strict=True))


def test_at_most_one_is_on_the_device_and_none_after_it(params, images, monkeypatch) -> None:
    """Each move is noted; the models of a scorer lie where the last one put them."""
    places, most = {}, []

    def move(module, place) -> None:
        places[id(module)] = str(place)
        most.append(sum(p != "cpu" for p in places.values()))

    scorers = Scorers(params, "cpu")
    scorers.score(images, PROMPTS)
    for models in scorers._models.values():
        assert models
        models[:] = [(model, "cuda") for model, _ in models]
    monkeypatch.setattr(placement, "move", move)
    scorers.score(images, PROMPTS)
    assert max(most) == max(map(len, scorers._models.values())) and set(places.values()) == {"cpu"}
