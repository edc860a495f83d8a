import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from group import run_in

from spo.data import latents
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
    assert pairs.label_0.tolist() == [1.0] * 40 and pairs.weight.tolist() == [0.5] * 40


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


class Posterior(Half):
    """A VAE whose latents are the noise that it is given."""

    latent_shape = (1, 2, 2)

    def encode(self, images, noise=None):
        return torch.zeros(len(images), *self.latent_shape) if noise is None else noise


def test_samples_of_the_posterior_belong_to_seed_and_image(tmp_path) -> None:
    """Not to where a pair is; without a seed there is no noise."""
    pairs = [PreferencePair("c", b"one", b"two", 1.0, 0.0), PreferencePair("d", b"three", b"one", 1.0, 0.0)]
    both = torch.arange(2)

    def sides(name: str, pairs: list[PreferencePair], seed: int | None) -> torch.Tensor:
        encoded = encode([pairs], 2, Posterior(), decode, tmp_path / name, seed)
        return torch.stack(encoded.read(both), 1)

    first = sides("first", pairs, 0)
    assert torch.equal(first[0, 0], first[1, 1])  # the same image
    assert len({float(x) for x in first[:, :, 0, 0, 0].flatten()}) == 3
    assert torch.equal(sides("turned", pairs[::-1], 0), first.flip(0))
    assert not torch.equal(sides("other", pairs, 1), first)
    assert not sides("mean", pairs, None).any()


def test_another_count_than_the_summary_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="summary says 6"):
        encode([labelled(5)], 6, Half(), decode, tmp_path / "l")


def sharded(n: int = 40, size: int = 7) -> list[list[PreferencePair]]:
    return [labelled(n)[start : start + size] for start in range(0, n, size)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_processes_that_share_the_shards_write_what_one_writes(tmp_path: Path, n: int) -> None:
    """Six shards of 7, 7, 7, 7, 7 and 5 pairs, of which each process encodes every n-th."""

    def body() -> dict:
        vae = Half()
        pairs = encode(sharded(), 40, vae, decode, tmp_path / "several")
        return {"batches": vae.batches, "latents": pairs.latents.copy(), "captions": pairs.captions}

    one = encode(sharded(), 40, Half(), decode, tmp_path / "one")
    results = run_in(n, body)
    images = [14, 14, 14, 14, 14, 10]
    assert [r["batches"] for r in results] == [images[rank::n] for rank in range(n)]
    for result in results:
        assert (result["latents"] == one.latents).all() and result["captions"] == one.captions
    assert files(tmp_path / "several") == files(tmp_path / "one")
    assert files(tmp_path / "one").keys() == {"latents.f16", "pairs.json"}


def test_processes_without_a_shard_wait_for_the_others(tmp_path: Path) -> None:
    def body() -> list[int]:
        vae = Half()
        assert len(encode([labelled(3)], 3, vae, decode, tmp_path / "l")) == 3
        return vae.batches

    assert run_in(2, body) == [[6], []]


def test_an_interrupted_encoding_resumes_after_the_complete_shards(tmp_path: Path) -> None:
    def interrupted():
        yield labelled(40)[14]
        raise KeyboardInterrupt

    first, second = Half(), Half()
    with pytest.raises(KeyboardInterrupt):
        encode([*sharded()[:2], interrupted(), *sharded()[3:]], 40, first, decode, tmp_path / "l")
    pairs = encode([(), (), *sharded()[2:]], 40, second, decode, tmp_path / "l")
    assert first.batches == [14, 14] and second.batches == [14, 14, 14, 10]
    assert (pairs.latents == encode(sharded(), 40, Half(), decode, tmp_path / "whole").latents).all()
    assert files(tmp_path / "l") == files(tmp_path / "whole")


@pytest.mark.parametrize("appended", [0, 1, 3])
def test_latents_that_were_put_together_in_part_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appended: int
) -> None:
    """A kill at the next shard's first bytes: those before are in the file, and no longer beside it."""
    copy, copied = shutil.copyfileobj, []

    def killed(source, target) -> None:
        if len(copied) == appended:
            target.write(source.read(5))
            target.flush()
            raise KeyboardInterrupt
        copied.append(1)
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(sharded(), 40, Half(), decode, tmp_path / "l")
    again = Half()
    encode([()] * 6, 40, again, decode, tmp_path / "l")
    encode(sharded(), 40, Half(), decode, tmp_path / "whole")
    assert again.batches == [] and files(tmp_path / "l") == files(tmp_path / "whole")


def test_a_process_that_comes_when_all_is_complete_encodes_nothing(tmp_path: Path) -> None:
    """The shards' files are gone by then."""
    encode(sharded(), 40, Half(), decode, tmp_path / "l")
    late = Half()
    one = partial(latents._encoded, backbone=late, decode_image=decode, seed=None)
    latents._encode_share(sharded(), 40, one, tmp_path / "l")
    assert late.batches == [] and files(tmp_path / "l").keys() == {"latents.f16", "pairs.json"}
