"""The tiny checkpoints of tests/backbones."""

from tests.backbones.conftest import checkpoints, load, loaded, words  # noqa: F401
