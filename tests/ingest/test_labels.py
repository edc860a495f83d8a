"""Filter and labels of training pairs: rules by hand, and what is written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from spo import config
from spo.data.pairs import ShardWriter, read_pairs
from spo.ingest import labels
from spo.ingest.gaps import CachedGaps
from spo.ingest.labels import ScoredWriter, failed_rules
from spo.types import PreferencePair

SCORER = {"clip": "c", "head": "h"}
RULES = config.PairFilter(
    aesthetic=SCORER,
    clipscore={"model": "m"},
    win_lose_above={"aesthetic": -0.5, "clipscore": 0.0},
    tie_below={"aesthetic": 0.2, "clipscore": 0.03},
)


class Channel:
    """Scores an image by the mean of one of its channels, and counts the images."""

    def __init__(self, name: str, channel: int) -> None:
        self.name, self.channel, self.scored = name, channel, 0

    def score(self, images, prompts) -> list[float]:
        assert len(images) == len(prompts)
        self.scored += len(images)
        return [image.getpixel((0, 0))[self.channel] / 100 for image in images]


def pair(label_0: float, first: tuple[int, int], second: tuple[int, int], caption="a") -> PreferencePair:
    """A pair of images whose aesthetic score and CLIPScore are hundredths of the numbers."""
    encoded = []
    for colour in (first, second):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (*colour, 0)).save(file, "PNG")
        encoded.append(file.getvalue())
    return PreferencePair(caption, *encoded, label_0, 1 - label_0)


@pytest.mark.parametrize(
    ("label_0", "aesthetic", "clipscore", "failed"),
    [
        (1.0, -0.49, 0.01, []),  # strategy 2 of LPO: a winner may be a little less aesthetic
        (1.0, -0.5, 0.01, ["aesthetic"]),  # strict: a gap at the bound fails
        (1.0, 0.3, 0.0, ["clipscore"]),
        (0.0, 0.49, -0.01, []),  # the second image won: its gap is the other way round
        (0.0, 0.6, 0.1, ["aesthetic", "clipscore"]),
        (0.5, 0.19, -0.029, []),  # ties by gaps without their sign
        (0.5, -0.19, 0.029, []),
        (0.5, -0.3, 0.0, ["aesthetic"]),
        (0.5, 0.2, 0.03, ["aesthetic", "clipscore"]),
    ],
)
def test_rules_by_hand(label_0: float, aesthetic: float, clipscore: float, failed: list[str]) -> None:
    assert failed_rules(label_0, {"aesthetic": aesthetic, "clipscore": clipscore}, RULES) == failed


def test_pairs_without_a_rule_for_their_kind_pass() -> None:
    rules = config.PairFilter(aesthetic=SCORER, win_lose_above={"aesthetic": 0.0})
    assert failed_rules(0.5, {"aesthetic": 9.0}, rules) == []
    assert failed_rules(1.0, {"aesthetic": -9.0}, rules) == ["aesthetic"]


PAIRS = [
    pair(1.0, (100, 60), (140, 50), "kept: less aesthetic by .4, closer to the prompt"),
    pair(1.0, (100, 60), (160, 50), "fails aesthetic"),
    pair(0.0, (100, 60), (140, 50), "fails clipscore"),
    pair(0.5, (100, 50), (110, 52), "kept tie"),
    pair(0.5, (100, 50), (190, 90), "a tie that fails both"),
] * 3


def unfinished(folder: Path, scorers, pairs=PAIRS, rules=RULES) -> tuple[ScoredWriter, list[list]]:
    rows: list[list] = []
    gaps = CachedGaps(scorers, rules.batch_size, folder / "cache")
    writer = ScoredWriter(ShardWriter(folder / "train", 4), gaps, rules, None, lambda *_: rows.append)
    for each in pairs:
        writer.add(each)
        assert len(writer._buffer) < labels.BUFFER
    return writer, rows


def filtered(folder: Path, scorers, pairs=PAIRS, rules=RULES) -> tuple[ScoredWriter, list[list]]:
    writer, rows = unfinished(folder, scorers, pairs, rules)
    writer.close()
    return writer, rows


def scorers() -> dict[str, Channel]:
    return {"aesthetic": Channel("aesthetic", 0), "clipscore": Channel("clipscore", 1)}


def test_passing_pairs_are_written_in_order_and_the_others_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(labels, "BUFFER", 4)  # the last one is not full
    writer, rows = filtered(tmp_path, scorers())
    assert list(read_pairs(tmp_path / "train")) == [p for p in PAIRS if p.caption.startswith("kept")]
    assert (writer.read, writer.writer.count) == (15, 6)
    assert writer.failed == {
        "aesthetic": {"win_lose": 3, "ties": 3},
        "clipscore": {"win_lose": 3, "ties": 3},
    }
    assert rows[:5] == [
        [0, "win_lose", "-0.400000", "0.100000", ""],
        [1, "win_lose", "-0.600000", "0.100000", "aesthetic"],
        [2, "win_lose", "0.400000", "-0.100000", "clipscore"],
        [3, "ties", "0.100000", "0.020000", ""],
        [4, "ties", "0.900000", "0.400000", "aesthetic clipscore"],
    ]


def test_an_interrupted_filter_resumes_after_the_cached_gaps(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(labels, "BUFFER", 4)
    whole, rows = filtered(tmp_path / "whole", scorers())
    unfinished(tmp_path / "again", scorers(), PAIRS[:10])  # two of four buffers, and no close
    again = scorers()
    resumed, resumed_rows = filtered(tmp_path / "again", again)
    assert again["aesthetic"].scored == again["clipscore"].scored == 2 * (15 - 8)
    assert resumed_rows == rows and resumed.failed == whole.failed
    assert list(read_pairs(tmp_path / "again/train")) == list(read_pairs(tmp_path / "whole/train"))


def test_gaps_of_other_pairs_are_not_taken_from_an_interrupted_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(labels, "BUFFER", 4)
    unfinished(tmp_path, scorers(), PAIRS[:8])
    changed = [PAIRS[4], *PAIRS[1:]]  # one pair of the first buffer
    again = scorers()
    _, rows = filtered(tmp_path, again, changed)
    assert again["aesthetic"].scored == 2 * (15 - 4), "the second buffer is as it was"
    assert rows == filtered(tmp_path / "fresh", scorers(), changed)[1]


def test_batch_size_changes_nothing_but_the_calls(tmp_path) -> None:
    one, two = (
        filtered(tmp_path / str(n), scorers(), rules=RULES.model_copy(update={"batch_size": n}))[1]
        for n in (1, 7)
    )
    assert one == two


def test_a_filter_that_keeps_nothing_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="^pairs.filter: keeps none of 2 training pairs") as error:
        filtered(tmp_path, scorers(), [PAIRS[1], PAIRS[4]])
    assert "aesthetic 2, clipscore 1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"win_lose_above": {"hps": 0.0}}, "has a rule for hps, but no section hps; add it"),
        ({"tie_below": {"aesthetic": -0.1}}, "greater than 0"),
        ({"win_lose_above": {"aesthetic": True}}, "should be a valid number"),
        ({"hps": {"architecture": "a", "checkpoint": "c"}}, "has a section hps, but no rule for it"),
    ],
)
def test_rules_and_scorers_must_agree(change, message: str) -> None:
    raw = {"aesthetic": SCORER, "win_lose_above": {"aesthetic": 0.0}, **change}
    with pytest.raises(ValueError, match=message):
        config.PairFilter(**raw)


def test_a_filter_needs_a_rule() -> None:
    with pytest.raises(ValueError, match="has no rule .* set filter to null"):
        config.PairFilter()


def test_no_more_pairs_are_in_memory_than_the_buffer_takes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(labels, "BUFFER", 4)
    unfinished(tmp_path, scorers())
