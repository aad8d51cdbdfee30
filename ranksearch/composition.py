"""What a trial makes of each layer: format, ranks, cost beside the dense layer's; no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ranksearch.setting import Setting
from ranksearch.table import DENSE
from ranksearch.trial import Trial


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """One searched or pinned layer of one trial's network."""

    name: str
    format: str
    """``dense`` where it is left as it is."""
    ranks: tuple[int, ...]
    macs: int
    """Per image, as the next one."""
    dense_macs: int
    params: int
    dense_params: int
    error: float | None
    """Predicted relative squared error; None of a layer that a funnel run trained to its ranks."""

    @property
    def macs_ratio(self) -> float:
        """MACs as a share of the dense layer's."""
        return self.macs / self.dense_macs

    @property
    def choice(self) -> str:
        """Format and ranks in a few characters."""
        return f"{self.format} {','.join(map(str, self.ranks))}" if self.ranks else self.format


def composition(setting: Setting, trial: Trial) -> tuple[LayerShare, ...]:
    """The layers in the price table's order, pinned ones last; none of a funnel run that is not complete."""
    table, outcome = setting.table, trial.outcome
    if not trial.proposal.funnel:
        return tuple(
            LayerShare(
                name=name,
                format=candidate.format,
                ranks=candidate.ranks,
                macs=candidate.macs,
                dense_macs=table.convs[name].macs,
                params=candidate.params,
                dense_params=table.convs[name].params,
                error=candidate.error,
            )
            for name, candidate in table.picked(trial.proposal.choices).items()
        )
    if outcome is None:
        return ()
    ended = outcome.layers or {}
    return tuple(
        LayerShare(
            name=name,
            format=ended[name]["format"] if name in ended else DENSE,
            ranks=tuple(ended[name]["ranks"]) if name in ended else (),
            macs=ended[name]["macs"] if name in ended else conv.macs,
            dense_macs=conv.macs,
            params=ended[name]["params"] if name in ended else conv.params,
            dense_params=conv.params,
            error=None if name in ended else 0.0,
        )
        for name, conv in table.convs.items()
    )
