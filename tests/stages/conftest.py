from contextlib import nullcontext

import pytest

from spo.stages import inputs, pairs, prompts


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a stage of the data logs, without a run in MLflow."""
    metrics: dict[str, float] = {}

    class Run:
        def log_metrics(self, values: dict[str, float]) -> None:
            metrics.update(values)

    for module in (inputs, pairs, prompts):
        monkeypatch.setattr(module, "stage", lambda *_: nullcontext(Run()))
    return metrics
