"""A clone has the committed bytes, which DVC hashes, whatever git is set to do with line breaks."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(folder: Path, *words: str, stdin: str | None = None) -> list[str]:
    done = subprocess.run(
        ["git", *words], cwd=folder, input=stdin, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("settings", [("core.autocrlf=true",), ("core.eol=crlf", "core.autocrlf=false")])
def test_line_breaks_are_those_of_the_repository(settings: tuple[str, ...], tmp_path: Path) -> None:
    options = [word for setting in settings for word in ("-c", setting)]
    clone = tmp_path / "clone"
    git(ROOT, *options, "clone", "--quiet", "--shared", *options, str(ROOT), str(clone))
    entries = [line.split("\t") for line in git(clone, "ls-files", "-s")]
    assert len(entries) > 300
    names = "".join(f"{name}\n" for _, name in entries)
    found = git(clone, "hash-object", "--no-filters", "--stdin-paths", stdin=names)
    assert [n for (entry, n), hash_ in zip(entries, found, strict=True) if entry.split()[1] != hash_] == []


def test_the_attributes_hold_for_files_of_any_name() -> None:
    names = ["src/spo/new.py", "data.dvc", "a.txt", "a", ".dvc-seed/files/md5/00/0", "reports/a.png"]
    assert {line.split(": ")[-1] for line in git(ROOT, "check-attr", "text", *names)} == {"unset"}
