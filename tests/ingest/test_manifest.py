import hashlib

import pytest

from spo.ingest.manifest import manifest


def test_a_folder_is_pinned_by_the_content_of_every_file(tmp_path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.bin").write_bytes(b"weights")
    pins = manifest(str(tmp_path / "a"))
    assert pins["files"] == {"b/x.bin": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "a/b/x.bin").write_bytes(b"others")
    assert manifest(str(tmp_path / "a"))["files"] != pins["files"]


def test_a_file_is_pinned_by_its_content(tmp_path) -> None:
    (tmp_path / "x.txt").write_text("hi")
    assert manifest(str(tmp_path / "x.txt"))["files"] == {"x.txt": hashlib.sha256(b"hi").hexdigest()}


@pytest.mark.parametrize("name", ["data/nowhere", "./nowhere", "nowhere"])
def test_a_missing_path_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match="make repro"):
        manifest(name)


def test_a_hub_id_without_a_network_is_one_line() -> None:
    with pytest.raises(
        ValueError, match="someone/some-model: not a local path, and the hub cannot be reached"
    ):
        manifest("someone/some-model")
