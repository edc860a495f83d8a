import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from spo.rewards.aesthetic import Aesthetic, AestheticHead
from spo.rewards.pixels import preprocess

KEYS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


@pytest.fixture(scope="module")
def scorer(aesthetic_settings):
    return Aesthetic(aesthetic_settings)


def by_hand(state: dict[str, torch.Tensor], embeddings: np.ndarray) -> np.ndarray:
    """The released head in numpy: normalise, then five matrix products."""
    x = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for key in KEYS:
        x = x @ state[f"{key}.weight"].double().numpy().T + state[f"{key}.bias"].double().numpy()
    return x[:, 0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dimension", [5, 768])
def test_head_is_what_its_file_says(tmp_path, dimension: int, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (dimension, 1024, 128, 64, 16, 1)
    state = {}
    for key, into, out in zip(KEYS, sizes[:-1], sizes[1:], strict=True):
        state[f"{key}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"{key}.bias"] = torch.randn(out, generator=generator)
    file = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)

    embeddings = 7 * torch.randn(16, dimension, generator=generator)
    head = AestheticHead.load(file)
    actual, expected = head(embeddings), by_hand(state, embeddings.double().numpy())
    assert actual.shape == (16,)
    assert np.abs(actual.numpy() - expected).max() / np.abs(expected).max() < 1e-5
    assert torch.allclose(head(3 * embeddings), actual, atol=1e-5)  # it normalises itself
    assert torch.equal(head(embeddings), actual)  # no dropout


def test_score_is_that_of_the_raw_models(scorer, aesthetic_settings, images, prompts) -> None:
    clip = CLIPModel.from_pretrained(aesthetic_settings.clip, dtype=torch.float32).eval()
    with torch.no_grad():
        vision = clip.vision_model(pixel_values=preprocess(images[2], 48)[None]).pooler_output
        embedding = clip.visual_projection(vision)
    state = torch.load(aesthetic_settings.head, weights_only=True)
    assert scorer.name == "aesthetic"
    expected = by_hand(state, embedding.double().numpy())[0]
    assert scorer.score(images[2:3], prompts[2:3])[0] == pytest.approx(expected, abs=1e-5)


def test_batch_size_and_prompts_do_not_change_a_score(aesthetic_settings, images, prompts) -> None:
    scores = [Aesthetic(aesthetic_settings, batch_size=n).score(images, prompts) for n in (1, 2, 32)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and scores[2] == pytest.approx(scores[0], abs=1e-5)
    assert len(set(scores[0])) == len(images)
    assert Aesthetic(aesthetic_settings, batch_size=32).score(images, ["other"] * 5) == scores[2]


def test_an_embedding_that_is_not_finite_stops(aesthetic_settings, images) -> None:
    scorer = Aesthetic(aesthetic_settings)
    scorer.clip.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="aesthetic: an embedding of its CLIP is not finite"):
        scorer.normalised(scorer.features(images))


def test_lengths_must_agree(scorer, images, prompts) -> None:
    with pytest.raises(ValueError, match="^aesthetic: 5 images, but 1 prompts"):
        scorer.score(images, prompts[:1])


def test_mistakes_are_one_line(aesthetic_settings, tmp_path) -> None:
    state = torch.load(aesthetic_settings.head, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "layers.7.bias"}, tmp_path / "fewer.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    wide = {**state, "layers.0.weight": torch.zeros(1024, 768)}
    torch.save(wide, tmp_path / "wide.pth")
    cases = {
        "nowhere.pth: no such file": {"head": "nowhere.pth"},
        "fewer.pth lacks weights: layers.7.bias;": {"head": str(tmp_path / "fewer.pth")},
        "other.pth lacks weights: layers.0.weight;": {"head": str(tmp_path / "other.pth")},
        "wide.pth takes embeddings of 768 numbers, but .* gives 96": {"head": str(tmp_path / "wide.pth")},
        "score.aesthetic.clip: nowhere: cannot be loaded .nowhere: no such file": {"clip": "nowhere"},
        "score.aesthetic.clip: .* cannot be loaded": {"clip": str(tmp_path)},
        "score.aesthetic.image_size: is 224, but the model's is 48": {"image_size": 224},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            Aesthetic(aesthetic_settings.model_copy(update=change))
        assert "\n" not in str(error.value)
