"""Kept checkpoints as MLflow's LoggedModels, which `mlflow.search_logged_models` finds over runs by score.

A LoggedModel has no files: its tags name the weights by path and SHA-256.
"""

from __future__ import annotations

from typing import Any

STEP = "step"  # the parameter that tells the models of one run apart


def log(client: Any, run_id: str, record: dict[str, Any]) -> None:
    """Make the LoggedModel of a run and step, with its scores, once however often it is called."""
    run = client.get_run(run_id)
    experiment, step = run.info.experiment_id, int(record["step"])
    known = client.search_logged_models(
        [experiment], f"source_run_id = '{run_id}' and params.{STEP} = '{step}'", max_results=1
    )
    model = (
        known[0]
        if known
        else client.create_logged_model(
            experiment,
            name=_name(run.info.run_name),
            source_run_id=run_id,
            params={STEP: str(step), **record["params"]},
            tags=record["tags"],
            model_type=record["kind"],
        )
    )
    if record["metrics"]:
        client.log_batch(run_id, metrics=_metrics(client, run_id, model.model_id, record))
    if all(output.model_id != model.model_id for output in run.outputs.model_outputs):
        _link(client, run_id, model.model_id, step)
    client.finalize_logged_model(model.model_id, "READY")


def _link(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Make the model an output of its run."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _metrics(client: Any, run_id: str, model_id: str, record: dict[str, Any]) -> list[Any]:
    """The scores as metrics of the model, at the time and step of the run's own: no second point there."""
    from mlflow.entities import Metric

    points = []
    for key, value in record["metrics"].items():
        own = [m for m in client.get_metric_history(run_id, key) if m.value == value]
        own.sort(key=lambda m: m.step == record["step"])
        time, step = (own[-1].timestamp, own[-1].step) if own else (record["time"], record["step"])
        points.append(Metric(key, value, time, step, model_id=model_id))
    return points


def _name(run_name: str) -> str:
    """MLflow takes none of /:.%"' in the name of a model."""
    return "".join("-" if letter in "/:.%\"'" else letter for letter in run_name)
