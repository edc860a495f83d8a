"""Pictures and scores: the batch changes no grey level, and what is drawn is not drawn again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from spo import config
from spo.evaluation import generation, scoring
from spo.stages import generate
from spo.training.checkpoint import CheckpointStore

PROMPTS = ["a circle", "a blue star on sand", "a large red square", "a small star", "a green circle"]


def settings(batch_size: int) -> config.Params:
    params = config.validate(yaml.safe_load(config.preset("smoke")))
    told = params.generate.model_copy(update={"batch_size": batch_size})
    return params.model_copy(update={"generate": told})


def draw(backbone, batch_size: int, kept: CheckpointStore | None = None):
    params = settings(batch_size)
    return generation.draw(backbone, params, params.generate.base, PROMPTS, list(range(5)), kept)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_batch_changes_no_picture_by_more_than_a_grey_level(load, family: str) -> None:
    backbone = load(family)
    told = [np.stack([np.asarray(p, np.int16) for p in draw(backbone, n)]) for n in (1, 2, 5)]
    assert len({p.tobytes() for p in told[0]}) == 5
    assert max(np.abs(other - told[0]).max() for other in told[1:]) <= 1


def test_drawing_goes_on_after_the_last_whole_batch(load, tmp_path: Path, monkeypatch) -> None:
    backbone, store = load("sd"), CheckpointStore(tmp_path, keep=None)
    whole = [p.tobytes() for p in draw(backbone, 2)]
    pictures = draw(backbone, 2, store)
    for _ in range(3):  # the second batch is drawn and kept, the third is not
        next(pictures)
    pictures.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000000.ckpt", "00000001.ckpt"]
    drawn: list[int] = []
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda x: (drawn.append(len(x)), decode(x))[1])
    assert [p.tobytes() for p in draw(backbone, 2, store)] == whole
    assert drawn == [1]
    (tmp_path / "00000001.ckpt").write_bytes(b"torn")  # it and what follows is drawn again
    assert [p.tobytes() for p in draw(backbone, 2, store)] == whole
    assert drawn == [1, 2, 1]


def test_scoring_goes_on_after_the_last_scorer(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def scorer(name: str):
        return lambda pictures, prompts: (asked.append(name), {name: [0.1, 1 / 3]})[1]

    def broken(pictures, prompts):
        raise KeyboardInterrupt

    store = CheckpointStore(tmp_path, keep=None)
    monkeypatch.setattr(scoring, "_scorers", lambda params, device: [scorer("a"), broken])
    with pytest.raises(KeyboardInterrupt):
        scoring.score_images(settings(1), [None] * 2, PROMPTS[:2], "cpu", store)
    monkeypatch.setattr(scoring, "_scorers", lambda params, device: [scorer("a"), scorer("b")])
    told = scoring.score_images(settings(1), [None] * 2, PROMPTS[:2], "cpu", store)
    assert told == {"a": [0.1, 1 / 3], "b": [0.1, 1 / 3]} and list(told) == ["a", "b"]
    assert asked == ["a", "b"]


def test_kept_pictures_are_named_by_all_that_they_are_made_from(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/prompts").mkdir(parents=True)
    prompts = tmp_path / "outputs/prompts/test.txt"
    prompts.write_text("a circle\n")

    def name(batch_size: int = 2, **changes) -> str:
        params = settings(batch_size)
        return generate._scratch(params, params.generate.base.model_copy(update=changes)).name

    seen = {name(), name(batch_size=3), name(guidance=7.0)}
    prompts.write_text("a star\n")
    seen.add(name())
    assert len(seen) == 4
