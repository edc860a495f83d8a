"""What is published names no path of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.runtime.messages import public


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/models/my sd", "my sd"),
        ("~/models/sd", "sd"),
        ("../../home/alice/sd", "sd"),
        ("sqlite:////home/alice/mlflow.db", "sqlite:///mlflow.db"),
        ("file:///home/alice/x.txt", "file://x.txt"),
        ("file:/home/alice/x.txt", "file:x.txt"),
        ("FileNotFoundError: /home/alice/p.yaml: no such file", "FileNotFoundError: p.yaml: no such file"),
        (
            "- base model: /home/alice/sd (family)\n- pairs: '/home/alice/p'",
            "- base model: sd (family)\n- pairs: 'p'",
        ),
        ("postgresql://alice:word@host/db", "postgresql://***@host/db"),
    ],
)
def test_of_a_path_outside_the_project_the_last_component_stays(text: str, expected: str) -> None:
    assert public(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "data/base",
        "OWNER/NAME@0123",
        "hf://datasets/OWNER/NAME@0123/a/b.csv",
        "https://host/a/b?c=d/e",
        "s3://bucket/a/b",
        "git@host:owner/name.git",
        "red and/or blue, 1/2",
        "<b>bold</b>",
        "![](samples/0.png)",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert public(text) == text


def test_a_path_inside_the_project_becomes_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = {"a": [str(tmp_path / "data/base")], "b": f"{tmp_path}/x: damaged", "c": 3}
    assert public(value) == {"a": ["data/base"], "b": "x: damaged", "c": 3}
