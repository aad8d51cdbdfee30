"""Choosing a trial by a rule, and files of compressed weights that carry their rank map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ranksearch.errors import BudgetError, RankMapError
from ranksearch.export import choose, load_compressed, rank_map_of, read_compressed, save_compressed
from ranksearch.rankmap import RankMap
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.surgery import apply_rank_map, find_layers
from ranksearch.trial import Failure, Outcome, Proposal
from tests.networks import small_net
from tests.studies import TABLE, setting_of, space_of

INPUT_SHAPE = (3, 12, 12)
ACCURACIES = {0.9: 0.92, 0.6: 0.90, 0.5: 0.85, 0.3: 0.84, 0.2: 0.40}
"""Share of the MACs to search accuracy: the corner, from which accuracy collapses, is at 0.3."""


@pytest.fixture
def study(storage: Path) -> Study:
    """A finished search with one trial for each of ``ACCURACIES``, a dominated one, and a failed one."""
    made = Store().create("study", setting_of(space_of()))
    points = [*ACCURACIES.items(), (0.95, 0.50)]
    for index, (ratio, accuracy) in enumerate(points):
        proposal = Proposal(choices=tuple(index for _ in TABLE.layers), origin="test")
        outcome = Outcome(
            accuracy_search=accuracy,
            accuracy=1.0 - accuracy,  # what the report images say must choose nothing
            report_images=100,
            loss=1.0,
            macs=int(ratio * TABLE.dense_macs),
            params=1,
            seconds=0.0,
        )
        made.finish(made.begin(proposal, index=index), outcome)
    failed = made.begin(Proposal(choices=TABLE.dense, origin="test"), index=len(points))
    made.finish(failed, Failure(reason="out of memory"))
    return made


@pytest.mark.parametrize(
    ("rule", "trial"),
    [
        ({"max_macs_ratio": 0.5}, 2),
        ({"max_macs_ratio": 0.59}, 2),
        ({"max_macs_ratio": 1.0}, 0),
        ({"max_gmacs": 0.31 * TABLE.dense_macs / 1e9}, 3),
        ({"max_drop": 2.0}, 1),
        ({"max_drop": 8.0}, 3),
        ({"knee_point": True}, 3),
        ({"trial": 5}, 5),
    ],
)
def test_rules_choose_by_the_search_images(study: Study, rule: dict[str, Any], trial: int) -> None:
    assert choose(study, **rule).number == trial


@pytest.mark.parametrize(
    ("rule", "nearest"),
    [
        ({"max_macs_ratio": 0.1}, "0.200"),
        ({"max_gmacs": 1e-9}, "0.200"),
        ({"max_drop": -1.0}, "0.00"),
        ({"trial": 6}, "out of memory"),
        ({"trial": 77}, "there is none"),
    ],
)
def test_what_fits_nothing_names_the_nearest(study: Study, rule: dict[str, Any], nearest: str) -> None:
    with pytest.raises(BudgetError, match=nearest):
        choose(study, **rule)


@pytest.mark.parametrize(
    ("rule", "ratio"),
    [({"max_macs_ratio": 0.55}, 0.5), ({"max_gmacs": 1e9}, 0.9), ({"max_drop": 5.0}, 0.6), ({"knee": True}, 0.3),
     ({"trial": 5}, 0.95)],
)  # fmt: skip
def test_a_study_gives_the_rank_map_that_a_rule_picks(
    study: Study, rule: dict[str, Any], ratio: float, tmp_path: Path
) -> None:
    found = study.rank_map(**rule)
    number = next(t.number for t in study.trials() if t.outcome and t.outcome.macs == int(ratio * TABLE.dense_macs))
    assert (found.provenance["study"], found.provenance["trial"]) == ("study", number)
    assert found.macs == TABLE.macs(study.trials()[number].proposal.choices)
    assert RankMap.load(found.save(tmp_path / "map.json")) == found


@pytest.mark.parametrize("rule", [{}, {"knee": False}, {"knee": True, "trial": 0}, {"max_gmacs": 1.0, "max_drop": 1.0}])
def test_a_study_wants_exactly_one_rule(study: Study, rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one rule"):
        study.rank_map(**rule)


def test_an_empty_front_has_nothing_to_choose(storage: Path) -> None:
    empty = Store().create("empty", setting_of(space_of()))
    with pytest.raises(BudgetError, match="no point yet"):
        choose(empty, knee_point=True)


def test_a_rank_map_adds_up(study: Study) -> None:
    trial = study.trials()[2]
    found = rank_map_of(study, trial)
    assert found.macs == TABLE.other_macs + sum(
        found.layers[layer.name].macs if layer.name in found.layers else layer.conv.macs for layer in TABLE.layers
    )
    assert found.metrics["accuracy_search"] == 0.85
    assert found.metrics["accuracy"] == pytest.approx(0.15)
    assert found.provenance["trial"] == 2


@pytest.fixture
def compressed(tmp_path: Path) -> tuple[torch.nn.Module, RankMap, Path, Path]:
    """A compressed network, its map with weights, and both files."""
    dense = small_net()
    layers = {layer.name: layer.conv for layer in find_layers(dense, INPUT_SHAPE)}
    name, conv = next((n, c) for n, c in layers.items() if not c.pointwise and c.groups == 1)
    bare = RankMap.model_validate(
        {
            "model": {"name": "small", "input_shape": INPUT_SHAPE},
            "layers": {
                name: {"format": "tucker2", "ranks": (2, 3), "conv": conv.to_json(), "macs": 1, "params": 1},
            },
            "macs": 1,
            "params": 1,
            "dense_macs": 2,
            "dense_params": 2,
        }
    )
    network = apply_rank_map(bare, dense)
    weights, file = tmp_path / "compressed.safetensors", tmp_path / "map.json"
    rank_map = save_compressed(network.state_dict(), bare, weights, file)
    rank_map.save(file)
    return network, rank_map, weights, file


def test_map_and_weights_come_back(compressed: tuple[torch.nn.Module, RankMap, Path, Path]) -> None:
    network, rank_map, weights, file = compressed
    images = torch.rand(2, *INPUT_SHAPE, generator=torch.Generator().manual_seed(0))
    for path in (weights, file):
        found, stored = read_compressed(path)
        assert stored is not None
        assert found.layers == rank_map.layers
        again = load_compressed(found, small_net(), stored)
        assert torch.equal(again(images), network.eval()(images))


def test_weights_that_are_not_the_map_s_are_refused(compressed: tuple[torch.nn.Module, RankMap, Path, Path]) -> None:
    _, rank_map, weights, file = compressed
    state = load_file(weights)
    save_file({key: value + 1 for key, value in state.items()}, weights)
    with pytest.raises(RankMapError, match="hash differs"):
        read_compressed(file)
    with pytest.raises(RankMapError, match="must hold a rank map"):
        read_compressed(weights)
    save_file({key: value for key, value in state.items() if key != "head.bias"}, weights)
    with pytest.raises(RankMapError, match=r"head\.bias"):
        load_compressed(rank_map, small_net(), weights)
    weights.unlink()
    with pytest.raises(RankMapError, match="must exist"):
        read_compressed(file)
    weights.write_bytes(b"no tensors")
    with pytest.raises(RankMapError, match="cannot read"):
        read_compressed(weights)


def test_weights_that_cannot_be_written_leave_nothing(
    compressed: tuple[torch.nn.Module, RankMap, Path, Path], tmp_path: Path
) -> None:
    network, rank_map, *_ = compressed
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RankMapError, match="cannot write the weights"):
        save_compressed(network.state_dict(), rank_map, tmp_path / "folder.safetensors")
    assert sorted(tmp_path.iterdir()) == before
