"""Log a run by calls of MLflow; a repeated call has no effect."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo.runtime.files import digest
from spo.runtime.messages import causes

Point = tuple[int, int, Mapping[str, float]]  # time, step, metrics


def is_away(error: BaseException) -> bool:
    """Whether no server answered, so that further requests would wait in vain."""
    from requests import ConnectionError, Timeout

    return any(isinstance(cause, ConnectionError | Timeout) for cause in causes(error))


def description(client: Any, run_id: str, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    named = [Param(k, v) for k, v in params.items()]
    for start in range(0, len(named), 100):  # the most that MLflow takes in one call
        client.log_batch(run_id, params=named[start : start + 100])
    client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])


def metrics(client: Any, run_id: str, rows: Sequence[Point], model: str | None = None) -> None:
    """Log metrics at their own times. One that is refused stops no other; its error is raised in the end."""
    from mlflow.entities import Metric

    points = [Metric(k, v, time, step, model_id=model) for time, step, row in rows for k, v in row.items()]
    try:
        for start in range(0, len(points), 1000):  # the most that MLflow takes in one call
            client.log_batch(run_id, metrics=points[start : start + 1000])
    except Exception as error:
        names = {point.key for point in points}
        if is_away(error) or len(names) == 1:
            raise
        for name in names:
            with contextlib.suppress(Exception):
                metrics(client, run_id, [(t, s, {name: r[name]}) for t, s, r in rows if name in r], model)
        raise


def inputs(client: Any, run_id: str, data: Sequence[Mapping[str, str]]) -> None:
    """Log what a stage read as datasets: path and DVC's hash, from which `dvc` can restore it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for item in data:
        source = json.dumps({"path": item["name"], "md5": item["digest"]})
        tags = [InputTag("mlflow.data.context", item["context"])] if "context" in item else []
        dataset = Dataset(name=item["name"], digest=item["digest"][:36], source_type="dvc", source=source)
        found.append(DatasetInput(dataset, tags))
    client.log_inputs(run_id, datasets=found)


def artifact(client: Any, run_id: str, file: Mapping[str, str]) -> None:
    """Log a file, unless the run has it; check the upload, since a login page accepts any.

    One that has changed or was removed since it was recorded is not sent, and a tag of the run says so.
    """
    path = Path(file["path"])

    def is_there() -> bool:
        return any(Path(f.path).name == path.name for f in client.list_artifacts(run_id, file["folder"]))

    if is_there():
        return
    if digest(path) != file["sha256"]:
        client.set_tag(run_id, f"artifact.{path.name}", "changed or removed before it was sent to MLflow")
        return
    client.log_artifact(run_id, str(path), file["folder"])
    if not is_there():
        raise ValueError(f"{path.name} is not there after its upload")


def images(client: Any, run_id: str, folder: Path, sent: set[str]) -> None:
    """Log the images STEP.png of a folder for the step slider of MLflow's UI; `sent` gets their names."""
    from PIL import Image

    paths = [path for path in sorted(folder.glob("*.png")) if path.name not in sent]
    listed = [Path(file.path).name for file in client.list_artifacts(run_id, "images")] if paths else []
    for path in paths:
        step, time = int(path.stem), int(1000 * path.stat().st_mtime)
        name = f"validation+step+{step}+timestamp+{time}+"
        # the last file of a call
        if not any(f.startswith(name) and f.endswith("+compressed.webp") for f in listed):
            with Image.open(path) as image:
                image.load()
                client.log_image(run_id, image, key="validation", step=step, timestamp=time, synchronous=True)
        sent.add(path.name)


def model(client: Any, run_id: str, item: Mapping[str, Any], rows: Sequence[Point]) -> None:
    """Make the LoggedModel of a run and step; metrics that begin with the item's `scores` are its own too."""
    from mlflow.entities import LoggedModelOutput

    run, step = client.get_run(run_id), item["step"]
    experiment, same = run.info.experiment_id, f"source_run_id = '{run_id}' and params.step = '{step}'"
    known = client.search_logged_models([experiment], same, max_results=1)
    if known:
        made = known[0]
    else:
        name = "".join("-" if letter in "/:.%\"'" else letter for letter in run.info.run_name)
        described = {"params": {"step": str(step)}, "tags": item["tags"], "model_type": item["kind"]}
        made = client.create_logged_model(experiment, name=name, source_run_id=run_id, **described)
    scores = [(t, s, {k: v for k, v in row.items() if k.startswith(item["scores"])}) for t, s, row in rows]
    metrics(client, run_id, scores, made.model_id)
    if all(output.model_id != made.model_id for output in run.outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])
    client.finalize_logged_model(made.model_id, "READY")
