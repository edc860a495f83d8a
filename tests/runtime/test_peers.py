"""Signs of life between processes on several machines, by threads with torch's own store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch

from spo.runtime import peers
from spo.runtime.exit_codes import TRANSIENT, TransientError

BROKEN = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


class Machine:
    """A process of two, whose end is noted and does not happen."""

    def __init__(self, store, rank: int, monkeypatch: pytest.MonkeyPatch, lost: float = 5.0) -> None:
        self.peers = peers.Peers(store, rank, 2, beat=0.02, lost=lost, kill=0.05, hold=10)
        self.ended = threading.Event()
        monkeypatch.setattr(self.peers, "_end", self._end)
        self.said = ("", 0)

    def _end(self, message: str, code: int) -> None:
        self.said = message, code
        self.ended.set()


@pytest.fixture
def store():
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=300))
    return store


@pytest.fixture
def both(store, monkeypatch):
    machines = [Machine(store, rank, monkeypatch) for rank in (0, 1)]
    start(machines)
    yield machines
    for machine in machines:
        machine.peers.leave()


def start(machines) -> None:
    threads = [threading.Thread(target=machine.peers.start) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nobody_ends_while_all_give_signs_of_life(both) -> None:
    assert not any(machine.ended.wait(0.5) for machine in both)


@pytest.mark.smoke
@pytest.mark.parametrize(("lost", "name"), [(0, "process 0 of 2"), (1, "process 1 on ")])
def test_a_silent_process_is_named(lost, name, both) -> None:
    both[lost].peers._ended.set()  # as by a cut cable: nothing more is sent, nothing is said
    other = both[1 - lost]
    assert other.ended.wait(300)
    assert other.said[0].startswith(f"no sign of life from {name}") and other.said[1] == TRANSIENT


@pytest.mark.smoke
def test_who_has_done_its_part_is_not_waited_for(both) -> None:
    both[1].peers.leave()
    both[0].peers._lost = 3
    assert not both[0].ended.wait(4)


def test_all_end_for_the_first_reason(both, monkeypatch) -> None:
    assert both[1].peers.tell("data/x.parquet: truncated", 2)
    assert not both[0].peers.tell("the connection broke", TRANSIENT), "a reason is there already"
    monkeypatch.setattr(peers, "_joined", both[0].peers)
    error = peers.lost(BROKEN)
    assert type(error) is ValueError and str(error).startswith("data/x.parquet: truncated (process 1 on ")


def test_process_0_keeps_the_store_until_the_others_have_its_reason(both, monkeypatch) -> None:
    """Without a launcher the store ends with process 0."""
    both[0].peers.tell("outputs/x: disk full", 2)

    def gone(*arguments) -> None:
        raise BROKEN

    monkeypatch.setattr(both[1].peers, "_store", type("Away", (), {"set": gone, "check": gone}))
    assert both[1].peers.reason() == ("outputs/x: disk full", 2)


def test_a_reason_reaches_a_process_that_waits(both) -> None:
    both[1].peers.tell("data/x.parquet: truncated", 2)
    assert both[0].ended.wait(300) and both[0].said[1] == 2 and "truncated" in both[0].said[0]


def test_without_a_reason_a_process_is_lost(both, monkeypatch) -> None:
    monkeypatch.setattr(peers, "_joined", both[0].peers)
    error = peers.lost(BROKEN)
    assert isinstance(error, TransientError) and "another of the 2 processes broke" in str(error)
    assert peers.lost(RuntimeError("shape mismatch")) is None, "not of a connection"


def test_under_our_own_launcher_errors_are_as_they_were() -> None:
    assert peers.lost(BROKEN) is None


def test_a_store_that_is_gone_ends_all(both, monkeypatch) -> None:
    def away(*arguments) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(both[1].peers, "_store", type("Away", (), {"set": away, "check": away}))
    assert both[1].ended.wait(300) and both[1].said[1] == TRANSIENT
    assert "connection to process 0 of 2 broke" in both[1].said[0]


def test_a_store_that_never_answers_holds_nobody_up(both, monkeypatch) -> None:
    """Its machine has no power: no error, no answer."""
    both[1].peers._ended.set()

    def silent(*arguments) -> None:
        threading.Event().wait()

    store = type("Silent", (), {"set": silent, "check": silent, "compare_set": silent})
    monkeypatch.setattr(both[1].peers, "_store", store)
    both[1].peers._hold_for = 0.1
    assert both[1].peers.reason() is None
    assert both[1].peers.tell("no sign of life", TRANSIENT) is None, "nobody knows who was first"


def test_the_main_thread_ends_the_process_if_it_can(store, monkeypatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(peers.os, "_exit", ends.append)
    monkeypatch.setattr(peers, "fail", lambda message, code: None)
    quick, blocked = (peers.Peers(store, 1, 2, kill=0.05) for _ in range(2))
    quick._ended.set()
    quick._end("lost", TRANSIENT)
    assert ends == []
    blocked._end("lost", TRANSIENT)
    assert ends == [TRANSIENT]


def test_who_does_not_join_is_not_waited_for_for_ever(store) -> None:
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(RuntimeError):
        peers.Peers(store, 0, 2).start()
