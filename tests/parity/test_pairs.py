"""Choice of the preference pair against golden figures of the official implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spo.methods.stepwise.pairs import select_pairs

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_pairs_match_golden(k: int, threshold: float) -> None:
    with np.load(GOLDEN / f"pairs_k{k}_th{threshold}.npz") as file:
        golden = {name: torch.from_numpy(value) for name, value in file.items()}
    assert float(golden["threshold"]) == threshold

    win, lose, valid = select_pairs(golden["scores"], threshold)
    assert torch.equal(win, golden["win"])
    assert torch.equal(lose, golden["lose"])
    assert torch.equal(valid, golden["valid"])
