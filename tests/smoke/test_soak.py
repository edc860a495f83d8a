"""Rounds in one process; the long version is soak.py by hand."""

import sys
from pathlib import Path

import clones
import pytest

SOAK = Path(clones.__file__).with_name("soak.py")
pytestmark = pytest.mark.smoke


@pytest.mark.nightly
def test_nothing_grows_from_round_to_round(copy: Path) -> None:
    stages = ("align@spo", "generate@spo", "score@spo")
    done = clones.run(copy, sys.executable, str(SOAK), str(copy), "--rounds", "3", "--stages", *stages)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("grew: nothing\n") and done.stderr.count("round ") == 3


def test_growth_is_seen() -> None:
    import soak

    use = soak.Use(1, 1, 500, 10, 4, 0, 1, 20)
    assert soak.growth([use] * 3, 50) == []
    more = soak.Use(1, 1, 560, 11, 4, 0, 2, 20)
    assert soak.growth([more, use, more], 50) == [
        "open_files: 10 to 11",
        "temporary: 1 to 2",
        "megabytes: 500 to 560",
    ]
