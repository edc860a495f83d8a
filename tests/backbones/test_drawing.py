"""Images and scores: the batch size changes no grey level, and cached images are not generated again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from spo import config
from spo.stages import generate
from spo.training.checkpoint import CheckpointStore
from spo.validation import generation, scoring

PROMPTS = ["a circle", "a blue star on sand", "a large red square", "a small star", "a green circle"]


def settings(batch_size: int) -> config.Params:
    params = config.validate(yaml.safe_load(config.preset("smoke")))
    section = params.generate.model_copy(update={"batch_size": batch_size})
    return params.model_copy(update={"generate": section})


def draw(backbone, batch_size: int, cache: CheckpointStore | None = None):
    params = settings(batch_size)
    return generation.draw(backbone, params, params.generate.base, PROMPTS, list(range(5)), cache)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_batch_size_changes_no_image_by_more_than_a_grey_level(load, family: str) -> None:
    backbone = load(family)
    batches = [np.stack([np.asarray(p, np.int16) for p in draw(backbone, n)]) for n in (1, 2, 5)]
    assert len({p.tobytes() for p in batches[0]}) == 5
    assert max(np.abs(other - batches[0]).max() for other in batches[1:]) <= 1


def test_generation_resumes_after_the_last_complete_batch(load, tmp_path: Path, monkeypatch) -> None:
    backbone, store = load("sd"), CheckpointStore(tmp_path, keep=None)
    complete = [p.tobytes() for p in draw(backbone, 2)]
    images = draw(backbone, 2, store)
    for _ in range(3):  # the second batch is generated and cached, the third is not
        next(images)
    images.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000000.ckpt", "00000001.ckpt"]
    drawn: list[int] = []
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda x: (drawn.append(len(x)), decode(x))[1])
    assert [p.tobytes() for p in draw(backbone, 2, store)] == complete
    assert drawn == [1]
    (tmp_path / "00000001.ckpt").write_bytes(b"truncated")  # this batch and the next are generated again
    assert [p.tobytes() for p in draw(backbone, 2, store)] == complete
    assert drawn == [1, 2, 1]


def test_scoring_resumes_after_the_last_scorer(tmp_path: Path) -> None:
    asked: list[str] = []

    class Constant:
        def __init__(self, name: str) -> None:
            self.name = name

        def score(self, images, prompts) -> list[float]:
            asked.append(self.name)
            return [0.1] * len(images)

    def broken(name: str) -> Constant:
        if name == "hps":
            raise KeyboardInterrupt
        return Constant(name)

    store, images = CheckpointStore(tmp_path, keep=None), [None] * 2
    score = settings(1).score.model_copy(update={"oracle": None})
    params = settings(1).model_copy(update={"score": score})
    with pytest.raises(KeyboardInterrupt):
        scoring.score_images(params, images, PROMPTS[:2], "cpu", store, broken)
    assert {*asked} == {"pickscore"}
    scores = scoring.score_images(params, images, PROMPTS[:2], "cpu", store, Constant)
    assert scores == dict.fromkeys(params.score.configured(), [0.1, 0.1])
    assert list(scores) == list(dict.fromkeys(asked)) == list(params.score.configured())
    assert all(asked.count(name) == asked.count("pickscore") for name in asked), "none was asked twice"


def test_cached_images_are_named_by_everything_they_depend_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/prompts").mkdir(parents=True)
    prompts = tmp_path / "outputs/prompts/test.txt"
    prompts.write_text("a circle\n")

    def name(batch_size: int = 2, title: str = "base", **changes) -> str:
        params = settings(batch_size)
        variant = params.generate.base.model_copy(update=changes)
        return generate._scratch(params, title, variant, prompts).name

    seen = {name(), name(batch_size=3), name(guidance=7.0), name(title="other")}
    prompts.write_text("a star\n")
    seen.add(name())
    assert len(seen) == 5
