"""One reading of YAML: DVC's."""

from __future__ import annotations

from pathlib import Path

import pytest
from dvc.utils.serialize import loads_yaml

from spo import config
from spo.config import yaml_text

# YAML 1.1 reads these otherwise: 8, 90, True, 15 as an octal, 10, text
VALUES = ["010", "1:30", "yes", "0o17", "1_0", "2e-4", "no", "on", "0x1f", "~", ".5", "1e3", "2001-01-01"]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_read_as_dvc_reads_it(value: str) -> None:
    text = f"key: {value}\n"
    assert yaml_text.parse(text, "params.yaml") == loads_yaml(text)


def test_values_of_yaml_1_2_by_hand() -> None:
    values = "010 0o17 0x1f 2e-4 1_0 1:30 yes no true ~".split()
    read = yaml_text.parse("".join(f"- {value}\n" for value in values), "")
    assert read == [10, 15, 31, 2e-4, 10, "1:30", "yes", "no", True, None]


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n",
        "a: !!python/object:os.system x",
        "a: !secret x",
        "a: [1",
        "a: 1\n---\nb: 2",
        "a: !!int abc",
        "a: *b",
        "a: 2001-13-45",
        "\0",
    ],
)
def test_what_is_no_document_is_one_line_with_its_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"^dvc.lock: not valid YAML: [^\n]+$"):
        yaml_text.parse(text, "dvc.lock")


def test_what_is_written_is_read_again() -> None:
    content = {"b": {"x": 1e-8, "list": [1, "two"], "none": None, "empty": {}}, "a": ["no", "010", "ü: 円"]}
    text = yaml_text.dump(content)
    assert yaml_text.parse(text, "") == content == loads_yaml(text)
    assert list(yaml_text.parse(text, "")) == ["b", "a"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("drop_ties: false", "drop_ties: yes"),
        ("drop_ties: false", "drop_ties: 'true'"),
        ("seed: 1000", "seed: 1:30"),
        ("seed: 1000", "seed: '20'"),
        ("holds: {hps: 0.5}", "holds: {hps: '0.5'}"),
        ("holds: {hps: 0.5}", "holds: {hps: true}"),
        ("learning_rate: 2.0e-4", "learning_rate: '2e-4'"),
        ("eval_timesteps: [501]", "eval_timesteps: ['501']"),
    ],
)
def test_text_is_not_taken_for_a_number_or_a_boolean(old: str, new: str, tmp_path: Path) -> None:
    """DVC would hand on the text that it reads."""
    text = config.preset("scenes")
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(config.ConfigError, match="Input should be a valid (number|integer|boolean)") as error:
        config.load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "not NoneType"), (b"\xff", "not valid YAML"), (b"1: 2", "is missing")]
)
def test_a_file_without_sections_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(config.ConfigError, match=message) as error:
        config.load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value) and "params.yaml" in str(error.value)


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="cannot be read: Is a directory"):
        config.load(tmp_path)
