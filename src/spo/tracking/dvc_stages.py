"""The stages of dvc.yaml by DVC's own account: what each needs, and which are out of date."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from spo.runtime.messages import TransientError, first_line

Needs = Mapping[str, tuple[str, ...]]


def needs() -> dict[str, tuple[str, ...]]:
    """Return {stage: stages and data files that it is made from}, in the order in which DVC runs them.

    Raises:
        ValueError: DVC refuses dvc.yaml, with its reason.
    """
    with _repository() as repository:
        return _needs(repository, _stages(repository))


def out_of_date() -> dict[str, tuple[str, ...]]:
    """Return of `needs` the stages that DVC has to look at: those that changed, and all that follow them.

    Raises:
        ValueError: DVC refuses dvc.yaml, or another DVC works on these files.
    """
    with _repository() as repository:
        stages = _stages(repository)
        changed = {stage.addressing for stage in stages if stage.changed()}
        every = _needs(repository, stages)
    return {name: every[name] for name in following(every, changed)}


def status(stages: Sequence[str]) -> dict[str, list[Any]]:
    """Return what `dvc status STAGES` finds: {stage: changes}, without those that are up to date.

    Raises:
        ValueError: DVC refuses dvc.yaml, or another DVC works on these files.
    """
    with _repository(locked=False) as repository:
        found: dict[str, list[Any]] = repository.status(targets=list(stages))
        return found


def following(needs: Needs, changed: Collection[str]) -> list[str]:
    """List `changed` and the stages that are made from them, directly or not, in the order of `needs`."""
    found = set(changed)
    for name in needs:  # each comes behind what it needs
        if found.intersection(needs[name]):
            found.add(name)
    return [name for name in needs if name in found]


@contextmanager
def _repository(locked: bool = True) -> Iterator[Any]:
    """
    Args:
        locked: hold DVC's lock; False for calls that take it themselves.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(_wait_for_lock=True) as repository, repository.lock if locked else nullcontext():
            yield repository
    except LockError as error:
        raise TransientError(f"dvc: {' '.join(str(error).split())}") from None
    except DvcException as error:
        raise ValueError(f"dvc: {first_line(error, 500)}") from None


def _stages(repository: Any) -> list[Any]:
    """List the stages that `dvc repro` goes through, in its order."""
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    graph = get_active_graph(repository.index.graph)
    return list(plan_repro(graph, collect_stages(repository, ["dvc.yaml"])))


def _needs(repository: Any, stages: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    from dvc.repo.reproduce import get_active_graph

    graph = get_active_graph(repository.index.graph)
    return {
        stage.addressing: tuple(sorted(needed.addressing for needed in graph.successors(stage)))
        for stage in stages
    }
