"""The Python API on small random models: scores, a training that is interrupted, mistakes in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import spo
from spo.adapters import load as load_adapted
from spo.config import ConfigError
from spo.data.images import to_tensor
from spo.preference.model import StepAwarePreferenceModel, load_tokenizer, token_ids
from spo.training import loop
from tools.scenes import clips

PROMPTS = ["a red circle", "a blue square", "a small green star"]


@pytest.fixture(scope="module")
def spm(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the stage `preference` whose scores depend on the timestep."""
    folder = tmp_path_factory.mktemp("spm")
    clips.save_pickscore(clips.fresh_clip(words, seed=1), words, folder / "clip")
    torch.manual_seed(0)
    model = StepAwarePreferenceModel.from_clip(str(folder / "clip"))
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "spm")
    words.save_pretrained(folder / "spm")
    torch.save(model.state_dict(), folder / "released.bin")
    return folder


@pytest.fixture
def params(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> spo.config.Params:
    monkeypatch.chdir(tmp_path)
    changes = {"backbone.checkpoint": str(checkpoints["sd"]), "backbone.channels_last": False}
    return spo.load_params("smoke", {**changes, "prompts.vocabulary": None, "align.spo.iterations": 3})


def test_scores_are_the_model_s(spm: Path) -> None:
    images = [Image.new("RGB", (40 + 20 * i, 60), (80 * i, 30, 200)) for i in range(3)]
    model = spo.PreferenceModel(spm / "spm")
    at = {t: model.score(images, PROMPTS, timestep=t) for t in (0, 501)}
    raw = StepAwarePreferenceModel.from_pretrained(spm / "spm")
    ids = token_ids(load_tokenizer(str(spm / "spm")), PROMPTS, raw)
    for t, scores in at.items():
        for i, image in enumerate(images):
            expected = raw.score(to_tensor(image)[None], ids[i : i + 1], torch.tensor([t]))
            assert scores[i] == pytest.approx(float(expected), abs=1e-4)
    assert at[0] != pytest.approx(at[501], abs=1e-3)
    released = spo.PreferenceModel(spm / "released.bin", clip=str(spm / "clip"))
    assert released.score(images, PROMPTS, timestep=501) == pytest.approx(at[501], abs=1e-5)


def test_a_training_resumes_after_an_interruption(
    params: spo.config.Params, spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = spo.train(params, PROMPTS, "whole", spm / "spm")
    iterate: Callable[..., Any] = loop._iteration

    def interrupted(objective: Any, iteration: int, state: Any) -> Any:
        if iteration == 2:
            raise KeyboardInterrupt
        return iterate(objective, iteration, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_iteration", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spo.train(params, PROMPTS, "parts", spm / "spm")
    assert not Path("parts").exists() and list(Path(".spo/resume").rglob("*.ckpt"))
    seen = []
    monkeypatch.setattr(loop, "_iteration", lambda o, i, s: seen.append(i) or iterate(o, i, s))
    parts = spo.train(params, PROMPTS, "parts", spm / "spm")
    assert seen == [2] and not list(Path(".spo/resume").rglob("*.ckpt"))
    one, other = (load_file(f / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(bool(v.any()) for k, v in one.items() if "lora_B" in k or "lora.up" in k), "it was trained"
    load_adapted(params.backbone, whole, "cpu")


def test_it_trains_by_gradspo_where_its_section_is_there(
    params: spo.config.Params, spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, float]] = []

    def noted(objective: Any, *args: Any, sampler_ema: float = 0.0, **kwargs: Any) -> None:
        built.append((type(objective.method).__name__, sampler_ema))

    monkeypatch.setattr(loop, "fit", noted)
    raw = params.model_dump(mode="json")
    for gradspo in (None, {"scale": 0.5, "sampler_ema": 0.9}):
        raw["align"]["spo"]["gradspo"] = gradspo
        spo.train(spo.config.validate(raw), PROMPTS, f"out{len(built)}", spm / "spm")
    assert built == [("SpoMethod", 0.0), ("GradSpoMethod", 0.9)]


def test_mistakes_are_named(params: spo.config.Params, spm: Path) -> None:
    model = spo.PreferenceModel(spm / "spm")
    image = Image.new("RGB", (40, 40))
    for wrong, reason in (
        (lambda: model.score([image], []), "1 images, but 0 prompts"),
        (lambda: model.score([image], ["x"], timestep=1000), "timestep 1000: must be from 0 to 999"),
        (lambda: model.score([image], ["a </s> b"]), "prompt 1 has the special token </s> of a tokenizer"),
        (lambda: spo.PreferenceModel("nowhere"), "nowhere: no preference model there"),
        (lambda: spo.PreferenceModel(spm / "released.bin", clip="nowhere"), "nowhere: no config of a CLIP"),
        (lambda: spo.train(params, [], "out", spm / "spm"), "no training prompts"),
        (lambda: spo.train(params, ["a", " "], "out", spm / "spm"), "prompt 2 has no text"),
        (lambda: spo.train(params, PROMPTS, ".", spm / "spm"), r"\. exists"),
        (lambda: spo.load_params("nowhere.yaml"), "nowhere.yaml: no such file"),
        (
            lambda: spo.load_params("smoke", {"align.spo.betta": 1}),
            "unknown key 'align.spo.betta'; did you mean",
        ),
        (lambda: spo.load_params("smoke", {"align.sop.beta": 1}), "unknown section 'sop'"),
        (lambda: spo.load_params("smoke", {"align.spo.beta": -1}), "align.spo.beta"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            wrong()
        assert "\n" not in str(error.value)
    assert issubclass(ConfigError, ValueError) and not Path("out").exists()
    assert spo.load_params("smoke", {"align.spo.beta": 3}).align.spo.beta == 3
