import pytest
import torch

from tools.scenes import clips, probes


def test_a_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2000, 16, generator=generator), dim=1)
    truth = torch.rand(2000, 4, generator=generator)
    truth[:, 1] = 3 * features[:, 2] - features[:, 5] + 0.5
    found = probes.linear_probe(features, truth)
    assert found["clean"] > 0.99
    assert all(abs(found[name]) < 0.1 for name in ("sharp", "saturated", "lit"))


def test_agreement_counts_clear_labels_alone() -> None:
    """A model whose score is the first pixel's red."""

    def features(images, ids):
        red = images[:, 0, 0, 0]
        one = torch.ones(len(images))
        return torch.stack([red, one], 1), torch.stack([one, 0 * one], 1), torch.tensor(1.0)

    class Words:
        def __call__(self, texts, **_):
            return type("Encoded", (), {"input_ids": torch.zeros(len(texts), 3).long()})

    bright, dark = torch.full((4, 3, 48, 48), 200, dtype=torch.uint8), torch.zeros(4, 3, 48, 48).byte()
    labelled = clips.LabelledPairs(bright, dark, ["a"] * 4, torch.tensor([1.0, 1.0, 0.0, 0.5]))
    result = probes.agreement(features, labelled, Words())
    assert result["clear_labels"] == 3 and result["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["standard_error"] == pytest.approx((2 / 9 / 3) ** 0.5, abs=1e-4)
