from pathlib import Path

import pytest
import torch
import yaml

from spo import config
from spo.data.decoding import image_format
from spo.ingest.selection import is_validation
from spo.ingest.sources import read_captions, read_rows
from spo.scenes import world
from tools.scenes import draws, generation, shards
from tools.scenes.preferences import Pairs, ask
from tools.scenes.render import render

DATA = Path(__file__).parents[2] / "data"


def compared(n: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    attributes = draws.random_attributes(2 * n, generator)
    images = render(attributes, draws.random_quality(2 * n, generator), generator)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).view(n, 2, 3, 48, 48)
    captions = world.captions(attributes[:n], generator)
    labels = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (n,), generator=generator)]
    which = torch.randint(len(generation.GENERATORS), (n, 2), generator=generator)
    return Pairs(
        captions, pixels, which, torch.rand(n, 2, 4), torch.rand(n, 2), torch.zeros(n).long(), labels
    )


def test_pairs_come_back_from_their_shards_split_by_caption(tmp_path) -> None:
    pairs = compared(60)
    shards.write(pairs, tmp_path)
    assert next(read_rows(tmp_path))[0].image_0[8:12] == b"WEBP"
    train, held_out = shards.read(tmp_path)
    assert all(is_validation(c, shards.HELD_OUT) for c in held_out.captions)
    assert not any(is_validation(c, shards.HELD_OUT) for c in train.captions)
    assert sorted(train.captions + held_out.captions) == sorted(pairs.captions)
    rows = [i for i, c in enumerate(pairs.captions) if not is_validation(c, shards.HELD_OUT)]
    assert torch.equal(train.label_0, pairs.label_0[rows])
    assert (train.pixels_1.float() - pairs.pixels[rows, 1].float()).abs().mean() < 6


def test_pickscore_learned_from_the_part_that_the_stage_makes_for_training() -> None:
    section = yaml.safe_load(config.preset("scenes"))["pairs"]
    assert section["validation_fraction"] == shards.HELD_OUT


def test_no_caption_of_a_pair_is_an_excluded_one() -> None:
    excluded = generation.different_captions(300, seed=1)
    captions, which = ask(500, 200, excluded, seed=2)
    assert len(captions) == 500 and set(captions).isdisjoint(excluded) and len(set(captions)) <= 200
    assert which.shape == (500, 2) and which.max() == len(generation.GENERATORS) - 1


@pytest.mark.skipif(not DATA.exists(), reason="needs `make data`")
def test_the_shipped_pairs_hold_enough_for_training_and_apart() -> None:
    captions = list(read_captions(DATA / "pairs"))
    held_out = sum(is_validation(c, shards.HELD_OUT) for c in captions)
    assert held_out >= 2000 and len(captions) - held_out >= 14_000
    assert set(captions).isdisjoint((DATA / "prompts/evaluation.txt").read_text().splitlines())
    first = next(read_rows(DATA / "pairs"))[0]
    assert first is not None and image_format(first.image_0) == "WEBP"
