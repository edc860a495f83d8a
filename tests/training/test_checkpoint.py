import tracemalloc

import pytest
import torch

from spo.training.checkpoint import CheckpointStore


def test_the_newest_comes_back_and_two_stay(tmp_path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    for step in (5, 10, 15):
        store.save(step, {"weights": [torch.full((3,), float(step))]})
    step, state = store.latest()
    assert step == 15 and state["weights"][0].tolist() == [15.0] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010.ckpt", "00000015.ckpt"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, capsys, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(2)})
    store.save(2, {"x": torch.zeros(2)})
    path = tmp_path / "00000002.ckpt"
    data = bytearray(path.read_bytes())
    if damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data = bytearray()
    path.write_bytes(bytes(data))
    step, state = store.latest()
    assert "00000002.ckpt: damaged" in capsys.readouterr().err
    assert step == 1 and state["x"].tolist() == [1.0, 1.0]


def test_a_kill_while_writing_leaves_the_older_one(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(2)})
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save(2, {"x": torch.zeros(2)})
    assert store.latest()[0] == 1


def test_a_state_comes_back_on_the_cpu_whatever_device_it_was_on(tmp_path, monkeypatch) -> None:
    """That of GPU 0 would come to GPU 0 in every process."""
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda f, **options: asked.append(options) or load(f, **options))
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(2)})
    assert store.latest()[1]["x"].device.type == "cpu"
    assert asked == [{"map_location": "cpu", "weights_only": True}]


def test_saving_and_reading_hold_no_second_copy_of_the_state(tmp_path) -> None:
    """Python's own memory (tracemalloc): the tensors of 8 MB are torch's."""
    store, state = CheckpointStore(tmp_path), {"x": torch.ones(2**21)}
    tracemalloc.start()
    try:
        store.save(1, state)
        read = store.latest()[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(read["x"], state["x"])
    assert peak < 2 * 2**20 + 2**19, f"{peak} bytes"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_interrupts_a_write_is_what_is_raised(tmp_path, monkeypatch, error: BaseException) -> None:
    """Torch would make a RuntimeError of it."""

    class Full:
        def update(self, data: bytes) -> None:
            raise error

    store = CheckpointStore(tmp_path)
    store.save(1, {"x": torch.ones(2)})
    monkeypatch.setattr("spo.training.checkpoint._hash", lambda step: Full())
    with pytest.raises(type(error)):
        store.save(2, {"x": torch.zeros(2)})
    monkeypatch.undo()
    assert store.latest()[0] == 1 and len(list(tmp_path.iterdir())) == 1
