import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spo.data.latents import encode
from spo.types import PreferencePair


class Half:
    """A VAE that halves the image's values and keeps one pixel in four."""

    latent_shape = (3, 2, 2)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches = []

    def encode(self, images):
        self.batches.append(len(images))
        return images[:, :, ::2, ::2] / 2

    def inference(self):
        return torch.no_grad()


def decode(data: bytes) -> torch.Tensor:
    return torch.full((3, 4, 4), data[0] / 255)


def labelled(n: int):
    return [PreferencePair(f"c{i}", bytes([i]), bytes([i + 100]), 1.0, 0.0, 0.5) for i in range(n)]


def test_both_sides_come_back_in_any_order(tmp_path) -> None:
    pairs = encode([labelled(40)], 40, Half(), decode, tmp_path / "l")
    left, right = pairs.read(torch.tensor([39, 2]))
    torch.testing.assert_close(left[:, 0, 0, 0], torch.tensor([39.0, 2.0]) / 510, atol=1e-4, rtol=0)
    torch.testing.assert_close(right[:, 0, 0, 0], torch.tensor([139.0, 102.0]) / 510, atol=3e-4, rtol=0)
    assert pairs.captions[39] == "c39" and len(pairs) == 40
    assert pairs.label_1.tolist() == [0.0] * 40 and pairs.weight.tolist() == [0.5] * 40


def test_a_complete_cache_is_not_encoded_again(tmp_path) -> None:
    encode([labelled(5)], 5, Half(), decode, tmp_path / "l")
    second = Half()
    encode([], 5, second, decode, tmp_path / "l")
    assert second.batches == []


def test_stages_at_the_same_time_encode_once(tmp_path, capsys) -> None:
    first, second = Half(), Half()
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(300)
        yield from labelled(40)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(encode, [slow()], 40, first, decode, tmp_path / "l")
        assert begun.wait(300)
        other = pool.submit(encode, [labelled(40)], 40, second, decode, tmp_path / "l")
        while not other.done() and "waits" not in capsys.readouterr().err:
            time.sleep(0.01)
        go_on.set()
        both = one.result(), other.result()
    assert first.batches == [64, 16] and second.batches == []
    for pairs in both:
        assert (pairs.latents == encode([], 40, Half(), decode, tmp_path / "l").latents).all()
        assert (pairs.latents[1:] != 0).all()


def test_an_interrupted_encoding_is_done_again(tmp_path) -> None:
    def interrupted():
        yield from labelled(40)[:33]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode([interrupted()], 40, Half(), decode, tmp_path / "l")
    assert len(encode([labelled(40)], 40, Half(), decode, tmp_path / "l")) == 40


def test_another_count_than_the_summary_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="summary says 6"):
        encode([labelled(5)], 6, Half(), decode, tmp_path / "l")
