import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from spo.rewards.pickscore import PickScore
from spo.rewards.pixels import preprocess


@pytest.fixture(scope="module")
def scorer(pickscore_settings):
    return PickScore(pickscore_settings)


@pytest.fixture
def copied(pickscore_settings, tmp_path):
    """The model's folder, to be spoilt."""
    return shutil.copytree(pickscore_settings.model, tmp_path / "model")


def test_score_is_that_of_the_raw_model(scorer, pickscore_settings, images, prompts) -> None:
    model = CLIPModel.from_pretrained(pickscore_settings.model, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(pickscore_settings.model)
    with torch.no_grad():
        output = model(
            pixel_values=preprocess(images[2], 48)[None],
            **tokenizer([prompts[2]], padding=True, return_tensors="pt"),
        )
    assert scorer.name == "pickscore"
    assert scorer.score(images[2:3], prompts[2:3])[0] == pytest.approx(
        float(output.logits_per_image), abs=1e-5
    )


def test_batch_size_and_neighbours_do_not_change_a_score(pickscore_settings, images, prompts) -> None:
    scores = [PickScore(pickscore_settings, batch_size=n).score(images, prompts) for n in (1, 2, 32)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and scores[2] == pytest.approx(scores[0], abs=1e-5)
    assert len(set(scores[0])) == len(images)


def test_the_prompt_matters_and_a_long_one_is_cut(scorer, images) -> None:
    short, other, long, longer = scorer.score(
        [images[0]] * 4, ["a red circle", "a blue square", "red " * 30, "red " * 200]
    )
    assert short != other and long == pytest.approx(longer, abs=1e-5)


def test_lengths_must_agree(scorer, images, prompts) -> None:
    with pytest.raises(ValueError, match="^pickscore: 5 images, but 4 prompts"):
        scorer.score(images, prompts[:4])


def test_tokenizer_from_another_folder(pickscore_settings, scorer, copied, tmp_path, images, prompts) -> None:
    (tmp_path / "processor").mkdir()
    for file in copied.glob("*token*"):
        file.rename(tmp_path / "processor" / file.name)
    for file in [*copied.glob("vocab*"), *copied.glob("merges*")]:
        file.rename(tmp_path / "processor" / file.name)
    settings = pickscore_settings.model_copy(update={"model": str(copied)})
    with pytest.raises(ValueError, match="score.pickscore.model: .* has no CLIP tokenizer"):
        PickScore(settings)
    apart = settings.model_copy(update={"processor": str(tmp_path / "processor")})
    assert PickScore(apart).score(images, prompts) == scorer.score(images, prompts)


def test_mistakes_are_one_line(pickscore_settings, copied) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "logit_scale"},
        copied / "model.safetensors",
        {"format": "pt"},
    )
    cases = {
        "score.pickscore.model: .*nowhere: no such file": {"model": "data/nowhere"},
        "score.pickscore.image_size: is 224, but the model's is 48": {"image_size": 224},
        "lacks weights: logit_scale": {"model": str(copied)},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            PickScore(pickscore_settings.model_copy(update=change))
        assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_name_the_prompt(pickscore_settings, images, prompts) -> None:
    scorer = PickScore(pickscore_settings)
    scorer.model.logit_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="pickscore: the score for prompt 'a red circle' is nan"):
        scorer.score(images, prompts)
