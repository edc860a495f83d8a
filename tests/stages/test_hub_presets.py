"""The presets of released bases name all by hub id and commit: found in a folder like the hub's cache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import hub_cache
import in_fork
import pandas as pd
import pytest
import yaml
from PIL import Image

from spo import config
from spo.runtime import hub, released
from spo.stages import inputs

PRESETS = ("sd15-scratch", "sdxl-scratch", "sd35", "flux")  # train what they have
OTHERS = [n for n in config.preset_names() if n.startswith(("sd15", "sdxl")) and n not in PRESETS]
WORDS = ("oak", "sea", "owl", "fog", "ice", "bee", "fig", "jar", "kite", "lamp")


def raw(preset: str) -> dict[str, Any]:
    return yaml.safe_load(config.preset(preset))


def sources(preset: str) -> list[tuple[str, str | None]]:
    roles = inputs.sources(config.validate(raw(preset))).values()
    return list(dict.fromkeys((name, revision) for role in roles for name, revision in role if name))


def parquet(captions: list[str], images: bool) -> bytes:
    table = pd.DataFrame({"caption": captions})
    if images:
        for key, grey in (("jpg_0", 10), ("jpg_1", 200)):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (grey,) * 3).save(picture, format="PNG")
            table[key] = picture.getvalue()
        table["label_0"], table["label_1"] = 1.0, 0.0
    out = io.BytesIO()
    table.to_parquet(out)
    return out.getvalue()


def files_of(name: str) -> dict[str, bytes]:
    """Small files in the place of those that a preset names."""
    at = hub.place(name)
    if at.kind == "model":
        folder = "" if at.pattern == "*" else f"{at.pattern}/"
        file = f"{folder}config.json" if at.pattern and "." not in Path(at.pattern).name else at.pattern
        return {file or "config.json": name.encode()}
    shards = {}
    for split, count, start in (("train", 2, 0), ("validation_unique", 1, 60), ("test_unique", 1, 80)):
        for number in range(count):
            captions = [f"{WORDS[i % 10]} {WORDS[i // 10]}" for i in range(start, start + 20)]
            path = f"data/{split}-{number:05}-of-{count:05}-0123456789abcdef.parquet"
            shards[path] = parquet(captions, images="no_images" not in name)
            start += 20
    return shards


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which the hub's client uses in this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill(cache: Path, preset: str) -> dict[str, str]:
    """Put all that a preset names into the cache; return the commits by name."""
    return {name: hub_cache.add(cache, name, files_of(name), rev) for name, rev in sources(preset)}


@pytest.mark.parametrize("preset", [*PRESETS, *OTHERS])
def test_every_input_is_named_by_hub_id_and_revision(preset: str) -> None:
    for name, revision in sources(preset):
        at = hub.place(name, revision)
        assert "/" in at.repository and not name.startswith(("own/", "data/"))
        assert re.fullmatch(r"[0-9a-f]{40}|main", str(at.revision)), f"{name} names no revision"


@pytest.mark.parametrize("preset", PRESETS)
def test_inputs_pins_every_key_from_a_cache_without_a_network(preset: str, cache: Path, logged: Any) -> None:
    commits = fill(cache, preset)
    params = config.validate(raw(preset))
    inputs.run(params)
    pinned = {}
    for role in inputs.sources(params):
        for entry in json.loads(Path(f"outputs/inputs/{role}.json").read_text(encoding="utf-8")):
            pinned[entry["hub"]] = entry
    assert {name: entry["revision"] for name, entry in pinned.items()} == commits
    hps = pinned[params.score.hps.checkpoint]
    digest = hashlib.sha256(params.score.hps.checkpoint.encode()).hexdigest()
    assert hps["files"] == {"HPS_v2.1_compressed.pt": digest}
    assert len(pinned[params.pairs.source]["files"]) == 2


@pytest.mark.parametrize("preset", OTHERS)
def test_inputs_pins_what_a_preset_adds_to_the_one_that_trains_everything(
    preset: str, cache: Path, logged: Any
) -> None:
    """Released models, by file; and nothing that the preset does not use."""
    commits, params = fill(cache, preset), config.validate(raw(preset))
    inputs.run(params)
    pins = {
        role: json.loads(Path(f"outputs/inputs/{role}.json").read_text("utf-8")) for role in WITH_PRETRAINED
    }
    for role, section in WITH_PRETRAINED.items():
        named = section(params).pretrained if section(params) is not None else None
        entries = [entry for entry in pins[role] if "hub" in entry]
        assert [entry["files"] for entry in entries] == [pinned(named)] * len(entries), role
        assert all(entry["revision"] == commits[entry["hub"]] for entry in entries)
        used = role != "pretrained_preference" or params.wants("preference")
        assert len(entries) == (named is not None and used), role
    unused = json.loads(Path("outputs/inputs/pairs.json").read_text(encoding="utf-8"))
    assert unused == [] and params.pairs.source is None


WITH_PRETRAINED = {
    "pretrained_preference": lambda params: params.preference,
    "pretrained_spo": lambda params: params.align.spo,
    "pretrained_diffusion_dpo": lambda params: params.align.diffusion_dpo,
    "pretrained_lpo": lambda params: params.align.lpo,
}


def pinned(name: str | None) -> dict[str, str] | None:
    """The files of a released model in the cache, with their hashes."""
    if name is None:
        return None
    url = released.address(name)
    return {path: hashlib.sha256(content).hexdigest() for path, content in files_of(url).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_missing_is_said_in_one_line_with_what_to_put_where(
    preset: str, cache: Path, logged: Any
) -> None:
    fill(cache, preset)
    params = config.validate(raw(preset))
    folders = {hub_cache.folder(cache, name): name for name, _ in sources(preset)}
    for folder, name in folders.items():
        away = folder.with_name("away")
        folder.rename(away)
        with pytest.raises(ValueError, match="hub cannot be reached") as error:
            inputs.run(params)
        message = str(error.value)
        assert "\n" not in message and hub.place(name).repository in message
        assert "hf download" in message and str(cache) in message and folder.name in message
        away.rename(folder)


def test_a_shard_that_is_missing_is_no_smaller_data_set(cache: Path) -> None:
    fill(cache, "sd15-scratch")
    source = config.validate(raw("sd15-scratch")).pairs.source
    (lost,) = hub_cache.folder(cache, source).glob("snapshots/*/data/train-00001-*")
    lost.unlink()
    with pytest.raises(ValueError, match="1 of its shards are not in the cache"):
        hub.download(source)
    narrowed = source.replace("train-*", "train-00000*")
    assert list(hub.download(narrowed)) == ["data/train-00000-of-00002-0123456789abcdef.parquet"]


def test_a_folder_a_file_and_a_cache_without_links(cache: Path) -> None:
    hub_cache.add(cache, "hf://datasets/a/b@main/x", {"x/1.json": b"1", "x/2.json": b"2", "y.json": b"3"})
    assert list(hub.download("hf://datasets/a/b@main/x")) == ["x/1.json", "x/2.json"]
    assert hub.local("hf://datasets/a/b/y.json").read_bytes() == b"3"
    assert list(hub.download("hf://datasets/a/b")) == ["x/1.json", "x/2.json", "y.json"]
    with pytest.raises(ValueError, match="2 files; name one"):
        hub.local("hf://datasets/a/b/x")
    plain = cache / "plain"
    plain.write_bytes(b"3")
    assert hub.content(plain) == hub.content(hub.local("hf://datasets/a/b/y.json"))


@pytest.mark.parametrize("url", ["hf://a", "hf://datasets/a", "hf://a//c"])
def test_a_url_names_owner_and_repository(url: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        hub.place(url)


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_and_pairs_are_read_from_the_cache(preset: str, cache: Path) -> None:
    from spo.stages import pairs, prompts

    fill(cache, preset)
    params = raw(preset)
    params["prompts"] |= {"n_train": 30, "n_test": 35}
    params["pairs"] |= {"validation_fraction": 0.25}
    settings = config.validate(params)
    summary = pairs.prepare(settings.pairs, Path("outputs/pairs"))
    assert summary["read"] == summary["train"] + summary["validation"] == 40
    summary = prompts.prepare(settings.prompts, lambda prompt: 4, Path("outputs/prompts"))
    assert (summary["read"], summary["train"], summary["test"]) == ({"train": 40, "evaluation": 40}, 30, 35)
    test = set(Path("outputs/prompts/test.txt").read_text(encoding="utf-8").splitlines())
    assert test.isdisjoint(Path("outputs/prompts/train.txt").read_text(encoding="utf-8").splitlines())


def test_without_pairs_the_published_prompts_are_all_left(cache: Path) -> None:
    """Here the captions of validation_unique are 20."""
    from spo.stages import prompts

    for preset in ("sd15-eval", "sdxl"):
        fill(cache, preset)
        params = raw(preset)
        params["prompts"] |= {"n_train": min(params["prompts"]["n_train"], 40), "n_test": 20}
        settings = config.validate(params)
        summary = prompts.prepare(settings.prompts, lambda prompt: 4, Path("outputs/prompts"))
        assert summary["read"]["evaluation"] == summary["test"] == 20


DATA = Path(__file__).parents[2] / "data"
LOADERS = """
import torch, yaml
from PIL import Image
from spo import backbones, config
from spo.rewards.aesthetic import Aesthetic
from spo.rewards.hps import Hps
from spo.rewards.pickscore import PickScore
params = config.load()
image = [Image.new("RGB", (48, 48), (200, 10, 10))]
for kind, section in ((PickScore, params.score.pickscore), (Hps, params.score.hps)):
    print(kind(section).score(image, ["a red circle"])[0])
