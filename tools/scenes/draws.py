"""Random scenes."""

import torch
from torch import Tensor

from spo.scenes.world import ABSENT, CHOICES, LAYOUTS, PLACES, QUALITY


def random_attributes(n: int, generator: torch.Generator, pair_fraction: float = 0.6) -> Tensor:
    """Draw attributes int64 [n,8]; `pair_fraction` of the scenes have two shapes."""
    columns = [torch.randint(len(c), (n,), generator=generator) for c in CHOICES]
    single = torch.rand(n, generator=generator) >= pair_fraction
    place = torch.randint(len(PLACES), (n,), generator=generator)
    relation = torch.randint(len(PLACES), len(LAYOUTS), (n,), generator=generator)
    columns[0] = torch.where(single, place, relation)
    attributes = torch.stack(columns, dim=1)
    attributes[single, 5:] = ABSENT
    return attributes


def random_quality(n: int, generator: torch.Generator) -> Tensor:
    """Draw quality [n,4], uniform and independent."""
    return torch.rand(n, len(QUALITY), generator=generator)
