"""docs/python.md names the whole API, which is imported when used; tests/smoke/test_python.py runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spo

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text()


def test_the_page_names_the_whole_api() -> None:
    for name in spo.__all__:
        assert re.search(rf"from spo import .*\b{name}\b", PAGE), name
        assert getattr(spo, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        spo.nothing  # noqa: B018


def test_importing_spo_imports_no_torch() -> None:
    code = (
        "import sys, spo; from spo import load_params; load_params('scenes'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
