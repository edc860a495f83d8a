import pytest
import torch

from spo.scenes import world
from spo.scenes.world import ABSENT, LAYOUTS, PLACES
from tools.scenes import draws


def test_the_sentence_of_the_readme() -> None:
    attributes = world.parse("a large red circle above a small blue star on sand")
    assert attributes.tolist() == [LAYOUTS.index("above"), 0, 0, 0, 1, 2, 4, 0]


def test_below_is_above_with_the_shapes_exchanged() -> None:
    above = world.parse("a large red circle above a small blue star on sand")
    below = world.parse("a small blue star below a large red circle on sand")
    assert above.tolist() == below.tolist()


def test_parse_is_the_inverse_of_captions() -> None:
    generator = torch.Generator().manual_seed(3)
    attributes = draws.random_attributes(500, generator)
    parsed = [world.parse(c) for c in world.captions(attributes, generator)]
    assert torch.equal(torch.stack(parsed), attributes)


def test_single_shapes_have_a_place_and_pairs_a_relation() -> None:
    attributes = draws.random_attributes(400, torch.Generator().manual_seed(0))
    single = attributes[:, 0] < len(PLACES)
    assert torch.equal(attributes[:, 5] == ABSENT, single)
    assert 0.3 < single.float().mean() < 0.5  # 40 % by default


def test_every_word_of_a_caption_is_in_the_vocabulary_and_quality_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    texts = world.captions(draws.random_attributes(2000, generator), generator)
    assert {word for text in texts for word in text.split()} == set(world.vocabulary())
    assert not {"sharp", "blurry", "clean", "grainy", "saturated", "lit", "dark"} & set(world.vocabulary())


@pytest.mark.parametrize(
    "text", ["a giraffe", "", "a large red circle above sand", "large red circle on sand"]
)
def test_other_sentences_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a scene") as error:
        world.parse(text)
    assert repr(text) in str(error.value)
