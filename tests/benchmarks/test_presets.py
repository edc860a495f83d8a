"""What the presets download and how long they take: the counts in files and pages are those of the script."""

import pytest

from benchmarks import presets
from spo import config


@pytest.fixture(scope="module")
def counted() -> dict[str, presets.Counted]:
    return presets.everything()


def test_heads_and_pages_have_the_counts(counted) -> None:
    for path, text in presets.texts(counted).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `python -m benchmarks.presets`"
    heads = [config.counted(config.preset(name)) for name in presets.NAMES]
    heads += [config.counted(config.preset(name, quick=True)) for name in config.QUICK]
    assert heads == [own.line for own in counted.values()]


def test_a_night_is_ten_hours_and_a_first_try_half_an_hour_on_a_small_card(counted) -> None:
    for name, own in counted.items():
        limit = 10 if "overnight" in name else 0.5 if "quick" in name else float("inf")
        assert own.hours[24] <= limit, name


def test_judging_sd15_by_hand(counted) -> None:
    """GB: base 4.26, two UNets of 3.44, PickScore 3.94, HPS 1.97, two CLIPs 2.32, ImageReward 1.79.

    Written are two pipelines in half precision. Six variants of 500 images: 17.2 PFLOP each at 66 TFLOP/s.
    """
    own = counted["sd15-eval"]
    assert own.downloads == pytest.approx(4.26 + 2 * 3.44 + 3.94 + 1.97 + 1.71 + 0.61 + 1.79, abs=0.1)
    assert own.disk - own.downloads == pytest.approx(4.26 + 6 * 500 * 0.45e-3, abs=0.01)
    assert own.hours[24] == pytest.approx(6 * 17.2e15 / 66e12 / 3600)


def test_a_night_by_hand(counted) -> None:
    """150 of 1000 iterations of 13930 PFLOP; 11 validations of 48 images, three variants of 500."""
    images = 11 * 48 + 3 * 500
    assert counted["sd15-overnight"].hours[24] == pytest.approx(
        (0.15 * 13930 + images / 500 * 17.2) * 1e15 / 66e12 / 3600
    )
