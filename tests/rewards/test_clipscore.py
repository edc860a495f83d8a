import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from spo import config, rewards
from spo.rewards.clipscore import ClipScore
from spo.rewards.pixels import preprocess


@pytest.fixture(scope="module")
def settings(pickscore_settings):
    """Any CLIP serves: here that of the tests of PickScore."""
    return config.ClipScoreConfig(model=pickscore_settings.model, image_size=48)


def cosine(settings, image, prompt: str) -> float:
    model = CLIPModel.from_pretrained(settings.model, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(settings.model)([prompt], return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=preprocess(image, 48)[None], **tokens)
    return float((out.image_embeds * out.text_embeds).sum())


def test_score_is_the_published_formula(settings, images, prompts) -> None:
    cosines = [cosine(settings, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert min(cosines) < 0 < max(cosines)  # both sides of the clamp are seen
    scores = ClipScore(settings).score(images, prompts)
    assert ClipScore.name == "clipscore"
    assert scores == pytest.approx([2.5 * max(value, 0) for value in cosines], abs=1e-5)
    percent = ClipScore(settings.model_copy(update={"weight": 100.0})).score(images, prompts)
    assert percent == pytest.approx([40 * score for score in scores], abs=1e-3)


def test_a_prefix_stands_before_each_prompt(settings, images, prompts) -> None:
    prefixed = ClipScore(settings.model_copy(update={"prefix": "a red"})).score(images, prompts)
    by_hand = ClipScore(settings).score(images, [f"a red {prompt}" for prompt in prompts])
    assert prefixed == by_hand != ClipScore(settings).score(images, prompts)


def test_mistakes_name_its_own_section(settings) -> None:
    with pytest.raises(ValueError, match="score.clipscore.model: .*nowhere: no such file"):
        ClipScore(settings.model_copy(update={"model": "data/nowhere"}))
    with pytest.raises(ValueError, match="score.clipscore.image_size: is 224, but the model's is 48"):
        ClipScore(settings.model_copy(update={"image_size": 224}))


def test_every_scorer_has_a_section_and_a_name(settings) -> None:
    assert tuple(rewards.CLASSES) == config.SCORERS
    assert rewards.load_scorer("clipscore", settings, "cpu", 4).name == "clipscore"
