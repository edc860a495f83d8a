"""The code that names resume states and caches, and that stages of dvc.yaml depend on."""

from pathlib import Path

import pytest
import yaml

import spo
from spo import api
from spo.data import latents
from spo.stages import align, generate, pairs, preference, score

PACKAGE = Path(spo.__file__).parent
TRAINING = (api, align, generate, latents, preference, score)


@pytest.mark.parametrize("module", [*TRAINING, pairs], ids=lambda module: module.__name__)
def test_every_file_and_folder_that_names_a_state_exists(module) -> None:
    assert [part for part in module.CODE if not (PACKAGE / part).exists()] == []


def test_no_training_drawing_or_scoring_depends_on_readers_of_foreign_files() -> None:
    assert not any(part.startswith("ingest") for module in TRAINING for part in module.CODE)
    stages = yaml.safe_load((PACKAGE.parents[1] / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    readers = {name for name, stage in stages.items() if "src/spo/ingest" in stage.get("do", stage)["deps"]}
    assert readers == {"inputs", "pairs", "prompts"}
