import pytest
import torch

from spo.training.checkpoint import CheckpointStore


def test_the_newest_comes_back_and_two_are_kept(tmp_path) -> None:
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
