"""Settings of SPO for tests on the tiny backbone: five prompts, five steps, every pair kept."""

from spo.config import Spo

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def settings(**changes) -> Spo:
    fields = {
        "lora": {"rank": 1, "alpha": 1},
        "optimizer": {"learning_rate": 1e-3},
        "iterations": 4,
        "prompts_per_iteration": 3,
        "batch_size": 4,
        "candidates": 4,
        "num_inference_steps": 5,
        "guidance": 2.0,
        "divert_start_step": 2,
        "threshold": 0.0,
    }
    return Spo(**{**fields, **changes})
