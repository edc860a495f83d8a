"""Starting several processes: what their end says."""

from __future__ import annotations

import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from spo.runtime import launch


def test_of_a_killed_process_its_number_is_named_on_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object) -> None:
        print("\rloading:  40%", end="", file=sys.stderr)
        raise ChildFailedError("spo", {0: ProcessFailure(0, 1, -9, "")})

    monkeypatch.setattr(api, "elastic_launch", lambda *_: started)
    with pytest.raises(ValueError, match="process 0 of 2 ended with -9"):
        launch.run(["align", "spo"], 2)
    assert capsys.readouterr().err.endswith("40%\n")
