"""Tests that share one Ray, one database server or what takes long to make run one after the other."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("alone")
def test_groups_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("takes the workers of `make test`: pytest -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@alone")
