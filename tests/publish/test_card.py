"""The card of an aligned model: base, licence, data, recipe, scores, samples."""

from pathlib import Path

import pytest
import yaml

from spo import config
from spo.evaluation import results
from spo.publish import card as cards
from spo.runtime import licence

ROW = {"method": "spo", "baseline": "base", "metric": "hps", "mean_method": 27.1, "mean_baseline": 26.0}
ROW |= {"mean_difference": 1.1, "ci_low": 0.9, "ci_high": 1.3, "win_rate": 0.8125, "n": 256}


def params(**backbone: str) -> config.Params:
    raw = yaml.safe_load(config.preset("sd15-scratch"))
    return config.validate({**raw, "backbone": raw["backbone"] | backbone})


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_it_has_base_licence_data_recipe_and_counts_but_no_times() -> None:
    card = cards.of_training(
        params(revision="abc123"), "spo", {"updates": 7, "seconds": 12.5, "training_seconds": 11.0}
    )
    head = front_matter(card)
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["license"] == "creativeml-openrail-m" and head["library_name"] == "diffusers"
    assert head["tags"] == ["text-to-image", "lora", "spo"]
    preset = params()
    named = ("revision abc123", preset.prompts.train, preset.pairs.source, "- updates: 7", "candidates: 4")
    for text in named:
        assert text in card, text
    assert "12.5" not in card and "11.0" not in card and "load_lora_weights" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["lora"]["rank"] == 4 and recipe["beta"] == 10


def test_a_full_fine_tune_is_loaded_otherwise() -> None:
    raw = yaml.safe_load(config.preset("sd15-scratch"))
    raw["align"]["spo"]["lora"] = None
    card = cards.of_training(config.validate(raw), "spo", {})
    assert "from_pretrained" in card and "load_lora_weights" not in card
    assert "lora" not in front_matter(card)["tags"]


def test_the_licence_is_that_of_the_checkpoint_s_own_card(tmp_path: Path) -> None:
    assert licence.stated(tmp_path) is None
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
    card = cards.of_training(params(checkpoint=str(tmp_path), license="other"), "spo", {})
    assert front_matter(card)["license"] == "mit"
    for broken in (
        "# no front matter\n",
        "---\n- a list\n---\n",
        "---\n: [\n---\n",
        "---\nlicense: [a]\n---\n",
    ):
        readme.write_text(broken)
        assert licence.stated(tmp_path) is None
    raw = yaml.safe_load(config.preset("scenes"))
    assert "not stated; ask its makers" in cards.of_training(config.validate(raw), "spo", {})


def test_scores_follow_the_card_of_the_training() -> None:
    made = cards.of_training(params(), "spo", {})
    card = cards.with_scores(made, [ROW])
    assert "| hps | 27.100 | base | +1.100 | +0.900 to +1.300 | 81 % | 256 |" in card
    assert card.startswith(made.strip()), "the rest is as it was"


def test_no_card_names_a_path_of_the_machine() -> None:
    raw = yaml.safe_load(config.preset("scenes"))
    raw["backbone"]["checkpoint"] = "/home/alice/models/my-sd"
    raw["prompts"]["train"], raw["pairs"]["source"] = "/home/alice/secret/train.txt", "../alice/pairs"
    made = config.validate(raw)
    card = cards.of_training(made, "spo", {"updates": 3})
    assert "base_model" not in front_matter(card)
    assert "- base model: my-sd " in card and "- training prompts: train.txt" in card
    samples = [cards.Sample("a cat", "samples/0-base.png", "samples/0-spo.png")]
    earlier = card.replace("my-sd", "/home/alice/models/my-sd")  # as earlier versions wrote it
    for written in (card, earlier):
        text = cards.published(written, made, "spo", [ROW], samples, "owner/new", "owner/base", "mit")
        assert front_matter(text)["base_model"] == "owner/base"
        assert "alice" not in text and "samples/0-spo.png" in text


def test_a_card_without_the_line_of_the_licence_is_refused_by_name() -> None:
    made = params()
    card = cards.of_training(made, "spo", {}).replace("- licence of the base model:", "- license:")
    with pytest.raises(ValueError, match=r"README.md of the adapter has no line '- licence of the base"):
        cards.published(card, made, "spo", [ROW], [], "owner/new", "owner/base", "mit")


def test_few_prompts_have_no_interval_on_the_card() -> None:
    made = cards.of_training(params(), "spo", {})
    card = cards.with_scores(made, [{**ROW, "ci_low": None, "ci_high": None, "n": 3}])
    assert "| +1.100 | – | 81 % | 3 |" in card


@pytest.mark.parametrize("text", ["[{}]", "[1]", "{}", '[{"method": "spo"}', "null"])
def test_damaged_comparisons_are_one_line_with_their_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "comparisons.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*comparisons.json: [^\n]*; run `[^\n]*$"):
        results.read_comparisons(path)
