"""Latency: how long networks take, and how long they would, added up from what was measured layer by layer.

``clock`` times one thing; ``runtimes`` are the ways to run it; ``measured`` times every candidate of a price table
alone and makes a :class:`LatencyTable` of it (``record``), which says what any rank map takes without its network
being built; ``multiple`` measures which ranks are worth timing.
"""

from ranksearch.latency.clock import latency_ms, median_ms
from ranksearch.latency.measured import checked, device_name, latencies, with_latencies
from ranksearch.latency.multiple import rank_multiple
from ranksearch.latency.record import LatencyTable
from ranksearch.latency.runtimes import RUNTIMES, runner

__all__ = [
    "RUNTIMES",
    "LatencyTable",
    "checked",
    "device_name",
    "latencies",
    "latency_ms",
    "median_ms",
    "rank_multiple",
    "runner",
    "with_latencies",
]
