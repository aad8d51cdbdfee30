"""Strategies side by side on one network: every one searches under the same space, with the same budget of trials.

Every strategy and seed is an ordinary study, so a comparison holds no trials of its own, and continues by looking
which of its studies are there. What the strategies choose at given MACs is then trained alike, in one more study a
seed.
"""

from ranksearch.comparison.result import Cell, Comparison, Point, Run
from ranksearch.comparison.running import compare

__all__ = ["Cell", "Comparison", "Point", "Run", "compare"]
