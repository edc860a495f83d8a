"""ImageReward against the released forward pass in plain torch (tests/helpers/blip.py)."""

import json

import blip
import pytest
import torch
from PIL import Image

from spo.rewards import imagereward, pixels
from spo.rewards.imagereward import ImageReward

PROMPTS = ["a red circle", "a blue square", "red circles", "", "a red square a blue circle"]
CLS, SEP, PAD = 2, 3, 0
RED, CIRCLE, PLURAL = 6, 8, 10
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return blip.save(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def scorer(settings):
    return ImageReward(settings)


@pytest.fixture
def spoilt(tmp_path):
    """Files to be spoilt."""
    return blip.save(tmp_path)


def tokens(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.tensor([ids + [PAD] * (imagereward.LENGTH - len(ids))])
    return row, (row != PAD).long()


def test_score_is_that_of_the_released_forward_pass(scorer, images) -> None:
    grey = Image.new("RGB", (60, 48), (51, 102, 204))
    reference = blip.Reference(blip.random_state())
    ids, mask = tokens([CLS, RED, CIRCLE, PLURAL, SEP])
    # (.2 - .48145466) / .26862954, (.4 - .4578275) / .26130258, (.8 - .40821073) / .27577711
    values = torch.tensor([-1.0477428, -0.2213047, 1.4206736])
    plain = values.view(1, 3, 1, 1).expand(1, 3, blip.SIZE, blip.SIZE)
    expected = float(reference.reward(plain, ids, mask)[0])
    assert scorer.name == "imagereward"
    assert scorer.score([grey], ["Red circles"])[0] == pytest.approx(expected, abs=1e-4)

    noise = images[0]  # 48 x 48: neither resized nor cropped
    flat = torch.frombuffer(bytearray(noise.tobytes()), dtype=torch.uint8).view(48, 48, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = float(reference.reward(((flat / 255 - mean) / std)[None], ids, mask)[0])
    assert scorer.score([noise], ["red circles"])[0] == pytest.approx(expected, abs=1e-4)


def test_every_weight_of_the_checkpoint_counts(settings, scorer, images) -> None:
    """A key that is mapped to the wrong place, or not at all, changes another score or none."""
    before = scorer.score(images[:1], PROMPTS[:1])[0]
    state, after = blip.random_state(), ImageReward(settings)
    for name in blip.shapes():
        if name.endswith("key.bias") or "s.0." in name or "layer.0." in name:
            continue  # softmax does not see what is added to all logits; the second layer stands for both
        changed = {
            **state,
            name: state[name] + 0.1 * torch.cos(torch.arange(state[name].numel())).view_as(state[name]),
        }
        ids, mask = tokens([CLS, 5, RED, CIRCLE, SEP])
        shown = pixels.preprocess(images[0], blip.SIZE)[None]
        expected = float(blip.Reference(changed).reward(shown, ids, mask)[0])
        after.model.load_state_dict(imagereward.renamed(changed))
        assert after.score(images[:1], PROMPTS[:1])[0] == pytest.approx(expected, abs=1e-4), name
        assert (abs(expected - before) > 1e-5) == ("_proj." not in name), name


def test_reward_is_normalised_by_hand_derived_values(settings, tmp_path, images) -> None:
    """The head's last bias alone is the raw reward: (1.2 - .16717362830) / 1.0333394966 = .99950343."""
    state = blip.random_state()
    state["mlp.layers.7.weight"].zero_()
    state["mlp.layers.7.bias"].fill_(1.2)
    torch.save(state, tmp_path / "head.pt")
    constant = ImageReward(settings.model_copy(update={"checkpoint": str(tmp_path / "head.pt")}))
    assert constant.score(images[:2], PROMPTS[:2]) == pytest.approx([0.99950343] * 2, abs=1e-6)


def test_batch_size_and_neighbours_do_not_change_a_score(settings, images) -> None:
    scores = [ImageReward(settings, batch_size=n).score(images, PROMPTS) for n in (1, 2, 32)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and scores[2] == pytest.approx(scores[0], abs=1e-5)
    assert len(set(scores[0])) == len(images)


def test_thirty_five_tokens_count(scorer, images) -> None:
    short, long, longer = scorer.score([images[0]] * 3, ["red " * 32, "red " * 33, "red " * 33 + "blue"])
    assert short != long and long == longer


def test_the_files_that_it_reads_are_pinned(settings) -> None:
    assert [name for name, _ in settings.sources().values()] == [
        settings.checkpoint,
        settings.med_config,
        settings.tokenizer,
    ]


def changed_state(settings, change) -> None:
    state = blip.random_state()
    change(state)
    torch.save(state, settings.checkpoint)


def refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ImageReward(settings)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_one_line(spoilt) -> None:
    changed_state(
        spoilt, lambda state: state.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight")
    )
    refused(spoilt, "score.imagereward.checkpoint: .* lacks weights: text.encoder.layer.1.crossattention")
    changed_state(spoilt, lambda state: state.update({"blip.other": torch.zeros(1)}))
    refused(spoilt, "has unknown weights: blip.other")
    changed_state(spoilt, lambda state: state.pop("blip.visual_encoder.pos_embed"))
    refused(spoilt, "lacks weights: pos_embed")
    changed_state(spoilt, lambda state: state.update({"mlp.layers.7.weight": torch.zeros(1, 17)}))
    refused(spoilt, "does not fit")
    refused(spoilt.model_copy(update={"checkpoint": "nowhere.pt"}), "nowhere.pt: no such file")
    changed_state(spoilt, lambda state: None)
    refused(
        spoilt.model_copy(update={"image_size": 224}),
        "score.imagereward.image_size: is 224, but the model's is 48",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_cross_attention": False}, "add_cross_attention is False; only True is supported"),
        ({"add_type_embeddings": True}, "add_type_embeddings is True"),
        ({"rotary": 1}, "unknown key 'rotary'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 3}, "lacks weights"),
    ],
)
def test_a_config_is_honoured_or_refused(spoilt, tmp_path, change, message: str) -> None:
    (tmp_path / "med_config.json").write_text(json.dumps({**blip.MED_CONFIG, **change}))
    refused(spoilt, message)


def test_a_config_that_is_missing_or_incomplete_is_one_line(spoilt, tmp_path) -> None:
    content = {k: v for k, v in blip.MED_CONFIG.items() if k != "hidden_act"}
    (tmp_path / "med_config.json").write_text(json.dumps(content))
    refused(spoilt, "med_config: .*med_config.json: no key 'hidden_act'")
    (tmp_path / "med_config.json").write_text("[]")
    refused(spoilt, "med_config.json: must be an object, not list")
    (tmp_path / "med_config.json").write_text("{")
    refused(spoilt, "truncated or invalid JSON")
    (tmp_path / "med_config.json").unlink()
    refused(spoilt, "med_config: .*: no config there")


def test_a_tokenizer_that_does_not_fit_is_one_line(spoilt, tmp_path) -> None:
    (tmp_path / "bert/vocab.txt").write_text("\n".join(blip.WORDS[:-1]) + "\n")
    refused(
        spoilt,
        r"score.imagereward.tokenizer: .* has 12 tokens with \[DEC\] and \[ENC\], but .* 13 embeddings",
    )
    (tmp_path / "empty").mkdir()
    refused(spoilt.model_copy(update={"tokenizer": str(tmp_path / "empty")}), "score.imagereward.tokenizer")
    refused(spoilt.model_copy(update={"tokenizer": "data/nowhere"}), "data/nowhere: no such file or folder")
