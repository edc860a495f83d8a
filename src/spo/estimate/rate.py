"""Measure how fast a device computes."""

import time

import torch

from spo import config
from spo.backbones.loading import DTYPES

SIZES = {"cpu": 2048, "cuda": 8192}
# the fraction of that rate that UNet, VAE and CLIP reach: .5 to .7 measured on a CPU, nothing on a GPU
USED = {"cpu": 0.6, "cuda": 0.4}


def rate(settings: config.Backbone, device: str) -> float:
    """FLOP/s of a stage, as a fraction of those of a large matrix product, the fastest of five.

    On a CPU in fp32: in half precision one product may take minutes there. In one thread it is CPU time, in
    which other work on the machine does not count.
    """
    kind = torch.device(device).type
    size = SIZES.get(kind, SIZES["cuda"])
    dtype = torch.float32 if kind == "cpu" else DTYPES[settings.dtype]
    a = torch.ones(size, size, device=device, dtype=dtype)
    alone = kind == "cpu" and torch.get_num_threads() == 1
    clock, seconds = time.process_time if alone else time.perf_counter, []
    for _ in range(5):
        started = clock()
        a @ a
        if kind != "cpu":
            torch.accelerator.synchronize()
        seconds.append(clock() - started)
    return USED.get(kind, USED["cuda"]) * 2 * size**3 / min(seconds)
