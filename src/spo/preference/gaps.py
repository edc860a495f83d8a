"""The gap of a pair: the score of its first image less that of its second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from spo.types import PreferencePair, Scorer


def score_gaps(scorer: Scorer, pairs: Sequence[PreferencePair]) -> list[float]:
    """The gaps of pairs, whose images are all in memory at once.

    Raises:
        ValueError: a score that is not finite.
    """
    from spo.data.decoding import open_image

    captions = [pair.caption for pair in pairs]
    first, second = (
        scorer.score([open_image(image) for image in images], captions)
        for images in ([p.image_0 for p in pairs], [p.image_1 for p in pairs])
    )
    return [a - b for a, b in zip(first, second, strict=True)]


def chunks(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    """Lists of `size` pairs in order; the last may be shorter."""
    rest = iter(pairs)
    while chunk := list(islice(rest, size)):
        yield chunk
