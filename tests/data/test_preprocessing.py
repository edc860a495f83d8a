"""What the files of a CLIP announce of its images' preparation."""

import json

import hub_cache
import pytest
import torch

from spo.data.images import CLIP_MEAN, CLIP_STD
from spo.data.preprocessing import announced
from spo.runtime import hub

OPENAI = {  # the file of the released CLIP models, as transformers 4 and 5 write it
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}


def write(folder, content, file="preprocessor_config.json") -> str:
    (folder / file).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", OPENAI),
        ("preprocessor_config.json", {**OPENAI, "size": 224, "crop_size": 224}),
        ("preprocessor_config.json", {}),
        ("processor_config.json", {"image_processor": OPENAI}),
        ("config.json", {}),
    ],
)
def test_the_released_files_and_none_are_openais_normalisation(tmp_path, file, content) -> None:
    mean, std = announced(write(tmp_path, content, file), None, 224, "score.pickscore.model")
    assert torch.equal(mean, CLIP_MEAN) and torch.equal(std, CLIP_STD)


@pytest.mark.parametrize("nested", [False, True])
def test_another_mean_and_std_are_honoured(tmp_path, nested: bool) -> None:
    said = {**OPENAI, "image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 1]}
    if nested:
        write(tmp_path, {"image_processor": said}, "processor_config.json")
    else:
        write(tmp_path, said)
    mean, std = announced(str(tmp_path), None, 224, "score.pickscore.model")
    assert mean.flatten().tolist() == [0.5, 0.25, 0.5] and std.flatten().tolist() == [0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_normalize is False, but only True is supported"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is"),
        ({"resample": 2}, "resample is 2, but only 3"),
        ({"resample": "bilinear"}, "resample is 'bilinear'"),
        ({"size": {"shortest_edge": 256}}, "size is .*256.*, but the shorter side must be 224"),
        ({"size": {"height": 224, "width": 224}}, "size is .*, but the shorter side must be 224"),
        ({"crop_size": {"height": 224, "width": 112}}, "crop_size is"),
        ({"size": [224, 224]}, "size is"),
        ({"image_mean": [0.5]}, "both must have three numbers"),
        ({"image_std": None}, "both must have three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "must be above 0"),
    ],
)
def test_another_preparation_is_refused(tmp_path, change, message: str) -> None:
    name = write(tmp_path, {**OPENAI, **change})
    with pytest.raises(ValueError, match=f"^score.hps.x: .*preprocessor_config.json: .*{message}"):
        announced(name, None, 224, "score.hps.x")


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "3"])
def test_a_damaged_file_is_named(tmp_path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json is damaged"):
        announced(str(tmp_path), None, 224, "score.pickscore.model")


def test_a_line_says_that_a_part_of_a_hub_id_in_the_cache_cannot_tell(tmp_path, monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = hub_cache.add(tmp_path, "o/part", {"config.json": b"{}"})
    assert torch.equal(announced("o/part", None, 224, "score.x").mean, CLIP_MEAN)
    assert capsys.readouterr().err.endswith(
        "score.x: o/part: no preprocessor_config.json in the cache; OpenAI's mean and std are used\n"
    )
    known = hub_cache.folder(tmp_path, "o/part") / ".no_exist" / commit / "preprocessor_config.json"
    known.parent.mkdir(parents=True)
    hub.say.cache_clear()
    known.touch()  # the hub has answered that there is none
    announced("o/part", None, 224, "score.x")
    hub_cache.add(tmp_path, "o/whole", {"preprocessor_config.json": json.dumps(OPENAI).encode()})
    announced("o/whole", None, 224, "score.x")
    assert not capsys.readouterr().err
