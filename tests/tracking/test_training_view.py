"""What MLflow's model training view shows: images by step, LoggedModels, datasets, source."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from ports import free_port

from spo.runtime.files import digest
from spo.tracking import dvc_lock
from spo.tracking.curve import Curve
from spo.tracking.delivery import deliver, sync
from spo.tracking.records import runs_here
from spo.tracking.runs import close_parent, open_parent, stage_run
from spo.tracking.store import KIND, Store, load_mlflow

PARAMS: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "tracking": None,
    "align": {"spo": {"beta": 10}},
    "pairs": {"source": "hf://datasets/owner/pairs/data"},
    "prompts": {"train": "train.txt", "evaluation": "test.txt", "n_test": 2},
}


@contextmanager
def serving(folder: Path, port: int) -> Iterator[Callable[[], None]]:
    """An MLflow server; yields what kills it at once, with all its processes."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    variables = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield kill
    finally:
        kill()


class Training:
    """A stage's curve and validation images."""

    def __init__(self, run: Any, folder: Path) -> None:
        self.run, self.folder = run, folder / "scratch"
        self.curve = Curve(run, self.folder)
        (self.folder / "samples").mkdir()
        self.curve.resume(0)

    def validate(self, step: int, gain: float) -> None:
        self.curve.log({"validation/gain": gain, "loss": 1.0}, step)
        Image.new("RGB", (16, 8), (step, 0, 0)).save(self.folder / f"samples/{step:06d}.png")

    def keep(self, step: int) -> Path:
        weights = self.folder.parent / f"adapter-{step}.safetensors"
        weights.write_bytes(bytes([step]))
        self.run.log_model(weights, "adapter", step, "validation/")
        return weights

    def end(self) -> None:
        self.curve.write(None)
        shutil.rmtree(self.folder)  # as a stage does


def images(client: Any, run_id: str, folder: Path) -> dict[int, tuple[int, int, int]]:
    """The first pixel of the one image at each step."""
    found = {}
    for file in client.list_artifacts(run_id, "images"):
        name = Path(file.path).name
        key, _, step, _, _, *_ = name.split("+")
        assert key == "validation"
        if name.endswith(".png"):
            assert int(step) not in found, "two images of one step"
            with Image.open(client.download_artifacts(run_id, file.path, str(folder))) as image:
                found[int(step)] = image.convert("RGB").getpixel((0, 0))
    return found


@pytest.mark.services
@pytest.mark.nightly
def test_a_server_killed_in_the_middle_loses_no_image_and_no_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr("spo.tracking.delivery.PERIOD", 0.2)
    mlflow = load_mlflow()
    with serving(folder, port) as kill:
        with stage_run("align", PARAMS, "spo") as run:
            training = Training(run, folder)
            training.validate(0, 0.0)
            training.validate(10, 0.5)
            training.keep(10)
            training.end()
        with stage_run("align", PARAMS | {"seed": 4}, "spo") as run:
            training = Training(run, folder)
            training.validate(0, 0.0)
            client = mlflow.MlflowClient()
            deadline = time.monotonic() + 600
            while True:
                experiment = client.get_experiment_by_name("tiny").experiment_id
                (newest,) = client.search_runs([experiment], max_results=1)
                if newest.info.status == "RUNNING" and client.list_artifacts(newest.info.run_id, "images"):
                    break
                assert time.monotonic() < deadline
            kill()
            training.validate(20, 0.75)
            weights = training.keep(20)
            training.end()
    assert any(run.is_pending() for run in runs_here()), "the end of the second run waits"
    with serving(folder, port):
        deadline = time.monotonic() + 600
        while sync()[1]:
            assert time.monotonic() < deadline
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tiny")
        order = [{"field_name": "metrics.validation/gain", "ascending": False}]
        models = mlflow.search_logged_models([experiment.experiment_id], order_by=order, output_format="list")
        assert [m.params["step"] for m in models] == ["20", "10"]
        best, (second, first) = models[0], client.search_runs([experiment.experiment_id])
        assert best.source_run_id == second.info.run_id and best.status == "READY"
        assert best.tags["weights.sha256"] == digest(weights)
        assert client.list_logged_model_artifacts(best.model_id) == []
        assert [(o.model_id, o.step) for o in second.outputs.model_outputs] == [(best.model_id, 20)]
        assert images(client, first.info.run_id, folder) == {0: (0, 0, 0), 10: (10, 0, 0)}
        assert images(client, second.info.run_id, folder) == {0: (0, 0, 0), 20: (20, 0, 0)}
        history = client.get_metric_history(second.info.run_id, "validation/gain")
        assert [(m.step, m.value) for m in history] == [(0, 0.0), (20, 0.75)], "no point twice"
        mlflow.set_tracking_uri(None)


