"""Calling what a user names as ``package.module:function``; no torch.

The working directory is searched last, as ``python -m`` would search it first, so that a file beside the space file
needs no packaging and cannot hide an installed module.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from ranksearch.errors import RanksearchError
from ranksearch.secrecy import filled


def call_factory(path: str, options: dict[str, Any], error: type[RanksearchError]) -> Any:
    """What ``package.module:function`` returns for the keyword arguments ``options``.

    Raises:
        RanksearchError: of class ``error``: the function cannot be imported, or failed.
    """
    return call_with_options(path, _imported(path, error), options, error)


def call_with_options(
    name: str, function: Callable[..., Any], options: dict[str, Any], error: type[RanksearchError]
) -> Any:
    """What ``function`` returns for the keyword arguments ``options``; ``name`` is what error messages call it.

    Raises:
        RanksearchError: of class ``error``: the options do not fit the function's parameters, or it failed.
    """
    try:
        signature = inspect.signature(function)
        signature.bind(**options)
    except (TypeError, ValueError) as problem:
        known = ", ".join(signature.parameters) if isinstance(problem, TypeError) else "unknown"
        raise error(
            f"options of {name} must be its parameters ({known or 'it has none'}), found {options}: {problem}. "
            "Correct `options`."
        ) from problem
    try:
        return function(**filled(options))
    except error:
        raise
    except Exception as problem:  # whatever a user's function, or a wrong value in the options, may raise
        raise error(
            f"{name} failed with options {options}: {type(problem).__name__}: {problem}. "
            "Correct the function or `options`."
        ) from problem


def _imported(path: str, error: type[RanksearchError]) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    remedy = "Write package.module:function, importable from the working directory or installed."
    if not module_name or not name:
        raise error(f"a factory must be written package.module:function, found {path!r}. {remedy}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as problem:  # importing runs the user's module, which may raise anything
        raise error(f"cannot import {path}: {type(problem).__name__}: {problem}. {remedy}") from problem
    if not callable(found):
        raise error(f"a factory must be callable, found {path} of type {type(found).__name__}. {remedy}")
    function: Callable[..., Any] = found
    return function
