"""`spo preset` with a model and prompts of one's own."""

import json

import pytest

from spo import cli, config
from spo.commands import preset


def written(capsys, tmp_path, *arguments: str) -> tuple[config.Params, str]:
    """The params.yaml of a command, and what the command printed."""
    path = tmp_path / "params.yaml"
    assert cli.main(["preset", *arguments, "--output", str(path), "--force"]) == 0, capsys.readouterr().err
    return config.load(path), capsys.readouterr().out


def refusal(capsys, tmp_path, *arguments: str) -> str:
    assert cli.main(["preset", *arguments, "--output", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "none.yaml").exists()
    return error


def prompts(tmp_path, count: int) -> str:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([*(f"prompt {i}" for i in range(count)), "Prompt 0!"]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", config.QUICK)
def test_a_first_try_is_short_and_says_first_what_it_downloads(name: str, capsys, tmp_path) -> None:
    params, printed = written(capsys, tmp_path, name, "--quick", "--card", "24")
    assert printed.startswith(f"{name}: downloads ") and printed.endswith(f"params.yaml: {name}\n")
    assert (params.prompts.n_test, params.prompts.n_train, params.device.memory) == (64, 64, 24)
    spo, dpo = params.align.spo, params.align.diffusion_dpo
    assert (spo.iterations, spo.prompts_per_iteration, dpo.iterations, dpo.pretrained) == (10, 4, 10, None)
    assert list(params.score.configured()) == ["pickscore", "hps"] and params.align.lpo is None
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert text.count("# downloads ") == 1 and config.counted(text) in printed


def test_a_first_try_is_of_what_trains_from_released_models(capsys, tmp_path) -> None:
    error = refusal(capsys, tmp_path, "sd15-eval", "--quick")
    assert "--quick: not for the preset sd15-eval; take sd15 or sdxl" in error


def diffusers_folder(tmp_path, kind: str) -> str:
    folder = tmp_path / kind
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
    return str(folder)


def test_a_checkpoint_of_another_family_is_refused(capsys, tmp_path) -> None:
    folder = diffusers_folder(tmp_path, "StableDiffusionXLPipeline")
    error = refusal(capsys, tmp_path, "sd15", "--checkpoint", folder)
    assert "--checkpoint with the preset sd15, of family 'sd'" in error
    assert "is a StableDiffusionXLPipeline" in error


def test_a_checkpoint_of_one_s_own_has_no_commit_and_its_own_licence(capsys, tmp_path, monkeypatch) -> None:
    described = []
    monkeypatch.setattr("spo.backbones.describe", described.append)
    folder = diffusers_folder(tmp_path, "StableDiffusionPipeline")
    before = config.validate(config.yaml_text.parse(config.preset("sd15"), "")).backbone
    own = written(capsys, tmp_path, "sd15", "--checkpoint", folder)[0].backbone
    change = {"checkpoint": folder, "revision": None, "license": None}
    assert own == before.model_copy(update=change) and [d.checkpoint for d in described] == [folder]
    (tmp_path / "StableDiffusionPipeline/README.md").write_text("---\nlicense: mit\n---\n")
    assert written(capsys, tmp_path, "sd15", "--checkpoint", folder)[0].backbone.license == "mit"
    own = written(capsys, tmp_path, "sd15", "--checkpoint", "me/model@v2")[0].backbone
    assert (own.checkpoint, own.revision, own.license) == ("me/model", "v2", None)


def test_prompts_of_one_s_own_are_for_training_and_evaluation(capsys, tmp_path) -> None:
    """Of 1000 distinct ones 900 are used, of these 24 to validate and a quarter of the rest to test."""
    own = prompts(tmp_path, 1000)
    params, _ = written(capsys, tmp_path, "sd15-overnight", "--prompts", own)
    lists = params.prompts
    assert lists.train == lists.evaluation == own
    assert (lists.n_validation, lists.n_test, lists.n_train) == (24, 219, 657)
    lists = written(capsys, tmp_path, "sd15-eval", "--prompts", own)[0].prompts
    assert (lists.train, lists.evaluation, lists.n_test, lists.n_train) == (None, own, 500, 0)


def test_too_few_prompts_are_one_line(capsys, tmp_path) -> None:
    error = refusal(capsys, tmp_path, "sd15-overnight", "--prompts", prompts(tmp_path, 30))
    assert "27 prompts are too few" in error and "24 are for validation" in error
    assert "no such file" in refusal(capsys, tmp_path, "sd15", "--prompts", str(tmp_path / "x.txt"))


def test_every_other_key_stays_with_its_comment(tmp_path) -> None:
    text = preset.text("sd15", None, False, None, None)
    assert preset.text("sd15", 24, False, None, None) == text.replace("{memory: auto", "{memory: 24")
