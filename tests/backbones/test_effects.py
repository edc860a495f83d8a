"""Every key of params.yaml does what effects.yaml says: it changes the results, or it must not.

Each stage runs as a user runs it, on a tiny model, once for each key that changes something.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import blip
import hub_cache
import pandas as pd
import pytest
import single_file
import small_experiment
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pydantic import BaseModel
from safetensors.torch import load
from transformers import CLIPConfig, CLIPModel

from spo import cli, config
from spo.commands import registry
from spo.scenes import world
from spo.scenes.oracle import Perception
from tools.scenes import clips

TABLE = yaml.safe_load(Path(__file__).with_name("effects.yaml").read_text(encoding="utf-8"))
SCORED = ("score", "pairs.filter", "preference.labels")  # sections with the scorers of the table
REVISIONS = ("a" * 40, "b" * 40)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section, and an optional section itself."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not inner or type(None) in kinds:
            yield prefix + name
        for kind in inner:
            yield from keys(kind, f"{prefix}{name}.")


def flattened(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of a group by class; those of a method are written without it."""
    stage, _, method = group["stage"].partition(" ")
    prefix = f"align.{method}." if stage == "align" and "output" not in group else ""
    return {
        part: {prefix + key: value for key, value in group.get(part, {}).items()}
        for part in ("with", "changes", "same", "refused")
    }


def of_scorers() -> list[dict[str, Any]]:
    """A group for each scorer in each section that has scorers."""
    groups = []
    for section in SCORED:
        for name, scorer in TABLE["scorers"].items():
            groups.append({"stage": STAGES[section], "with": alone(section, name, scorer["files"])})
            groups[-1] |= {
                part: {f"{section}.{name}.{k}": v for k, v in scorer[part].items()}
                for part in ("changes", "refused")
            }
    return groups


STAGES = {"score": "score base", "pairs.filter": "pairs", "preference.labels": "preference"}


# at these some pairs of the experiment are tied by one scorer and decided by the other
GAPS = {"imagereward": 0.108, "clipscore": 0.0185}


def alone(section: str, name: str, files: dict[str, Any]) -> dict[str, Any]:
    """A section with one scorer; `score` has three in any case."""
    more = {
        "score": {},
        "pairs.filter": {"win_lose_above": {name: 0.0}},
        "preference.labels": {"gap": GAPS.get(name, 1e-9)},
    }[section]
    return {f"{section}.{name}": files} if section == "score" else {section: {name: files, **more}}


GROUPS = [*TABLE["groups"], *of_scorers()]


def test_every_key_has_one_class() -> None:
    listed = [
        k for g in TABLE["groups"] for part, found in flattened(g).items() if part != "with" for k in found
    ]
    listed += [*TABLE["elsewhere"]]
    for section in SCORED:
        for name, scorer in TABLE["scorers"].items():
            listed += [f"{section}.{name}.{k}" for part in ("changes", "refused") for k in scorer[part]]
            listed += (
                [f"{section}.{name}"] if section != "score" or name in ("imagereward", "clipscore") else []
            )
    assert sorted({k for k in listed if listed.count(k) > 1}) == []
    known = set(keys(config.Params))
    assert sorted(known - set(listed)) == [], "say in effects.yaml what these change"
    assert sorted(set(listed) - known) == []


def test_what_is_tested_elsewhere_is_there() -> None:
    for place in TABLE["elsewhere"].values():
        file, name = place.split("::")
        assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(checkpoints, words, tmp_path_factory) -> Path:
    """The experiment after all its stages, and other files of every kind."""
    folder = tmp_path_factory.mktemp("effects")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        small_experiment.inputs(Path("data"), words)
        shutil.copytree(checkpoints["sd"], "base")
        others(words)
        hub()
        run(experiment(), "inputs", "prompts", "pairs", "preference", "preference latent")
        run(experiment(), *(f"align {method}" for method in config.METHODS))
        run(experiment(), *(f"{stage} {v}" for v in config.VARIANTS for stage in ("generate", "score")))
    return folder


def others(words) -> None:
    """Files that differ from those of the experiment, to be named in their place."""
    torch.manual_seed(5)
    Perception(16).save(Path("oracle"))
    Path("words").mkdir()
    words.save_pretrained("words")
    turned_words(Path("words"), Path("other/words"))
    for seed, name in ((11, "pickscore"), (12, "second")):
        clips.save_pickscore(clips.fresh_clip(words, seed), words, Path("other") / name)
    clips.save_aesthetic(clips.RatedClip(clips.fresh_clip(words, seed=13)), words, Path("other/aesthetic"))
    model, settings, _ = clips.new_open_clip(words)
    clips.save_hps(model, settings, words, Path("other/hps"))
    settings["text_cfg"]["heads"] = 2
    Path("other/hps/two_heads.json").write_text(json.dumps(settings), encoding="utf-8")
    blip.save(Path("reward"))
    blip.save(Path("other/reward"), seed=1)
    Path("other/reward/med_config.json").write_text(
        json.dumps(blip.MED_CONFIG | {"hidden_act": "relu", "layer_norm_eps": 10.0}), encoding="utf-8"
    )
    swapped = [*blip.WORDS[:5], *reversed(blip.WORDS[5:])]
    Path("other/reward/bert/vocab.txt").write_text("\n".join(swapped) + "\n", encoding="utf-8")
    other_bases()
    other_data()