print(Aesthetic(params.score.aesthetic).score(image, ["a red circle"])[0])
backbone = backbones.load(params.backbone, "cpu")
print(float(backbone.unet.conv_in.weight.sum()))
from spo.stages.preference import _step_aware
print(len(_step_aware(params, params.preference, backbone).tokenizer))
"""


@pytest.mark.smoke
@pytest.mark.skipif(not (DATA / "base").exists(), reason="needs the shipped data: dvc pull data.dvc")
def test_every_loader_reads_its_model_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the models of the scenes world under the names of the preset: the same numbers as from folders."""
    cache, params = tmp_path / "hub", raw("sd15-scratch")
    named, score = config.validate(params), params["score"]
    for section in (score["pickscore"], score["aesthetic"], score["hps"]):
        section["image_size"] = 48
    score |= {"imagereward": None, "clipscore": None}
    score["hps"] |= {
        "architecture": str(DATA / "scorers/hps/open_clip_config.json"),
        "tokenizer": str(DATA / "scorers/hps"),
    }
    params["backbone"] |= {"dtype": "fp32", "vae": "madebyollin/some-vae@main"}
    params["preference"]["trained"] = "heads"
    scorers, pickscore = DATA / "scorers", hub_cache.of_folder(DATA / "scorers/pickscore")
    b, s = named.backbone, named.score
    hub_cache.add(cache, b.checkpoint, hub_cache.of_folder(DATA / "base"), b.revision)
    hub_cache.add(cache, params["backbone"]["vae"], hub_cache.of_folder(DATA / "base/vae"))
    hub_cache.add(cache, s.pickscore.model, pickscore, s.pickscore.revision)
    hub_cache.add(cache, str(s.pickscore.processor), pickscore)
    hub_cache.add(cache, s.aesthetic.clip, hub_cache.of_folder(scorers / "aesthetic"), s.aesthetic.revision)
    hub_cache.add(
        cache,
        s.aesthetic.head,
        {hub.place(s.aesthetic.head).pattern: (scorers / "aesthetic/head.pth").read_bytes()},
    )
    weights = (scorers / "hps/HPS_scenes_compressed.pt").read_bytes()
    hub_cache.add(cache, s.hps.checkpoint, {"HPS_v2.1_compressed.pt": weights})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "loaders.py").write_text(LOADERS)

    def loaded(settings: dict[str, Any]) -> list[float]:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
        done = in_fork.python(tmp_path, "loaders.py", variables=os.environ)
        assert done.returncode == 0, done.stderr[-2000:]
        return [float(line) for line in done.stdout.split()]

    from_hub = loaded(params)
    local = json.loads(json.dumps(params))
    local["backbone"] |= {"checkpoint": str(DATA / "base"), "revision": None, "vae": str(DATA / "base/vae")}
    local["preference"] |= {"init": str(scorers / "pickscore"), "revision": None, "tokenizer": None}
    local["score"]["pickscore"] |= {"model": str(scorers / "pickscore"), "revision": None, "processor": None}
    local["score"]["hps"]["checkpoint"] = str(scorers / "hps/HPS_scenes_compressed.pt")
    local["score"]["aesthetic"] |= {
        "clip": str(scorers / "aesthetic"),
        "head": str(scorers / "aesthetic/head.pth"),
        "revision": None,
    }
    shutil.rmtree(cache)
    assert from_hub == loaded(local)
