"""Prompts straight from a preference data set."""

import json

import fsspec
import pandas as pd
import pytest
import yaml

from spo import config
from spo.commands import dry_run
from spo.scenes import world
from spo.stages import inputs, prompts
from tools.scenes import tokenizer

DATA = "memory://pickapic/data"


@pytest.fixture
def data_set():
    """Two splits of Pick-a-Pic's kind in a store; prompts repeat, also across splits."""
    splits = {
        "train": [f"prompt of training {i % 8}" for i in range(12)] + ["seen"],
        "validation_unique": ["seen"],
    }
    splits["validation_unique"] += [f"prompt of evaluation {i}" for i in range(5)]
    store = fsspec.filesystem("memory")
    for split, captions in splits.items():
        with store.open(f"/pickapic/data/{split}-00000-of-00001.parquet", "wb") as file:
            pd.DataFrame({"caption": captions, "jpg_0": [b""] * len(captions)}).to_parquet(file)
    yield splits
    store.rm("/pickapic", recursive=True)


def section(folder, **changes) -> config.Prompts:
    empty = folder / "pairs"
    empty.mkdir(exist_ok=True)
    pd.DataFrame({"caption": ["another"]}).to_parquet(empty / "0.parquet")
    sources = {"train": f"{DATA}/train-*.parquet", "evaluation": f"{DATA}/validation_unique-*.parquet"}
    return config.Prompts(**sources, pairs=str(empty), n_train=8, n_validation=0, n_test=6, **changes)


def test_lists_are_made_of_a_data_set_s_splits(data_set, tmp_path) -> None:
    summary = prompts.prepare(section(tmp_path), lambda prompt: len(prompt.split()), tmp_path / "out")
    made = {name: (tmp_path / f"out/{name}.txt").read_text().splitlines() for name in ("train", "test")}
    assert sorted(made["train"]) == [f"prompt of training {i}" for i in range(8)]
    assert sorted(made["test"]) == sorted(data_set["validation_unique"])
    assert summary["read"] == {"train": 13, "evaluation": 6}


