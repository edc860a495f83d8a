"""The Prefect flow: overrides, one stage as a task, cancelling; the whole flow is in test_flow.py."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import changes
import psutil
import pytest
import subprocesses
import yaml
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings

from spo.config import ConfigError, load
from spo.tracking import dvc_lock, runs

pytestmark = pytest.mark.smoke

PARAMS: dict[str, Any] = {"name": "tiny", "tracking": None}


def test_overrides_are_checked_before_anything_is_written(pipeline: ModuleType, project: Path) -> None:
    before = (project / "params.yaml").read_text()
    for key, message in (("align.spo.beat", "did you mean 'beta'"), ("sead", "did you mean 'seed'")):
        with pytest.raises(ConfigError, match=message):
            changes.merged({key: 20})
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        changes.merged({"seed.x": 1})
    with pytest.raises(ConfigError, match="align.spo.beta"):
        pipeline.pipeline.fn({"align.spo.beta": "much"})
    assert (project / "params.yaml").read_text() == before
    assert not (project / ".spo").exists() and not (project / "dvc.lock").exists()


def test_the_command_line_refuses_a_wrong_override_in_one_line(
    pipeline: ModuleType, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(["--set", "align.spo.beat=20"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("pipeline: ") and message.count("\n") == 1 and "beta" in message


def test_a_schedule_needs_to_be_served_by_a_server(
    pipeline: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in ((["--cron", "0 3 * * *"], "--serve"), (["--serve"], "prefect server start")):
        with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(SystemExit, match="2"):
            pipeline.main(options)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("cron", ["every day", "61 3 * * *", "0 3 * *", "@nonsense"])
def test_a_cron_that_is_none_is_one_line(
    pipeline: ModuleType, cron: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        pipeline.main(["--serve", "--cron", cron])
    assert "is no cron expression" in capsys.readouterr().err.strip().splitlines()[-1]


def test_overrides_change_their_keys_and_keep_comments(pipeline: ModuleType, project: Path) -> None:
    before = (project / "params.yaml").read_text()
    new = {"align.spo.beta": 20, "align.spo.optimizer.learning_rate": 1e-4, "seed": 7}
    changes.write(new)
    after = (project / "params.yaml").read_text()
    assert yaml.safe_load(after) == changes.override(yaml.safe_load(before), new)
    assert after.splitlines()[0] == before.splitlines()[0] and after.startswith("#")
    assert changes.merged({}) == changes.merged(new)
    assert changes.merged({}).align.spo.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    "text", ["name=no", "name=on", "name=1:30", "backbone.revision=1_000", "seed=010", "name=0x1f"]
)
def test_an_override_is_checked_as_it_will_be_read(pipeline: ModuleType, project: Path, text: str) -> None:
    before = (project / "params.yaml").read_text()
    overrides = dict([changes.parse(text)])
    try:
        promised = changes.merged(overrides)
    except ConfigError:
        with pytest.raises(ConfigError):
            changes.write(overrides)
        assert (project / "params.yaml").read_text() == before
    else:
        changes.write(overrides)
        assert load("params.yaml") == promised


def test_an_override_of_a_section_that_an_anchor_shares_is_refused(
    pipeline: ModuleType, project: Path
) -> None:
    """It would change the other use of the anchor too."""
    text = (project / "params.yaml").read_text()
    lines = text.replace(
        "  spo: {adapter: outputs/align/spo, guidance: 2.0}", "  spo: &shared {adapter: null, guidance: 2.0}"
    )
    lines = lines.replace("  lpo: {adapter: outputs/align/lpo, guidance: 2.0}", "  lpo: *shared")
    (project / "params.yaml").write_text(lines)
    assert "&shared" in lines and "*shared" in lines
    with pytest.raises(ConfigError, match="an anchor shares the section; write it out"):
        changes.write({"generate.spo.guidance": 3.0})
    assert (project / "params.yaml").read_text() == lines


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_override_is_taken_back_if_the_flow_fails(
    pipeline: ModuleType, project: Path, error: type[BaseException]
) -> None:
    file = project / "params.yaml"
    before = file.read_bytes()
    with pytest.raises(error), changes.applied({"seed": 7}) as params:
        assert params.seed == 7 and load(file).seed == 7
        raise error
    assert file.read_bytes() == before
    with changes.applied({"seed": 7}):
        pass
    assert load(file).seed == 7
    with pytest.raises(error), changes.applied({"seed": 8}):
        file.write_text(file.read_text().replace("seed: 8", "seed: 9", 1))
        raise error
    assert load(file).seed == 9, "edited meanwhile"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1e-4", ("a.b", 1e-4)),
        ("a=null", ("a", None)),
        ("a=x=y", ("a", "x=y")),
        ("a=[1, 2]", ("a", [1, 2])),
    ],
)
def test_values_of_the_command_line(pipeline: ModuleType, text: str, expected: Any) -> None:
    assert changes.parse(text) == expected


def test_a_value_without_key_is_refused(pipeline: ModuleType) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="KEY=VALUE"):
        changes.parse("align.spo.beta")


def test_a_stage_runs_is_skipped_is_forced_and_fails(pipeline: ModuleType, project: Path) -> None:
    assert pipeline.stages() == {"first": (), "second": ("first",)}
    with disable_run_logger():
        run = pipeline.run_stage.fn
        first = run("first")
        assert (first["stage"], first["result"]) == ("first", "ran") and first["seconds"] > 0
        assert run("first")["result"] == "unchanged"
        assert run("second", force=True, parent="key-of-parent")["result"] == "ran"
        assert "SPO_PARENT_RUN=key-of-parent" in (project / "environment").read_text()
        for code in (2, 75):
            (project / "second.sh").write_text(
                "echo 'tracking: Connection refused'; echo 'spo: params.yaml: no such thing'\n"
                f"echo {code} > $SPO_EXIT_FILE; exit {code}\n"  # as `spo` does
            )
            with pytest.raises(pipeline.StageError, match="second.*no such thing") as failure:
                run("second")
            assert failure.value.transient == (code == 75), "DVC itself ends with 255"


class State:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def result(self) -> None:
        if self.error is not None:
            raise self.error


def test_only_transient_failures_are_tried_again(pipeline: ModuleType) -> None:
    assert pipeline.is_retryable(None, None, State(pipeline.StageError("server", transient=True)))
    assert not pipeline.is_retryable(None, None, State(pipeline.StageError("typo", transient=False)))
    assert not pipeline.is_retryable(None, None, State(TypeError("bug")))
    assert pipeline.run_stage.retries == 2


def test_the_lock_before_and_after_tells_what_dvc_did(pipeline: ModuleType, project: Path) -> None:
    """A stage of `spo` that ran has a run; without one, a new entry was restored from the cache of runs."""
    parent = runs.open_parent(PARAMS)
    old = dvc_lock.Entry("pairs", "spo pairs", {}, {"outputs/pairs": "1"}, {})
    new, other = (dataclasses.replace(old, **change) for change in ({"outs": {}}, {"cmd": "sh x.sh"}))
    assert pipeline.result("pairs", old, old, parent.key) == "unchanged"
    assert pipeline.result("pairs", old, new, parent.key) == "restored"
    assert pipeline.result("pairs", None, new, parent.key) == "restored"
    assert pipeline.result("pairs", old, other, parent.key) == "ran"
    content = {"name": "pairs", "experiment": "tiny", "stage": "pairs", "params": {}, "tags": {}}
    runs.Run.create(content | {"status": "FINISHED"}, parent.key)
    assert pipeline.result("pairs", old, old, parent.key) == "ran", "and gave the same"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_cancelling_ends_the_whole_group(
    pipeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage's child that ignores SIGTERM is gone too."""
    monkeypatch.setattr(subprocesses, "FLOW_KILL", 0.5)
    pids: list[int] = []
    script = "trap '' TERM; sleep 900 & echo $$ $!; wait; wait"
    previous = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))

    def log(line: str) -> None:
        pids.extend(int(word) for word in line.split())
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            subprocesses.execute(["sh", "-c", script], {}, log)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(pids) == 2 and time.monotonic() - started < 300, "of 900 s"
    while any(alive(pid) for pid in pids):
        assert time.monotonic() - started < 600, "the stage lives on"
        time.sleep(0.1)


def test_a_second_flow_in_the_folder_is_refused(pipeline: ModuleType, project: Path) -> None:
    with pipeline.alone(), pytest.raises(pipeline.StageError, match="another flow"), pipeline.alone():
        pass


def test_a_second_flow_waits_with_wait_minutes(pipeline: ModuleType, project: Path) -> None:
    first = pipeline.alone()
    first.__enter__()
    done = threading.Timer(0.3, lambda: first.__exit__(None, None, None))
    done.start()
    with pipeline.alone(wait_minutes=1):
        assert done.finished.is_set()


def test_the_summary_is_a_table_of_both(pipeline: ModuleType) -> None:
    row = {"method": "spo", "baseline": "base", "metric": "hps", "mean_difference": 0.5, "win_rate": 0.75}
    row |= {"ci_low": 0.25, "ci_high": 0.75, "n": 8}
    page = pipeline.summary([{"stage": "align@spo", "result": "ran", "seconds": 12.34}], [row])
    assert "| spo | base | hps | +0.500 | [+0.250, +0.750] | 75% | 8 |" in page
    assert "| align@spo | ran | 12.3 |" in page
