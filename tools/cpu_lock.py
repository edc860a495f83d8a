"""requirements.lock without torch and the CUDA packages that its wheel needs, for an image without a GPU.

python tools/cpu_lock.py requirements.lock > cpu.lock; then torch and torchvision of the same versions by
`uv pip install --torch-backend cpu`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

GPU = re.compile(r"(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def without_gpu(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a lock, without the entries of GPU packages and their hashes."""
    keep = True
    for line in lines:
        if line[:1].isalnum():
            keep = not GPU.match(line)
        if keep:
            yield line


if __name__ == "__main__":
    sys.stdout.writelines(
        without_gpu(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(keepends=True))
    )
