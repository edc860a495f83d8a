"""Ask DVC for the stages of dvc.yaml: what each needs, and which are out of date."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from spo.runtime.messages import TransientError, first_line

Needs = Mapping[str, tuple[str, ...]]


def needs() -> dict[str, tuple[str, ...]]:
    """Return {stage: stages and data files that it is made from}, in the order in which DVC runs them."""
    with _repository() as repository:
        return _needs(*_graph(repository))


def out_of_date() -> dict[str, tuple[str, ...]]:
    """Return the stages of `needs` that DVC must check: those that changed, and all that follow them."""
    import networkx

    with _repository() as repository:
        graph, stages = _graph(repository)
        changed = {stage for stage in stages if stage.changed()}
        following = changed.union(*(networkx.ancestors(graph, stage) for stage in changed))
        return _needs(graph, [stage for stage in stages if stage in following])


def status(stages: Sequence[str]) -> dict[str, list[Any]]:
    """Return what `dvc status STAGES` finds: {stage: changes}, without those that are up to date."""
    with _repository(locked=False) as repository:
        found: dict[str, list[Any]] = repository.status(targets=list(stages))
        return found


@contextmanager
def _repository(locked: bool = True) -> Iterator[Any]:
    """Open DVC's repository, `locked` but for calls that lock it themselves; its errors are one line."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc.progress").setLevel(logging.CRITICAL)  # else a progress bar for each file
    try:
        with Repo(_wait_for_lock=True) as repository, repository.lock if locked else nullcontext():
            yield repository
    except LockError as error:
        raise TransientError(f"dvc: {' '.join(str(error).split())}") from None
    except DvcException as error:
        raise ValueError(f"dvc: {first_line(error, 500)}") from None


def _graph(repository: Any) -> tuple[Any, list[Any]]:
    """Return the graph from each stage to what it needs, and the stages in the order of `dvc repro`."""
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repository.index.graph)
    return graph, list(plan_repro(graph, collect_stages(repository, ["dvc.yaml"])))


def _needs(graph: Any, stages: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    return {s.addressing: tuple(sorted(needed.addressing for needed in graph.successors(s))) for s in stages}