def test_tokens_are_counted_without_a_length_in_the_tokenizer_s_file(tmp_path) -> None:
    folder = tmp_path / "base/tokenizer"
    tokenizer.save(sorted(world.vocabulary()), folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["model_max_length"]  # transformers takes 10**30 then
    file.write_text(json.dumps(content))
    raw = yaml.safe_load(config.preset("smoke"))
    raw["backbone"]["checkpoint"] = str(tmp_path / "base")
    count = prompts._token_counter(config.validate(raw))
    assert count("a red ring") == 5 and count("a " * 100) == 102  # start and end, not cut


def test_a_prompt_that_is_half_a_character_is_rejected_with_its_reason(data_set, tmp_path) -> None:
    lines = [r"half \ud83d", *(f"prompt {i}" for i in range(8))]
    (tmp_path / "t.json").write_text("[" + ",".join(f'"{line}"' for line in lines) + "]")
    lists = section(tmp_path).model_copy(update={"train": str(tmp_path / "t.json")})
    prompts.prepare(lists, len, tmp_path / "out")
    assert "train,0,broken_text" in (tmp_path / "out/rejected.csv").read_text().splitlines()


def test_the_dry_run_names_a_data_set_by_its_address(data_set, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(config.preset("smoke"))
    raw["pairs"]["source"] = DATA
    assert f"pairs.source: {DATA}" in dry_run.lines(config.validate(raw), "pairs", None)


def test_a_split_that_is_not_there_is_one_line(data_set, tmp_path) -> None:
    wrong = section(tmp_path).model_copy(update={"train": f"{DATA}/tain-*.parquet"})
    with pytest.raises(ValueError, match=r"tain-\*.parquet: no .parquet shards"):
        prompts.prepare(wrong, len, tmp_path / "out")


PARTI = 'Prompt\tCategory\tChallenge\tNote\na "glass" fox\tAnimals\tBasic\t\nseen\tAnimals\tBasic\t\n'


def suite_files(folder) -> dict[str, str]:
    (folder / "parti.tsv").write_text(PARTI + "prompt of training 3\tA\tB\t\nA glass FOX!\tA\tB\t\n")
    (folder / "anime.json").write_text(json.dumps(["prompt of evaluation 1", "a girl in rain", "in a pair"]))
    return {
        "parti": str(folder / "parti.tsv"),
        "hpd_anime": str(folder / "anime.json"),
        "pickapic": f"{DATA}/validation_unique-*.parquet",
    }


def test_suites_are_cleaned_without_prompts_of_training_and_pairs(data_set, tmp_path) -> None:
    lists = section(tmp_path)
    pd.DataFrame({"caption": ["another", "In a pair."]}).to_parquet(tmp_path / "pairs/0.parquet")
    count = len
    plain = prompts.prepare(lists, count, tmp_path / "plain")
    summary = prompts.prepare(lists, count, tmp_path / "out", suite_files(tmp_path))
    kept = {p.stem: p.read_text().splitlines() for p in (tmp_path / "out/suites").iterdir()}
    assert kept["parti"] == ['a "glass" fox', "seen"]
    assert kept["hpd_anime"] == ["prompt of evaluation 1", "a girl in rain"]  # test prompts may be among them
    assert sorted(kept["pickapic"]) == sorted(data_set["validation_unique"])
    assert summary["suites"]["parti"] == {"read": 4, "prompts": 2, "elsewhere": 1, "near_duplicate": 1}
    assert summary["suites"]["hpd_anime"] == {"read": 3, "prompts": 2, "elsewhere": 1}
    assert "suite parti,2,elsewhere" in (tmp_path / "out/rejected.csv").read_text().splitlines()
    for name in ("train", "test", "validation"):  # a suite changes no other list
        assert (tmp_path / f"out/{name}.txt").read_bytes() == (tmp_path / f"plain/{name}.txt").read_bytes()
    assert "suites" not in plain and not (tmp_path / "plain/suites").exists()


def test_captions_of_training_pairs_are_never_evaluated(data_set, tmp_path, monkeypatch, logged) -> None:
    (tmp_path / "new").mkdir()
    pd.DataFrame({"caption": ["Prompt of  EVALUATION 3!", "a girl in rain"]}).to_parquet(
        tmp_path / "new/0.parquet"
    )
    lists = section(tmp_path).model_copy(update={"n_test": 5})
    pd.DataFrame({"caption": ["prompt of evaluation 0"]}).to_parquet(tmp_path / "pairs/0.parquet")
    raw = yaml.safe_load(config.preset("smoke"))
    raw["prompts"] = lists.model_copy(update={"n_test": 4}).model_dump()
    raw["pairs"]["source"] = str(tmp_path / "new")
    for model in raw["preference"], raw["latent_preference"]:
        model["local_prompts"] = 0  # there are no validation prompts
    for method in raw["align"].values():
        method["validation"] = None
    raw["generate"]["suites"] = {"anime": suite_files(tmp_path)["hpd_anime"]}
    params = config.validate(raw)
    assert inputs.sources(params)["prompts"][-1] == (str(tmp_path / "new"), None)  # DVC runs the stage again
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "_token_counter", lambda params: len)
    prompts.run(params)
    assert logged == {"train": 8, "test": 4, "validation": 0}
    made = (tmp_path / "outputs/prompts/test.txt").read_text().splitlines()
    assert sorted(made) == [
        "prompt of evaluation 1",
        "prompt of evaluation 2",
        "prompt of evaluation 4",
        "seen",
    ]
    assert (tmp_path / "outputs/prompts/suites/anime.txt").read_text().splitlines() == [
        "prompt of evaluation 1",
        "in a pair",
    ]


def test_validation_prompts_are_in_no_suite(data_set, tmp_path) -> None:
    lists = section(tmp_path).model_copy(update={"n_validation": 2, "n_test": 4})
    prompts.prepare(lists, len, tmp_path / "out", {"pickapic": f"{DATA}/validation_unique-*.parquet"})
    validation = (tmp_path / "out/validation.txt").read_text().splitlines()
    kept = (tmp_path / "out/suites/pickapic.txt").read_text().splitlines()
    assert len(validation) == 2 and set(kept) == set(data_set["validation_unique"]) - set(validation)


def test_a_suite_that_is_not_there_or_has_nothing_left_is_one_line(data_set, tmp_path) -> None:
    for source, message in (
        (str(tmp_path / "nowhere.tsv"), "nowhere.tsv: no such file of prompts"),
        (str(tmp_path / "used.txt"), "no prompt is left (1 elsewhere)"),
    ):
        (tmp_path / "used.txt").write_text("prompt of training 3\n")
        lists = section(tmp_path)
        with pytest.raises(ValueError, match="^generate.suites.parti: ") as error:
            prompts.prepare(lists, len, tmp_path / "out", {"parti": source})
        assert message in str(error.value) and "\n" not in str(error.value)


def test_suites_have_names_that_paths_can_have() -> None:
    raw = yaml.safe_load(config.preset("smoke"))
    raw["generate"]["suites"] = {"../x": "file.txt"}
    with pytest.raises(ValueError, match="generate.suites"):
        config.validate(raw)
    raw["generate"]["suites"] = {"parti": "file.txt"}
    with pytest.raises(ValueError, match="generate.suites: no suite 'hpd'; known: parti"):
        config.validate(raw).generate.check_suite("hpd")
    assert ("file.txt", None) in inputs.sources(config.validate(raw))["prompts"]


def test_one_list_is_split_into_prompts_to_train_on_and_to_evaluate(tmp_path) -> None:
    (tmp_path / "own.txt").write_text("".join(f"prompt number {i}\n" for i in range(20)))
    (tmp_path / "pairs").mkdir()
    pd.DataFrame({"caption": ["another"]}).to_parquet(tmp_path / "pairs/0.parquet")
    own = str(tmp_path / "own.txt")
    lists = config.Prompts(
        train=own, evaluation=own, pairs=str(tmp_path / "pairs"), n_train=12, n_validation=3, n_test=5
    )
    prompts.prepare(lists, len, tmp_path / "out")
    parts = [
        set((tmp_path / f"out/{name}.txt").read_text().splitlines())
        for name in ("train", "test", "validation")
    ]
    assert list(map(len, parts)) == [12, 5, 3] and len(set.union(*parts)) == 20
