"""Files are written in one step; first lines of errors are the same in each run."""

from pathlib import Path

import pytest

from spo.runtime.files import atomic, read_json, write_json
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
