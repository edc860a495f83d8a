import pytest
import torch

from spo.scenes import world
from spo.scenes.world import QUALITY
from tools.scenes import tokenizer, words


def test_grades_are_quartiles() -> None:
    seen = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    grades = words.quartiles(seen)
    for column in range(4):
        assert torch.bincount(grades[:, column]).tolist() == [1000] * 4
        assert (seen[grades[:, column] == 0, column].max() < seen[grades[:, column] == 1, column].min()).all()


def test_captions_name_one_to_three_factors_and_sharp_more_often() -> None:
    named = words.choose(3000, 1, torch.Generator().manual_seed(0))
    counts = torch.bincount(named.sum(1), minlength=5)
    assert counts[0] == counts[4] == 0 and counts[1:4].min() > 900
    shares = named.float().mean(0)
    assert shares[0] > shares[1:].max() + 0.1


def test_another_grade_changes_one_named_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    named = words.choose(500, 1, generator)
    grades = torch.randint(4, (500, 4), generator=generator)
    changed = words.another_grade(grades, named, generator) != grades
    assert (changed.sum(1) == 1).all() and not (changed & ~named).any()


def test_words_stand_before_the_caption() -> None:
    grades = torch.tensor([[0, 3, 1, 2]])
    named = torch.tensor([[True, False, False, True]])
    assert words.say(["a star"], grades, named) == ["blurry bright a star"]


def test_no_prompt_has_a_word_of_quality() -> None:
    assert set(words.all_words()).isdisjoint(world.vocabulary()) and set(words.WORDS) == set(QUALITY)


@pytest.mark.parametrize("text", ["blurry noisy pale a large red ring left of a small blue star on sand"])
def test_the_longest_caption_fits_clips_but_its_words_are_no_tokens_of_the_base_model(tmp_path, text) -> None:
    vocabulary = world.vocabulary()
    of_clip = tokenizer.save([*vocabulary, *words.all_words()], tmp_path / "clip", tokenizer.CLIP_MAX_LENGTH)
    of_base = tokenizer.save(vocabulary, tmp_path / "base")
    assert len(of_clip(text).input_ids) == tokenizer.CLIP_MAX_LENGTH == of_clip.model_max_length
    assert len(of_base.tokenize("blurry")) > 1 and len(of_base("a large red ring").input_ids) == 6
