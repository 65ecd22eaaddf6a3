"""Parameters that processes share out among themselves: FSDP2 as DTensors, DeepSpeed's ZeRO-3 as parts of its own.

Whatever reads or writes one outside of a forward asks here. All processes have to ask alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def is_shared_out(parameter: torch.Tensor) -> bool:
    """Whether this process has a part of it only."""
    return _is_zero3(parameter) or _is_dtensor(parameter)


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Its shape as a whole; ZeRO-3's own is empty between forwards."""
    return getattr(parameter, "ds_shape", parameter.shape)


def wholes(parameters: Sequence[Any]) -> list[torch.Tensor]:
    """Copies of parameters as wholes."""
    if any(map(_is_zero3, parameters)):
        from deepspeed import zero

        with zero.GatheredParameters(parameters):
            return [parameter.detach().clone() for parameter in parameters]
    return [p.full_tensor() if _is_dtensor(p) else p.detach().clone() for p in parameters]


def fill(parameter: Any, value: torch.Tensor) -> None:
    """Give a parameter this value, a whole one, which all processes have."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if _is_zero3(parameter):
        from deepspeed import zero
        from deepspeed.utils import safe_set_local_fp32_param

        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        if hasattr(parameter, "_z3_optimizer"):  # which has a copy of its own, and would bring the old value back
            safe_set_local_fp32_param(parameter, parameter.ds_tensor)
        return
    if _is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


class Kept:
    """Parameters that the optimizer of ZeRO-3 leaves as they are, with its state of them.

    It steps through all parameters at once, in flat tensors: momentum and decay would act on those that a forward does
    not use, and so would the gradients of the last forward that did, since it keeps them.

    Args:
        optimizer: What steps: the torch optimizer within DeepSpeed's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.values: list[tuple[nn.Parameter, torch.Tensor, dict[str, torch.Tensor]]] = []
        # before the parameters are made of the flat tensors again
        self.hook = optimizer.register_step_post_hook(lambda *args: self._restore())

    def keep(self, parameters: Iterable[Any]) -> None:
        """From now on these, as they are now, and no others."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state, safe_set_local_grad

        states = self.optimizer.state.items()
        names = {name for flat, state in states for name, value in state.items() if _is_like(value, flat)}
        self.values = []
        for parameter in parameters:
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
            state = {name: safe_get_local_optimizer_state(parameter, name).clone() for name in names}
            self.values.append((parameter, safe_get_local_fp32_param(parameter).clone(), state))

    def release(self) -> None:
        self.hook.remove()

    def _restore(self) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for parameter, value, state in self.values:
            safe_set_local_fp32_param(parameter, value)
            for name, of_it in state.items():
                safe_set_local_optimizer_state(parameter, of_it, name)


def _is_zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _is_dtensor(parameter: Any) -> bool:
    return hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")


def _is_like(value: Any, flat: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == flat.shape
