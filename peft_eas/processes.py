"""What the processes of a training know together."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from torch import distributed


def gather_object(items: list[Any]) -> list[Any]:
    """The items of all processes, in the same order in each.

    As `accelerate.utils.gather_object`, but that also of processes that accelerate takes for one each: those that
    torchrun has started on CPUs, before `TrainingArguments` are made.
    """
    PartialState()  # joins the processes, where a launcher has started several
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
