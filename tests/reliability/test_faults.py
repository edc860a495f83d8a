"""Full disks, read-only folders, too little memory: a line, and the last good state."""

import os
import resource
import subprocess
from pathlib import Path

import in_fork
import pytest
import torch

from spo import cli
from spo.commands import arguments
from spo.training.checkpoint import CheckpointStore


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(100)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="checkpoint not written"):
            store.save(2, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001.ckpt"]
    step, state = CheckpointStore(tmp_path).latest()
    assert step == 1 and state["x"].sum() == 100


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "spo", str(tmp_path)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        store = CheckpointStore(tmp_path)
        store.save(1, {"x": torch.ones(100)})
        with pytest.raises(OSError, match="No space left.*the one before is complete"):
            store.save(2, {"x": torch.zeros(100_000)})
        assert store.latest()[0] == 1 and len(list(tmp_path.iterdir())) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_checkpoint_under_another_number_is_not_used(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(1)})
    store.save(2, {"x": torch.zeros(1)})
    (tmp_path / "00000002.ckpt").rename(tmp_path / "00000009.ckpt")
    assert store.latest()[0] == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "lower device.pairs, device.samples and device.images in params.yaml",
        ),
        (OSError(28, "No space left on device", "outputs/x"), "outputs/x"),
        (ValueError("http://me:planted-token@host/x?token=planted-token is away"), "***@host"),
    ],
)
def test_what_the_machine_lacks_is_one_line_without_secrets(
    capsys, monkeypatch, tmp_path, error, message
) -> None:
    def fail(args) -> None:
        raise error

    monkeypatch.setattr(arguments, "_run_preset", fail)
    assert cli.main(["preset", "smoke"]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and "planted-token" not in line


def test_a_mistake_of_ours_is_not_hidden(monkeypatch) -> None:
    def fail(args) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(arguments, "_run_preset", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["preset", "smoke"])


@pytest.mark.smoke
def test_memory_really_exhausted_is_one_line(tmp_path: Path, monkeypatch) -> None:
    def exhaust(args) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
        torch.zeros(2**36)

    monkeypatch.setattr(arguments, "_run_preset", exhaust)
    done = in_fork.spo(tmp_path, "preset", "smoke", variables=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("spo: out of memory"), done.stderr
    assert done.stderr.count("\n") == 1
