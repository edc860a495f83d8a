"""The step-aware preference model against the scores of the official implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig

from spo.preference.model import StepAwarePreferenceModel

GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.parity


@pytest.fixture(params=["eos2", "eos_id"])
def case(request: pytest.FixtureRequest):
    config = CLIPConfig.from_json_file(GOLDEN / f"spm_{request.param}_config.json")
    path = GOLDEN / f"spm_{request.param}_official_checkpoint.bin"
    model = StepAwarePreferenceModel.from_official_checkpoint(path, config)
    return model, np.load(GOLDEN / f"spm_{request.param}.npz"), config


@pytest.mark.parametrize("kind", ["square", "wide", "tall"])
def test_scores_are_the_official_ones(case, kind: str) -> None:
    model, golden, _ = case
    arguments = [torch.from_numpy(golden[k]) for k in (f"images_{kind}", "input_ids", "timesteps")]
    with torch.no_grad():
        scores = model.score(*arguments)
    expected = torch.from_numpy(golden[f"scores_{kind}"])
    assert ((scores - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_export_gives_the_official_file_back(case, tmp_path: Path) -> None:
    model, golden, config = case
    torch.save(model.state_dict(), tmp_path / "spm.bin")
    again = StepAwarePreferenceModel.from_official_checkpoint(tmp_path / "spm.bin", config)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_our_own_format_keeps_the_scores(case, tmp_path: Path) -> None:
    model, golden, _ = case
    model.save_pretrained(tmp_path)
    again = StepAwarePreferenceModel.from_pretrained(tmp_path)
    arguments = [torch.from_numpy(golden[k]) for k in ("images_wide", "input_ids", "timesteps")]
    with torch.no_grad():
        assert torch.equal(again.score(*arguments), model.score(*arguments))
