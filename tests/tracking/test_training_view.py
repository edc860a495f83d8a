"""What MLflow's model training view shows: images by step, LoggedModels, datasets, source."""

from __future__ import annotations

import contextlib
import os
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
from spo.tracking.records import load_mlflow
from spo.tracking.runs import Run, close_parent, open_parent, stage_run, sync
from spo.tracking.spool import Spool, spools
from spo.tracking.store import KIND, Store

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


def picture(folder: Path, step: int) -> Path:
    path = folder / f"{step}.png"
    Image.new("RGB", (16, 8), (step, 0, 0)).save(path)
    return path


def validate(run: Any, folder: Path, step: int, gain: float) -> None:
    run.log_metrics({"validation/gain": gain}, step=step)
    image = picture(folder, step)
    run.log_image(image, "validation", step)
    image.unlink()  # as a stage removes its scratch folder


def keep(run: Any, folder: Path, step: int, gain: float) -> Path:
    weights = folder / f"adapter-{step}.safetensors"
    weights.write_bytes(bytes([step]))
    run.log_model(weights, "adapter", step, {"validation/gain": gain}, {"iteration": step // 10})
    return weights


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
def test_a_server_killed_in_the_middle_loses_no_image_and_no_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy server takes more than 5 s
    mlflow = load_mlflow()
    with serving(folder, port) as kill:
        with stage_run("align", PARAMS, "spo") as run:
            validate(run, folder, 0, 0.0)
            validate(run, folder, 10, 0.5)
            keep(run, folder, 10, 0.5)
        with stage_run("align", PARAMS | {"seed": 4}, "spo") as run:
            validate(run, folder, 0, 0.0)
            deadline = time.monotonic() + 600
            while run.spool.left():
                assert time.monotonic() < deadline
                time.sleep(0.2)
            kill()
            validate(run, folder, 20, 0.75)
            weights = keep(run, folder, 20, 0.75)
    assert spools(), "the end of the second run waits"
    with serving(folder, port):
        deadline = time.monotonic() + 600
        while sync()[1]:
            assert time.monotonic() < deadline
        assert not spools() and not list((folder / ".spo/spool").glob("*.files"))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("tiny")
        order = [{"field_name": "metrics.validation/gain", "ascending": False}]
        models = mlflow.search_logged_models([experiment.experiment_id], order_by=order, output_format="list")
        assert [m.params["step"] for m in models] == ["20", "10"]
        best, (second, first) = models[0], client.search_runs([experiment.experiment_id])
        assert best.source_run_id == second.info.run_id and best.status == "READY"
        assert best.tags["weights.sha256"] == digest(weights) and best.tags["weights"] == weights.name
        assert client.list_logged_model_artifacts(best.model_id) == []
        assert [(o.model_id, o.step) for o in second.outputs.model_outputs] == [(best.model_id, 20)]
        assert images(client, first.info.run_id, folder) == {0: (0, 0, 0), 10: (10, 0, 0)}
        assert images(client, second.info.run_id, folder) == {0: (0, 0, 0), 20: (20, 0, 0)}
        history = client.get_metric_history(second.info.run_id, "validation/gain")
        assert [(m.step, m.value) for m in history] == [(0, 0.0), (20, 0.75)], "no point twice"
        mlflow.set_tracking_uri(None)


def test_images_and_models_are_delivered_once(folder: Path, runs: Any) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    with stage_run("pairs", PARAMS):  # makes the store's experiment
        pass
    record = {"uri": store.name, "experiment": "tiny", "parent": None, "tags": {}}
    spool = Spool.create(name="align: a/b", shared=True, **record)
    run = Run(spool)
    validate(run, folder, 10, 0.5)
    keep(run, folder, 10, 0.5)
    for _ in range(2):
        store.deliver(spool)
        spool.path.with_suffix(".state").unlink()
    client, found = store.connect(), runs()["align: a/b"]
    assert images(client, found.info.run_id, folder) == {10: (10, 0, 0)}
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert model.name == "align- a-b" and model.metrics[0].value == 0.5
    assert len(found.outputs.model_outputs) == 1
    assert len(client.get_metric_history(found.info.run_id, "validation/gain")) == 1


def test_an_experiment_opens_in_the_view_for_model_training(folder: Path, runs: Any) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    client = store.connect()
    client.create_experiment("chosen", tags={KIND[0]: "genai_development"})
    for name in ("new", "chosen"):
        store.start_run(name, "a run", {}, {})
    tags = {e.name: e.tags for e in client.search_experiments()}
    assert tags["new"][KIND[0]] == "custom_model_development"
    assert tags["chosen"][KIND[0]] == "genai_development", "what somebody chose stays"


def test_a_kind_is_one_that_the_ui_knows() -> None:
    scripts = (Path(load_mlflow().__file__).parent / "server/js/build/static/js").glob("*.js")
    assert any(f'CUSTOM_MODEL_DEVELOPMENT="{KIND[1]}"' in script.read_text() for script in scripts)


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