def test_images_and_models_are_delivered_once(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live, at the end, and again by processes that do not know what the first one has sent."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with stage_run("align", PARAMS | {"name": "tiny"}, "a/b") as run:
        monkeypatch.setattr(type(run), "mark", lambda *_: None)
        training = Training(run, folder)
        training.validate(0, 0.0)
        assert not deliver(Store(uri), [run])
        training.validate(10, 0.5)
        training.keep(10)
        run.log_artifact(folder / "adapter-10.safetensors")
        assert not deliver(Store(uri), [run])
        training.end()
    for _ in range(2):
        assert not deliver(Store(uri), [run])
    client, found = Store(uri).connect(), runs()["align-a/b"]
    assert images(client, found.info.run_id, folder) == {0: (0, 0, 0), 10: (10, 0, 0)}
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert model.name == "align-a-b" and {m.key: m.value for m in model.metrics} == {"validation/gain": 0.5}
    assert len(found.outputs.model_outputs) == 1 and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "validation/gain")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (10, 0.5)]
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["adapter-10.safetensors", "images"]


def test_a_pulled_training_has_its_curve_and_images(folder: Path, runs: Any) -> None:
    """Its entry in dvc.lock and its outputs are enough, in a store that has not the run that made them."""
    (folder / "reports/training").mkdir(parents=True)
    (folder / "reports/training/spo.csv").write_text("step,loss,validation/gain\n0,,0\n1,0.5,\n")
    (folder / "outputs/align/spo/samples").mkdir(parents=True)
    Image.new("RGB", (16, 8), (7, 0, 0)).save(folder / "outputs/align/spo/samples/000010.png")
    outs = [{"path": path, "md5": "a"} for path in ("outputs/align/spo", "reports/training/spo.csv")]
    (folder / "dvc.lock").write_text(
        yaml.safe_dump({"stages": {"align@spo": {"cmd": "spo align spo", "outs": outs}}})
    )
    for name in ("first", "second"):
        close_parent(open_parent(PARAMS, name), PARAMS, "FINISHED", ["align@spo"])
    assert sync() == (4, 0)
    client = Store(f"sqlite:///{folder / 'mlflow.db'}").connect()
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    for run in (r for r in found if r.info.run_name == "align-spo"):
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5)]
        assert images(client, run.info.run_id, folder) == {10: (7, 0, 0)}
        assert run.data.tags["dvc.out.outputs/align/spo"] == "a"


def test_an_experiment_opens_in_the_view_for_model_training(folder: Path, runs: Any) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    client = store.connect()
    (kind,) = KIND
    client.create_experiment("chosen", tags={kind: "genai_development"})
    for name in ("new", "chosen"):
        store.start_run(name, "a run", {}, {})
    tags = {e.name: e.tags for e in client.search_experiments()}
    assert tags["new"][kind] == "custom_model_development"
    assert tags["chosen"][kind] == "genai_development", "what somebody chose stays"


def test_a_kind_is_one_that_the_ui_knows() -> None:
    scripts = (Path(load_mlflow().__file__).parent / "server/js/build/static/js").glob("*.js")
    (kind,) = KIND.values()
    assert any(f'CUSTOM_MODEL_DEVELOPMENT="{kind}"' in script.read_text() for script in scripts)


def test_a_parent_names_data_source_and_commit(folder: Path, runs: Any) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q", "-b", "trunk")
    git("remote", "add", "origin", "https://me:pa55word@example.org/owner/project")
    git("commit", "-q", "--allow-empty", "-m", "first")
    parent = open_parent(PARAMS, "nightly")
    pins = {"outputs/inputs/pairs.json": "a" * 32, "outputs/inputs/prompts.json": "b" * 32}
    stages = {
        name: {"cmd": f"spo {name}", "deps": [{"path": pin, "md5": md5}]}
        for name, (pin, md5) in zip(("pairs", "prompts"), pins.items(), strict=True)
    }
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    assert set(dvc_lock.read()) == {"pairs", "prompts"}
    close_parent(parent, PARAMS, "FINISHED", ["pairs"])
    close_parent(parent, PARAMS, "FINISHED", ["pairs", "prompts"])
    sync()
    run = runs()["nightly"]
    data = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs}
    assert data == {
        "hf://datasets/owner/pairs/data": ("a" * 32, "training"),
        "train.txt": ("b" * 32, "training"),
        "test.txt": ("b" * 32, "evaluation"),
    }
    tags = run.data.tags
    assert tags["mlflow.source.name"] == "https://***@example.org/owner/project"
    assert tags["mlflow.source.git.branch"] == "trunk" and len(tags["mlflow.source.git.commit"]) == 40
