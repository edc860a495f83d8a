"""A key that params.yaml omits has the default of the code, and DVC notices when that changes."""

import json
from collections.abc import Iterator

import experiments
import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.smoke]  # DVC some forty times, a second or two each
DEFAULT = ("src/spo/config/training.py", "beta: Rate = 10.0", "beta: Rate = 12.0")
SPO = ["align@spo", "generate@spo", "score@spo"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> experiments.Experiment:
    return experiments.settled(tmp_path_factory)


@pytest.fixture
def experiment(shared: experiments.Experiment) -> Iterator[experiments.Experiment]:
    with experiments.restored(shared):
        yield shared


def defaults(experiment: experiments.Experiment) -> dict:
    return json.loads((experiment.folder / "outputs/inputs/defaults.json").read_text())


def test_the_shipped_experiment_rests_on_no_default(experiment) -> None:
    assert defaults(experiment) == {}
    assert experiment.stages() == []
    experiment.edit(*DEFAULT)
    assert experiment.stages() == ["inputs"]


def test_a_changed_default_of_an_omitted_key_reruns_every_stage(experiment) -> None:
    kept = "    batch_size: 16 # pairs per update\n"
    experiment.edit("params.yaml", f"{kept}    beta: 10\n", kept)
    assert experiment.stages("dvc repro inputs") == ["inputs"]
    assert defaults(experiment) == {"align.spo.beta": 10.0}
    changed = json.loads(experiment("dvc status --json"))
    assert {*changed, "inputs"} == experiment.names, "all depend on what the file holds"
    experiment("dvc commit --force --quiet")  # as if they had run, in a third of the time
    assert experiment.stages() == []
    experiment.edit(*DEFAULT)
    assert set(experiment.stages()) == experiment.names
    assert defaults(experiment) == {"align.spo.beta": 12.0}


def test_where_a_run_is_logged_reruns_no_stage(experiment) -> None:
    path = experiment.folder / "params.yaml"
    lines = path.read_text().splitlines(keepends=True)
    gate = next(i for i, line in enumerate(lines) if line.startswith("registry:"))
    kept = [line for line in lines[:gate] if not line.startswith(("tracking:", "processes:", "device:"))]
    enough = [line for line in lines[gate:] if line.startswith(("registry:", "  min_prompts:"))]
    path.write_text("".join([*kept, *enough]))
    assert experiment.stages() == []
    experiment.edit("params.yaml", "seed: 0\n", "seed: 0\ntracking: http://127.0.0.1:5000\n")
    assert experiment.stages() == []


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed", "seed: 0\n"),
        ("generate.split", "  split: test # or validation, for tuning\n"),
        ("generate.seed", "  seed: 1000\n"),
        ("score.oracle", "  oracle: data/oracle\n"),
    ],
)
def test_a_key_that_dvc_yaml_names_is_missed_before_anything_runs(experiment, key: str, line: str) -> None:
    experiment.edit("params.yaml", line, "")
    refused = experiment.run("dvc repro")
    (reason,) = [line for line in refused.stderr.splitlines() if line.startswith("ERROR")]
    assert refused.returncode != 0 and key in reason
    assert "Running stage" not in refused.stdout


def test_an_experiment_runs_what_a_key_touches(experiment) -> None:
    """SPO and what depends on it; no other training, no image of the base model."""
    assert experiment.stages("dvc exp run -S align.spo.beta=20") == ["inputs", *SPO, "report"]
    assert "beta: 20" in (experiment.folder / "params.yaml").read_text()
