import gzip
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import save_file

from spo.rewards import clip
from spo.rewards.hps import Hps, preprocess, token_ids
from spo.rewards.pixels import normalise


@pytest.fixture(scope="module")
def scorer(hps_settings):
    return Hps(hps_settings)


def weights(settings) -> dict[str, torch.Tensor]:
    return torch.load(settings.checkpoint, weights_only=True)["state_dict"]


def test_preprocess_pads_the_short_side_with_black() -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    pixels = preprocess(image, 10)
    black, white = (
        normalise(torch.full((3, 1, 1), v)).expand(3, rows, 10) for v, rows in ((0.0, 2), (1.0, 5))
    )
    assert pixels.shape == (3, 10, 10)
    assert torch.equal(pixels[:, :2], black) and torch.allclose(pixels[:, 2:7], white, atol=1e-5)
    assert torch.equal(pixels[:, 7:9], black)  # five rows of padding: two above, three below


def test_preprocess_keeps_what_a_centre_crop_would_cut() -> None:
    image = Image.new("RGB", (48, 16))
    image.paste((255, 0, 0), (0, 0, 8, 16))
    assert float(preprocess(image, 24)[0].max()) > 1.5


@pytest.mark.parametrize("shape", [(4000, 1), (1, 4000)])
def test_a_line_of_pixels_stays_one_pixel_wide(shape) -> None:
    """Red on black: the padding is below the least red that there is, but for the line in the middle."""
    red = preprocess(Image.new("RGB", shape, (255, 0, 0)), 24)[0] > 0
    line = red[11] if shape[1] == 1 else red[:, 11]
    assert int(red.sum()) == 24 and bool(line.all())


def test_score_is_that_of_the_raw_model(scorer, hps_settings, words, images, prompts) -> None:
    model = open_clip.CLIP(**json.loads(Path(hps_settings.architecture).read_text(encoding="utf-8"))).eval()
    model.load_state_dict(weights(hps_settings))
    ids = words([prompts[3]], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        image = model.encode_image(preprocess(images[3], 48)[None], normalize=True)
        text = model.encode_text(ids, normalize=True)
    assert scorer.name == "hps"
    expected = 100 * float((image * text).sum())
    assert scorer.score(images[3:4], prompts[3:4])[0] == pytest.approx(expected, abs=1e-4)


def test_batch_size_and_neighbours_do_not_change_a_score(hps_settings, images, prompts) -> None:
    scores = [Hps(hps_settings, batch_size=n).score(images, prompts) for n in (1, 2, 32)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4) and scores[2] == pytest.approx(scores[0], abs=1e-4)
    assert len(set(scores[0])) == len(images)


def test_logit_scale_does_not_matter(hps_settings, scorer, images, prompts) -> None:
    other = Hps(hps_settings)
    other.model.logit_scale.data.fill_(0.5)
    assert other.score(images, prompts) == scorer.score(images, prompts)


def test_lengths_must_agree(scorer, images, prompts) -> None:
    with pytest.raises(ValueError, match="^hps: 4 images, but 5 prompts"):
        scorer.score(images[:4], prompts)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_plain_weights_and_safetensors_serve_too(
    hps_settings, scorer, tmp_path, images, prompts, suffix
) -> None:
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights(hps_settings), file)
    other = Hps(hps_settings.model_copy(update={"checkpoint": str(file)}))
    assert other.score(images, prompts) == scorer.score(images, prompts)


def test_open_clips_own_names_bring_their_tokenizer(monkeypatch, hps_settings, tmp_path, images) -> None:
    """A small architecture under a name, as ViT-H-14 is one."""
    small = json.loads(Path(hps_settings.architecture).read_text(encoding="utf-8"))
    small["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    (tmp_path / "small.json").write_text(json.dumps(small))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"small": small})
    model = open_clip.CLIP(**small).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "small.pt")
    settings = hps_settings.model_copy(
        update={"architecture": "small", "checkpoint": str(tmp_path / "small.pt"), "tokenizer": None}
    )
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(["Two dogs"]), normalize=True)
        expected = 100 * (model.encode_image(preprocess(images[0], 48)[None], normalize=True) * text).sum()
    assert Hps(settings).score(images[:1], ["Two dogs"])[0] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match="score.hps.tokenizer: must name a folder"):
        Hps(settings.model_copy(update={"architecture": str(tmp_path / "small.json")}))


def test_a_folder_s_tokenizer_reads_text_as_open_clip_s(tmp_path) -> None:
    merges = gzip.open(default_bpe()).read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    folder = clip.load_tokenizer(str(tmp_path), None, len(vocabulary), "score.hps.tokenizer")
    texts = [
        "fish &amp; chips",
        "a cat\u2019s toy",
        "\u201cquoted\u201d \ufb01sh",
        "\uff11\uff12 \uff57ide",
        "a  CAT!!",
    ]
    texts += ["a \u2603 r\u00e9sum\u00e9", "don't y'all'd've 3.5", "", "word " * 100]
    expected = open_clip.get_tokenizer("ViT-H-14")(texts)
    assert torch.equal(token_ids(folder, texts, 77), expected)


def test_mistakes_are_one_line(hps_settings, tmp_path) -> None:
    state = weights(hps_settings)
    spoilt = {
        "fewer": {k: v for k, v in state.items() if k != "visual.proj"},
        "more": {**state, "extra": torch.zeros(1)},
        "other": {**state, "visual.proj": torch.zeros(2, 2)},
    }
    for name, content in spoilt.items():
        torch.save({"state_dict": content}, tmp_path / f"{name}.pt")
    (tmp_path / "not.json").write_text("{")
    (tmp_path / "strange.json").write_text('{"hidden_size": 3}')
    (tmp_path / "list.json").write_text("[3]")
    (tmp_path / "number.json").write_text('{"model_cfg": {}, "preprocess_cfg": 3}')
    cases = {
        "list.json: must be an object, not list": {"architecture": str(tmp_path / "list.json")},
        "number.json: preprocess_cfg must be an object, not 3": {
            "architecture": str(tmp_path / "number.json")
        },
        "score.hps.architecture: 'ViT-Q' is not a model of open_clip": {"architecture": "ViT-Q"},
        "score.hps.architecture: nowhere.json: no config there": {"architecture": "nowhere.json"},
        "not.json: truncated or invalid JSON": {"architecture": str(tmp_path / "not.json")},
        "strange.json is not a CLIP config": {"architecture": str(tmp_path / "strange.json")},
        "score.hps.checkpoint: nowhere.pt: no such file": {"checkpoint": "nowhere.pt"},
        "fewer.pt lacks weights: visual.proj;": {"checkpoint": str(tmp_path / "fewer.pt")},
        "more.pt has unknown weights: extra;": {"checkpoint": str(tmp_path / "more.pt")},
        "other.pt does not fit: size mismatch for visual.proj": {"checkpoint": str(tmp_path / "other.pt")},
        "score.hps.tokenizer: nowhere: cannot be loaded .nowhere: no such file": {"tokenizer": "nowhere"},
        "score.hps.tokenizer: .* has no CLIP tokenizer": {"tokenizer": str(tmp_path)},
        "score.hps.image_size: is 224, but the model's is 48": {"image_size": 224},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            Hps(hps_settings.model_copy(update=change))
        assert "\n" not in str(error.value)
