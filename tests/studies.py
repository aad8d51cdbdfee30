"""Studies and evaluators on price tables made by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ranksearch.engine import Evaluate
from ranksearch.rankmap import ModelRecord
from ranksearch.setting import Setting
from ranksearch.space import Space
from ranksearch.table import PriceTable
from ranksearch.trial import Outcome, Proposal, Task
from tests.tables import DENSE_ACCURACY, price_table, proposal_outcome

TABLE = price_table(layers=6, candidates=8)


def space_of(**sections: Any) -> Space:
    """A space of a network that is not there, with these sections."""
    return Space.model_validate({"model": {"name": "table"}, **sections})


def setting_of(space: Space, table: PriceTable = TABLE) -> Setting:
    return Setting(
        space=space,
        table=table,
        model=ModelRecord(name="table", input_shape=(3, 32, 32)),
        dense={
            "accuracy": DENSE_ACCURACY,
            "accuracy_search": DENSE_ACCURACY,
            "loss": 0.3,
            "macs": table.dense_macs,
            "params": table.dense_params,
        },
        left_dense={"stem": "the first convolution"},
        classes=10,
        data_digest="",
        dtype="float32",
        versions={"python": "3"},
    )


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A factory of evaluators by the table, some of whose proposals fail."""

    table: PriceTable = TABLE
    failing: Mapping[tuple[int, ...], str] = field(default_factory=dict)
    """Choices to the message of the error that they raise."""

    def __call__(self) -> Evaluate:
        return self._evaluate

    def _evaluate(self, task: Task) -> Outcome:
        if task.choices in self.failing:
            raise ValueError(self.failing[task.choices])
        proposal = Proposal(choices=task.choices, origin="", settings=task.settings)
        return proposal_outcome(self.table, proposal)