def turned_words(folder: Path, target: Path) -> None:
    """The same tokens with other numbers; the last two, which begin and end a text, keep theirs."""
    shutil.copytree(folder, target)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    content["model"]["vocab"] = {t: i for i, t in enumerate([*reversed(tokens[:-2]), *tokens[-2:]])}
    (target / "tokenizer.json").write_text(json.dumps(content))


def other_bases() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained("base", safety_checker=None)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for part in (pipeline.unet, pipeline.vae):
            for parameter in part.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    pipeline.unet.save_pretrained("base/unet", variant="fp16")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.01)
    pipeline.save_pretrained("other/base")
    single_file.write(Path("base"), Path("single.safetensors"), layers=1, vae_blocks=2)
    for seed, name in ((0, "wide/clip"), (1, "other/clip")):
        torch.manual_seed(seed)
        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**size, "image_size": 16, "patch_size": 8}
        sizes = CLIPConfig(text_config=size | {"vocab_size": 99}, vision_config=vision, projection_dim=32)
        CLIPModel(sizes).save_pretrained(name)


def other_data() -> None:
    generator = torch.Generator().manual_seed(2)
    captions = sorted(set(world.captions(world.random_attributes(40, generator), generator)))
    Path("other/prompts").mkdir()
    for name, lines in (("train", captions[:8]), ("evaluation", captions[8:16])):
        Path(f"other/prompts/{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    evaluation = Path("data/prompts/evaluation.txt").read_text(encoding="utf-8").splitlines()
    training = Path("data/prompts/train.txt").read_text(encoding="utf-8").splitlines()
    Path("other/prompts/block_list.txt").write_text(training[0], encoding="utf-8")
    words = {word for line in (*evaluation, *training) for word in line.split()}
    Path("other/prompts/vocabulary.txt").write_text("\n".join(sorted(words - {"a"})), encoding="utf-8")
    small_experiment.save_pairs(Path("other/pairs"), [*captions[16:28], evaluation[0]])
    with Path("data/prompts/evaluation.txt").open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{line}" for line in captions[28:34]))
    for name in ("bad", "tied"):
        shutil.copytree("data/pairs", f"{name}/pairs")
    (file,) = Path("tied/pairs").glob("*.parquet")
    table = pd.read_parquet(file)
    table.loc[table.index % 3 == 0, ["label_0", "label_1"]] = 0.5
    table.to_parquet(file)
    (file,) = Path("bad/pairs").glob("*.parquet")
    table = pd.read_parquet(file)
    table.loc[0, "jpg_0"] = b"no image"
    table.to_parquet(file)


def hub() -> None:
    """A cache of the hub with two revisions of each model."""
    for name, folders in HUB.items():
        for revision, folder in zip(REVISIONS, folders, strict=True):
            hub_cache.add(Path("hub").absolute(), name, hub_cache.of_folder(Path(folder)), revision)


HUB = {
    "own/base": ("base", "other/base"),
    "own/pickscore": ("data/scorers/pickscore", "other/pickscore"),
    "own/aesthetic": ("data/scorers/aesthetic", "other/aesthetic"),
    "own/clip": ("wide/clip", "other/clip"),
}
OUTPUTS = {
    "prompts": ["outputs/prompts/**/*"],
    "pairs": ["outputs/pairs/**/*"],
    "preference": ["outputs/preference/*.safetensors", "reports/metrics/preference.json"],
    "preference latent": [
        "outputs/preference_latent/*.safetensors",
        "reports/metrics/preference_latent.json",
    ],
    "report": ["reports/report.html", "reports/comparisons.json"],
}


def outputs(stage: str) -> list[str]:
    name, _, item = stage.partition(" ")
    of_item = {
        "align": [f"outputs/align/{item}/**/*.safetensors", f"reports/training/{item}.csv"],
        "generate": [f"outputs/images/{item}/*"],
        "score": [f"outputs/scores/{item}.csv"],
    }
    return OUTPUTS.get(stage) or of_item[name]


def experiment() -> dict[str, Any]:
    """The smoke preset on the tiny model, shorter still."""
    params = yaml.safe_load(config.preset("smoke"))
    params["backbone"] |= {"checkpoint": "base", "channels_last": False}
    params["prompts"] |= {"n_train": 4, "n_validation": 3, "n_test": 2, "vocabulary": None, "max_tokens": 40}
    params["pairs"] |= {"source": "data/pairs", "validation_fraction": 0.3}
    params["score"]["oracle"] = None
    for model in ("preference", "latent_preference"):
        params[model]["local_prompts"] = 0
        params[model]["eval_timesteps"] = [701]
    for method in config.METHODS:
        params["align"][method] |= {"iterations": 1, "validation": None}
    params["align"]["diffusion_dpo"] |= {"iterations": 2, "beta": 10.0}
    return params


def changed(params: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    params = copy.deepcopy(params)
    for key, value in values.items():
        *path, last = key.split(".")
        section = functools.reduce(lambda inner, name: inner[name], path, params)
        section[last] = copy.deepcopy(value)
    return params


def run(params: dict[str, Any], *stages: str) -> None:
    small_experiment.write(params)
    for stage in stages:
        small_experiment.run(*stage.split())


def result(stage: str, params: dict[str, Any], patterns: list[str]) -> dict[str, bytes]:
    """The content of the files that a stage writes, without the seconds it took."""
    if stage == "register":
        return {"gate": gate(params)}
    run(params, stage)
    paths = sorted({p for pattern in patterns for p in Path().glob(pattern) if p.is_file()})
    assert paths, patterns
    return {str(path): timeless(path) for path in paths}


def timeless(path: Path) -> bytes:
    if path.suffix != ".json" or not path.is_relative_to("reports"):
        return path.read_bytes()
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in content.items() if "seconds" not in k} if isinstance(content, dict) else content
    return json.dumps(kept).encode()


def gate(params: dict[str, Any]) -> bytes:
    """What `spo register` would do with scores of which one metric rose and one fell."""
    settings = config.validate(params)
    rows = pd.DataFrame({"prompt": [f"a {i}" for i in range(64)], "seed": range(64)})
    before = rows.assign(pickscore=20.0 + rows.seed / 64, hps=30.0 + rows.seed / 64, aesthetic=5.0)
    after = before.assign(pickscore=before.pickscore + 1, hps=before.hps - 0.1)
    failures = registry.gate(settings, after, before, "base")
    shutil.rmtree("outputs/scores", ignore_errors=True)
    with pytest.raises(ValueError) as missing:
        registry.register(settings)
    return str((registry.model_name(settings), failures, missing.value)).encode()


def enlarged(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle sees images of 48 pixels; those of the tiny model have 16."""

    def seen(self: Perception, images: torch.Tensor) -> Any:
        return forward(self, torch.nn.functional.interpolate(images, size=48))

    return seen


def title(group: dict[str, Any]) -> str:
    return f"{group['stage']} {' '.join(flattened(group)['with'])}".strip()


@pytest.mark.smoke
@pytest.mark.parametrize("group", GROUPS, ids=title)
def test_each_key_changes_what_the_table_says(made, group, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made / "hub"))
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("hub"))
    monkeypatch.setattr(Perception, "forward", enlarged(Perception.forward))
    monkeypatch.chdir(tmp_path / "copy")
    stage, of = group["stage"], flattened(group)
    patterns = [group["output"]] if "output" in group else [] if stage == "register" else outputs(stage)
    params = changed(experiment(), of["with"])
    before = result(stage, params, patterns)
    for key, value in of["changes"].items():
        assert result(stage, changed(params, {key: value}), patterns) != before, (
            f"{key}: {value} changes no bit"
        )
    for key, value in of["refused"].items():
        small_experiment.write(changed(params, {key: value}))
        capsys.readouterr()
        assert cli.main(stage.split()) == 2, key
        assert key.rsplit(".", 1)[1] in capsys.readouterr().err
    if of["same"]:
        after = result(stage, changed(params, of["same"]), patterns)
        check_same(before, after, group.get("within"), ", ".join(of["same"]))


def check_same(before: dict[str, bytes], after: dict[str, bytes], within: float | None, keys: str) -> None:
    """The same bits, or numbers that differ by no more than `within`."""
    if within is None:
        assert after == before, keys
        return
    assert after.keys() == before.keys()
    for (name, ours), theirs in zip(after.items(), before.values(), strict=True):
        if ours == theirs:
            continue
        if name.endswith(".safetensors"):
            tensors = load(ours), load(theirs)
            worst = max(float((tensors[0][k] - v).abs().max()) for k, v in tensors[1].items())
        elif name.endswith(".zip"):
            pairs = zip(*(small_experiment.pixels(io.BytesIO(z)) for z in (ours, theirs)), strict=True)
            worst = max(int((a - b).abs().max()) for a, b in pairs)
        elif name.endswith(".csv"):
            tables = [pd.read_csv(io.BytesIO(content)).select_dtypes("number") for content in (ours, theirs)]
            worst = float((tables[0] - tables[1]).abs().max().max()) - 1e-4  # of the digits that are written
        else:
            continue
        assert worst <= within, f"{keys}: {name} differs by {worst}"
