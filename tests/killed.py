"""What a test kills: a fine-tuning in a process of its own, in a module that is quick to import there."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ranksearch.finetuning import finetune
from ranksearch.space import FineTuneSpec


def fine_tune_in_child(rank_map: Path, output: Path, spec: FineTuneSpec, storage: Path, started: Path) -> None:
    """Fine-tune; the file ``started`` is there from the first step on, and tells at the end how long it has worked."""
    torch.set_num_threads(1)
    begun: list[float] = []

    def notify(what: str, done: int, total: int) -> None:
        if what.startswith("fine-tuning") and not begun:
            begun.append(time.process_time())
            started.touch()

    finetune(rank_map, output, spec=spec, ema_decay=0.99, storage=storage, notify=notify)
    started.write_text(str(time.process_time() - begun[0]))
