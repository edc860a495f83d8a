"""The world's files when data/ holds links into DVC's cache."""

import os
from pathlib import Path

from tools.scenes import own_files


def test_what_is_made_again_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    cache, data = tmp_path / "cache", tmp_path / "data"
    (data / "base").mkdir(parents=True)
    cache.write_text("first")
    cache.chmod(0o444)
    os.link(cache, data / "base/hard")
    (data / "symbolic").symlink_to(cache)
    own_files(data)
    for path in (data / "base/hard", data / "symbolic"):
        assert path.read_text() == "first" and not path.is_symlink()
        path.write_text("second")
    assert cache.read_text() == "first" and cache.stat().st_nlink == 1
