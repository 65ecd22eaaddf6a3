"""How many attentions to skip: the largest set within a loss, or the smallest that is fast enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..runtime.eas_attention import SkippedAttention
from ..runtime.eas_record import StandInShape


def largest_within(losses: Sequence[float], max_increase: float) -> int:
    """The largest `k` with `losses[k] - losses[0] <= max_increase`; `losses[k]` is that with `k` attentions skipped.

    Losses that are NaN or infinite are over every budget. Rounding errors of a float are within it.
    """
    limit = losses[0] + max_increase + 1e-9 * max(1.0, abs(losses[0]))
    return max((k for k, loss in enumerate(losses) if k and math.isfinite(loss) and loss <= limit), default=0)


def predicted_speedup(total: float, attention: float, count: int) -> float:
    """Cost model: operations of a forward before and after `count` attentions of `attention` operations each go."""
    return total / (total - count * attention)


def count_for_speedup(total: float, attention: float, available: int, target: float) -> int:
    """The smallest count that the cost model gives `target` for.

    Raises:
        ValueError: if skipping all but one is not enough.
    """
    for count in range(1, available):
        if predicted_speedup(total, attention, count) >= target:
            return count
    most = predicted_speedup(total, attention, available - 1)
    raise ValueError(
        f"`target_speedup`={target} can't be had: by operations, a held-out batch's forward with all attentions but "
        f"one skipped is {most:.2f} times as fast. In longer sequences, attentions have a larger share."
    )


@torch.no_grad()
def forward_operations(forward: Callable[[], Any], model: nn.Module, attentions: Sequence[str]) -> tuple[float, float]:
    """Floating-point operations of a forward, and those of one attention on average.

    Args:
        forward: What is counted; it calls `model`.
        model: A model.
        attentions: Names of its attentions.
    """
    # of all kernels of attention, only this one is made of operations that are counted on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    by_module = counter.get_flop_counts()
    own = [sum(by_module.get(f"{type(model).__name__}.{name}", {}).values()) for name in attentions]
    return float(counter.get_total_flops()), statistics.fmean(own)


@torch.no_grad()
def measured_speedup(
    forward: Callable[[], float], model: nn.Module, attentions: Sequence[str], rounds: int = 5
) -> float:
    """How many times as fast a forward is without these attentions: the median over rounds that take turns.

    `forward` ends when its result is there, on an accelerator, too.
    """

    def seconds() -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    ratios = []
    for _ in range(rounds + 1):
        whole = seconds()
        with without(model, attentions):
            ratios.append(whole / seconds())
    return statistics.median(ratios[1:])  # the first round was for warming up


@contextmanager
def without(model: nn.Module, attentions: Sequence[str]) -> Iterator[None]:
    """Leave out the named attentions of a model with adapters inside of the `with`."""
    modules: list[Any] = [model.get_submodule(name) for name in attentions]
    try:
        for module in modules:
            row, index = module.place.row, module.place.index
            module.forward = SkippedAttention(row, index, module.base_layer, StandInShape(width=1)).forward
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
