import pytest
import torch

from spo.data import weights


def test_a_torch_file_without_weights_is_refused(tmp_path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    for name in ("list.pt", "text.pt", "missing.pt"):
        with pytest.raises(
            ValueError, match=f"{name}: (must be tensors by name|cannot be read as weights|no such file)"
        ) as error:
            weights.load_state(tmp_path / name, name)
        assert "\n" not in str(error.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        weights.load_state(tmp_path / "evil.pt", "evil.pt")
    assert not (tmp_path / "made").exists()
