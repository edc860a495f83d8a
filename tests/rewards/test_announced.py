"""What the files of a scorer's CLIP announce of its pixels and its activation."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch

from spo.preference.model import StepAwarePreferenceModel
from spo.rewards import hps
from spo.rewards.aesthetic import Aesthetic
from spo.rewards.hps import Hps
from spo.rewards.pickscore import PickScore
from spo.rewards.pixels import to_unit

MEAN, STD = 0.5, 0.25  # of all three channels


@pytest.fixture
def announcing(tmp_path):
    """A copy of a folder, with a file that announces MEAN and STD."""

    def copy(folder: str) -> str:
        shutil.copytree(folder, tmp_path / "clip")
        said = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "size": {"shortest_edge": 48}}
        (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(said))
        return str(tmp_path / "clip")

    return copy


@pytest.mark.parametrize("kind", ["pickscore", "aesthetic"])
def test_a_folders_own_mean_and_std_are_honoured(
    kind: str, announcing, pickscore_settings, aesthetic_settings, images, prompts, monkeypatch
) -> None:
    if kind == "pickscore":
        settings = pickscore_settings.model_copy(update={"model": announcing(pickscore_settings.model)})
        scorer = PickScore(settings)
        model, plain = scorer.model, PickScore(pickscore_settings)
    else:
        settings = aesthetic_settings.model_copy(update={"clip": announcing(aesthetic_settings.clip)})
        scorer = Aesthetic(settings)
        model, plain = scorer.clip, Aesthetic(aesthetic_settings)
    seen = []
    monkeypatch.setattr(
        model, "get_image_features", lambda pixel_values: seen.append(pixel_values) or features(pixel_values)
    )
    features = type(model).get_image_features.__get__(model)
    scores = scorer.score(images[:1], prompts[:1])  # 48 x 48: nothing is resized
    assert torch.allclose(seen[0][0], (to_unit(images[0]) - MEAN) / STD)
    assert scores != plain.score(images[:1], prompts[:1])


def test_the_processor_that_a_section_names_is_read(announcing, pickscore_settings) -> None:
    named = pickscore_settings.model_copy(update={"processor": announcing(pickscore_settings.model)})
    assert PickScore(named).normalisation.mean.flatten().tolist() == [MEAN] * 3


def test_open_clips_file_has_its_own_mean_and_std(hps_settings, tmp_path, images, prompts) -> None:
    model = json.loads(Path(hps_settings.architecture).read_text(encoding="utf-8"))
    file = tmp_path / "open_clip_config.json"
    plain = Hps(hps_settings).score(images[:1], prompts[:1])
    for mean, same in (([0.48145466, 0.4578275, 0.40821073], True), ([MEAN] * 3, False)):
        prepared = {"mean": mean, "std": [0.26862954, 0.26130258, 0.27577711]}
        file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": prepared}))
        scorer = Hps(hps_settings.model_copy(update={"architecture": str(file)}))
        assert (scorer.score(images[:1], prompts[:1]) == plain) is same


def test_a_step_aware_model_starts_from_a_clip_with_openais_mean_and_std(
    announcing, pickscore_settings
) -> None:
    StepAwarePreferenceModel.from_clip(pickscore_settings.model)
    with pytest.raises(ValueError, match=r"^preference.init: .* announces another image_mean or image_std"):
        StepAwarePreferenceModel.from_clip(announcing(pickscore_settings.model))


@pytest.mark.parametrize(
    ("name", "used", "other"),
    [("small", "GELU", "small-quickgelu"), ("small-quickgelu", "QuickGELU", "small"), ("alone", None, None)],
)
def test_a_name_with_two_activations_says_which_one_it_computes(
    name, used, other, hps_settings, tmp_path, monkeypatch, capsys
) -> None:
    small = json.loads(Path(hps_settings.architecture).read_text(encoding="utf-8"))
    known = {"small": small, "small-quickgelu": {**small, "quick_gelu": True}, "alone": small}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    hps._say_activation.cache_clear()
    settings = hps_settings.model_copy(update={"architecture": name})
    for _ in range(2):  # one line, however often it is loaded
        Hps(settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if "GELU" in line]
    assert len(lines) == (used is not None)
    if used:
        assert f"{name} computes {used};" in lines[0] and f"need {other}," in lines[0]
