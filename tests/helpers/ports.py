"""Ports for servers that bind them some time after they were chosen."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, SIZE, BLOCKS = 10_000, 500, 40  # below 32768: Linux takes those above for outgoing connections
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw-1").removeprefix("gw")) + 1
_start = FIRST + SIZE * (_worker % BLOCKS)
_numbers = itertools.count(os.getpid())  # another run of the tests begins elsewhere in the block


def free_port() -> int:
    """A port that nobody uses, from a block of this process of tests; each call gives another one."""
    for number in itertools.islice(_numbers, SIZE):
        port = _start + number % SIZE
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {_start} to {_start + SIZE - 1} is free")
