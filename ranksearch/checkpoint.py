"""Checkpoints of trainings: written whole or not at all, so that a kill at any moment leaves the last whole one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ranksearch.errors import ModelError


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write what ``torch.load`` reads back as weights only; raises :class:`ModelError` where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            torch.save(state, unfinished)
            os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot write the checkpoint {path}: {error}. Check the folder and the space left."
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What was written; raises :class:`ModelError` where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read the checkpoint {path}: {error}. Check the file and the folder.") from error
    except Exception as error:  # torch.load raises whatever its pickle holds; what it says is for programmers
        raise ModelError(
            f"cannot read the checkpoint {path}, it is damaged or none ({type(error).__name__}). Remove it to "
            "start afresh."
        ) from error
    return state
