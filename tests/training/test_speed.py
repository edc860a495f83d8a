"""Speed switches of CUDA, which are settings that can be read without a GPU."""

import torch
from two_numbers import Numbers, Squares, run

from spo.training import loop, speed


def switches() -> list[bool]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark]


def test_tf32_is_on_within_and_as_before_after_it() -> None:
    before = switches()
    assert before == [False, True, False]  # torch's own
    try:
        with speed.fast(torch.device("cuda")):
            assert switches() == [True, True, True]
            raise RuntimeError
    except RuntimeError:
        assert switches() == before


def test_it_is_on_while_a_gpu_trains_and_off_while_it_validates(monkeypatch) -> None:
    seen: list[tuple[str, bool]] = []

    class Watched(Squares):
        def collect(self, backbone, iteration):
            seen.append(("collect", all(switches())))
            return super().collect(backbone, iteration)

        def loss(self, policy, reference, batch):
            seen.append(("loss", all(switches())))
            return super().loss(policy, reference, batch)

    def note(metrics, iteration) -> None:
        seen.append(("metrics", all(switches())))

    run(Numbers(), Watched(1), on_metrics=note)
    assert seen == [("collect", False), ("loss", False), ("metrics", False)]
    seen.clear()
    original = speed.fast
    monkeypatch.setattr(loop, "fast", lambda device: original(torch.device("cuda")))  # as for its weights
    run(Numbers(), Watched(1), on_metrics=note)
    assert seen == [("collect", True), ("loss", True), ("metrics", False)]
