from pathlib import Path

import pytest

from spo import cli, config


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_names_every_stage() -> None:
    text = cli.parser().format_help()
    for stage in cli.STAGES:
        assert stage in text
        assert (Path(cli.__file__).parent / "stages" / f"{stage}.py").exists()


def test_preset_writes_and_does_not_replace_unasked(capsys, tmp_path) -> None:
    path = tmp_path / "params.yaml"
    assert run(capsys, "preset", "smoke", "--output", str(path))[0] == 0
    assert config.load(path).name == "smoke"
    assert run(capsys, "preset", "smoke", "--output", str(path))[0] == 0
    status, _, error = run(capsys, "preset", "scenes", "--output", str(path))
    assert status == 2 and "--force" in error and config.load(path).name == "smoke"
    assert run(capsys, "preset", "scenes", "--output", str(path), "--force")[0] == 0
    assert config.load(path).name == "scenes"


def test_a_mistyped_key_is_one_line(capsys, tmp_path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(config.preset("smoke").replace("threshold:", "treshold:", 1))
    status, _, error = run(capsys, "prompts", "--params", str(path))
    assert status == 2
    assert error == f"spo: {path}: unknown key 'align.spo.treshold'; did you mean 'threshold'?\n"


@pytest.mark.parametrize("arguments", [["align"], ["align", "ppo"], ["generate", "x"], ["nothing"], []])
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_missing_inputs_are_one_line(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(config.preset("smoke"))
    for arguments in (["align", "spo"], ["pairs"], ["score", "base"], ["sample", "a red circle"]):
        status, _, error = run(capsys, *arguments)
        assert status == 2 and "make repro" in error and error.count("\n") == 1, arguments


def test_an_unknown_build_step_is_named(tmp_path) -> None:
    from tools import scenes

    build = scenes.Build(tmp_path / "d", tmp_path / "w")
    for asked in ({"until": "bass"}, {"only": "bass"}):
        with pytest.raises(ValueError, match="'bass'.*base"):
            scenes.run(build, **asked)


def test_a_folder_that_is_not_there_is_one_line(capsys, tmp_path) -> None:
    status, _, error = run(capsys, "preset", "smoke", "--output", str(tmp_path / "nowhere/params.yaml"))
    assert status == 2 and "nowhere/params.yaml" in error and error.count("\n") == 1


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "strong"])
@pytest.mark.parametrize("command", [("sample", "a star"), ("generate", "--lora", "x")])
def test_guidance_that_is_no_number_of_at_least_0_is_refused(capsys, command, value: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, f"--guidance={value}"])
    assert end.value.code == 2 and "must be a number of at least 0" in capsys.readouterr().err
