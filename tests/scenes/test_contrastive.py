import torch

from spo.scenes import world
from tools.scenes import contrastive, draws, words


def test_wrong_captions_differ_in_one_attribute_or_one_grade() -> None:
    generator = torch.Generator().manual_seed(0)
    attributes = draws.random_attributes(40, generator)
    grades = torch.randint(words.GRADES, (40, 4), generator=generator)
    texts = contrastive.right_and_wrong(attributes, grades, contrastive.WORDS_ALONE, generator)
    right, other, *regraded = (texts[i : i + 40] for i in range(0, 160, 40))
    quality = set(words.all_words())
    for i in range(40):
        prefix = [w for w in right[i].split() if w in quality]
        rest = right[i].split()[len(prefix) :]
        assert 1 <= len(prefix) <= 3 and (world.parse(" ".join(rest)) == attributes[i]).all()
        assert other[i].split()[: len(prefix)] == prefix
        wrong = world.parse(" ".join(other[i].split()[len(prefix) :]))
        assert (wrong != attributes[i]).sum() == 1
        for caption in (regraded[0][i], regraded[1][i]):
            changed = caption.split()
            assert changed[len(prefix) :] == rest
            assert sum(a != b for a, b in zip(changed, prefix, strict=False)) == 1


def test_another_attribute_is_never_the_layout_and_keeps_absent_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    attributes = draws.random_attributes(500, generator)
    other = contrastive.another_attribute(attributes, generator)
    assert ((other != attributes).sum(1) == 1).all()
    assert (other[:, 0] == attributes[:, 0]).all()
    assert ((other == world.ABSENT) == (attributes == world.ABSENT)).all()
