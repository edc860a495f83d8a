"""`spo sample` checks where it is to write before it draws anything."""

from pathlib import Path

import pytest
import yaml

from spo import config
from spo.commands import sample


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.psd"])  # Pillow reads psd, and does not write it
def test_a_file_without_the_ending_of_a_format_is_refused(name: str, tmp_path: Path) -> None:
    params = config.validate(yaml.safe_load(config.preset("smoke")))
    with pytest.raises(ValueError, match=rf"--output .*{name}: .* is no image format"):
        sample.run(params, "a star", "base", output=tmp_path / name)
