"""Use of the machine by a stage, under MLflow's names of system metrics."""

from __future__ import annotations

import sys
from typing import Any


def sample() -> dict[str, float]:
    """Measure processor (percent since the last call), memory, free disk (MB) and GPUs."""
    import psutil

    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
        "system/disk_available_megabytes": psutil.disk_usage(".").free / 1e6,
    }
    return metrics | _gpus()


def _gpus() -> dict[str, float]:
    """Measure memory in use by the driver, if torch was loaded and started CUDA: never the first to do so."""
    cuda: Any = sys.modules.get("torch.cuda")
    if not hasattr(cuda, "mem_get_info") or not cuda.is_initialized():  # the stage may be importing torch now
        return {}
    metrics = {}
    for i in range(cuda.device_count()):
        free, total = cuda.mem_get_info(i)
        metrics[f"system/gpu_{i}_memory_usage_megabytes"] = (total - free) / 1e6
        metrics[f"system/gpu_{i}_memory_usage_percentage"] = 100 * (1 - free / total)
    return metrics
