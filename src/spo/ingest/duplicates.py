"""Which pairs occur more than once in preference data, and which of these contradict each other."""

import hashlib

from spo.data.prompts import key
from spo.ingest.sources import decoded
from spo.types import PreferencePair

SAME_IMAGE = "both images are the same"  # by their pixels
CONTRADICTED = "another row prefers the other image of this pair"


class Duplicates:
    """Stores the preference of each added pair, in a hash of 16 bytes a pair.

    A pair is a prompt (by its key) and two image files, in either order. Where rows prefer different images,
    all of them are contradicted: neither annotator is known to be right. A tie contradicts nothing.
    """

    def __init__(self) -> None:
        self.repeated = 0  # pairs that had been added before
        self._labels: dict[bytes, float] = {}
        self._contradicted: set[bytes] = set()

    def add(self, pair: PreferencePair) -> None:
        digest, label = _preference(pair)
        earlier = self._labels.get(digest)
        self.repeated += earlier is not None
        if earlier is None or earlier == 0.5:
            self._labels[digest] = label
        elif label not in (0.5, earlier):
            self._contradicted.add(digest)

    def check(self, pair: PreferencePair) -> None:
        """Refuse a contradicted pair, one of an image with itself, and an image that is not readable."""
        if self._contradicted and _preference(pair)[0] in self._contradicted:
            raise ValueError(CONTRADICTED)
        left, right = decoded(pair)
        if left.size == right.size and left.tobytes() == right.tobytes():
            raise ValueError(SAME_IMAGE)


def _preference(pair: PreferencePair) -> tuple[bytes, float]:
    """A hash of prompt and images, and the label of the image that is first in its order."""
    sides = sorted(((pair.image_0, pair.label_0), (pair.image_1, pair.label_1)))
    digest = hashlib.blake2b(digest_size=16)
    for part in (key(pair.caption).encode(), sides[0][0], sides[1][0]):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest(), sides[0][1]
