"""Files are written in one step; first lines of errors are the same in each run."""

import os
import stat
from pathlib import Path

import pytest

from spo.runtime.files import (
    atomic,
    read_csv,
    read_json,
    remove,
    remove_partials,
    write_json,
    write_text,
)
from spo.runtime.messages import first_line


def test_a_file_is_replaced_in_one_step_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new/a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic(path) as partial:
        partial.write_text("half")
        assert read_json(path, "numbers") == {"a": 1}
        raise KeyboardInterrupt
    assert read_json(path, "numbers") == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with atomic(path) as partial:
        partial.write_text("{}")
    assert read_json(path, "numbers") == {}


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_is_replaced_and_the_file_behind_it_stays(tmp_path: Path, link) -> None:
    cached, path = tmp_path / "cached", tmp_path / "a.txt"
    cached.write_bytes(b"old")
    cached.chmod(0o444)
    link(cached, path)
    write_text(path, "new\n")
    assert (path.read_bytes(), cached.read_bytes()) == (b"new\n", b"old")
    assert not path.is_symlink() and stat.S_IMODE(cached.stat().st_mode) == 0o444


def test_a_file_has_the_mode_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_writers_of_one_file_have_a_file_each(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # which was complete last
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    writing = atomic(tmp_path / "a")
    writing.__enter__().touch()
    (tmp_path / "b").touch()
    remove_partials(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_text_keeps_its_line_breaks(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "smörgås\r\nb\rc\n")
    assert (tmp_path / "a").read_bytes() == "smörgås\r\nb\rc\n".encode()


def test_of_a_link_to_a_folder_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").touch()
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder/a").exists() and not (tmp_path / "link").is_symlink()
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")  # nothing is there
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="a.json: truncated or invalid JSON .* run `make repro`"):
        read_json(tmp_path / "a.json", "numbers")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n first\nsecond"), "first"),
        (ValueError(""), "ValueError"),
        (ValueError("cannot identify <_io.BytesIO object at 0x7f0011223344>"), "cannot identify the data"),
        (ValueError("at 0x7f0011223344"), "at ..."),
        (ValueError("x" * 500), "x" * 120),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "a.json: cannot be read: .*utf-8"),
        (b"<<<<<<< HEAD\n{}", "a.json: truncated or invalid JSON"),
        (b"", "a.json: truncated or invalid JSON"),
        (b"[" * 100_000, "a.json: truncated or invalid JSON"),
        (b"[]", "a.json: must be an object, not list; run `make repro`"),
        (b"null", "a.json: must be an object, not NoneType"),
    ],
)
def test_only_a_missing_file_is_empty(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path, "numbers")
    assert "\n" not in str(error.value)


def test_a_file_without_a_key_is_named_with_it(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json", "numbers", keys=["a"]) == {"a": 1}
    with pytest.raises(ValueError, match="a.json: no key 'n'; delete it"):
        read_json(tmp_path / "a.json", "numbers", keys=["a", "n"], then="delete it")


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    for read in (read_json, read_csv):
        with pytest.raises(ValueError, match=f"{tmp_path}: .*[Dd]irectory"):
            read(tmp_path, "numbers")


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n1,2,3,4\n", b"\xff\xfe,\n"])
def test_a_damaged_table_is_one_line_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.csv: a damaged table \([^\n]+\); run `make repro`$"):
        read_csv(path, "numbers")
