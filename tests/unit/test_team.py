"""A batch among the processes of a team: nothing is left out, nothing is seen twice, and alone all is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ranksearch.data import augmented
from ranksearch.space import AugmentSpec
from ranksearch.team import ALONE, Team


@pytest.mark.parametrize(("count", "size"), [(32, 4), (31, 2), (7, 7), (10, 3), (5, 1)])
def test_shares_are_the_batch_in_its_order(count: int, size: int) -> None:
    images = list(range(count))
    shares = [images[Team(place=place, size=size).share(count)] for place in range(size)]
    assert [image for share in shares for image in share] == images
    assert {len(share) for share in shares} <= {count // size, -(-count // size)}


@pytest.mark.parametrize("size", [2, 3])
def test_the_changes_of_shares_are_those_of_the_batch(size: int) -> None:
    images, spec = (
        torch.rand(11, 2, 6, 5, generator=torch.Generator().manual_seed(0)),
        AugmentSpec(flip=True, crop_px=2),
    )
    whole = augmented(images, spec, torch.Generator().manual_seed(1))
    found = []
    for place in range(size):
        part, generator = Team(place=place, size=size).share(11), torch.Generator().manual_seed(1)
        found.append(augmented(images[part], spec, generator, batch=11, part=part))
    assert torch.equal(torch.cat(found), whole)


def test_alone_nothing_is_exchanged() -> None:
    model = nn.Linear(2, 2)
    assert ALONE.leads
    assert ALONE.joined(model) is model
    assert ALONE.total(torch.tensor(2.5)) == 2.5
    ALONE.as_leader(model.parameters())
