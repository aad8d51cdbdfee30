"""Find the best per-layer ranks for low-rank compression of a pretrained CNN, as a front of accuracy against MACs.

The names below are the public door. They are imported when first used, so that importing the package is quick.
A user's mistake raises a :class:`RanksearchError` that says what to do; ``load_space`` (a YAML file) and
``parse_space`` (a mapping) name all the mistakes of a space at once. ``Space(...)`` itself raises pydantic's
``ValidationError``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranksearch.comparison import Comparison, compare
    from ranksearch.config import load_space, parse_space
    from ranksearch.errors import RanksearchError
    from ranksearch.launch import inspect, open_study, resume, search
    from ranksearch.rankmap import RankMap
    from ranksearch.space import Space
    from ranksearch.study import Study

__all__ = [
    "Comparison",
    "RankMap",
    "RanksearchError",
    "Space",
    "Study",
    "compare",
    "inspect",
    "load_space",
    "open_study",
    "parse_space",
    "resume",
    "search",
]

_HOMES = {
    "Comparison": "comparison",
    "RankMap": "rankmap",
    "RanksearchError": "errors",
    "Space": "space",
    "Study": "study",
    "compare": "comparison",
    "inspect": "launch",
    "load_space": "config",
    "open_study": "launch",
    "parse_space": "config",
    "resume": "launch",
    "search": "launch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
