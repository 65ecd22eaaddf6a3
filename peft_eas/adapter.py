"""The adapter: equation (1) of docs/method.md, and what becomes of it when it is folded."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from . import pia
from .config import EASConfig


class Dense(NamedTuple):
    """An adapter as `z + z down^T up^T + bias`: groups are block-diagonal matrices here, the branches are added up, and
    the scaling is in."""

    down: torch.Tensor  # (r, d)
    up: torch.Tensor  # (d, r)
    bias: torch.Tensor | None  # (d,)


class Adapter(nn.Module):
    """A low-rank adapter in front of the linears that read `z (B, T, d)`:

        adapt(z) = z + s * sum_j alpha_j * (z A^T B_j^T + b_j)                          (1)

    Its parameters are `down`, `A (r, d)`; `up`, `B (branches, g, d/g, r/g)` in `g` groups; with `use_bias`, `bias`,
    `b (branches, d)`; with `router="static"`, which makes two branches, `router (2,)`, whose softmax is `alpha`. A
    fresh one is an identity if `config.init_weights`.

    Args:
        config: Says groups, branches, biases, scaling and dropout.
        size: `d`.
        rank: `r`.
        device: Of the parameters.
        dtype: Likewise.
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    router: nn.Parameter | None

    def __init__(
        self,
        config: EASConfig,
        size: int,
        rank: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        branches = 1 if config.router == "none" else 2
        blocks = torch.zeros(branches, config.groups, size // config.groups, rank // config.groups)
        if not config.init_weights:
            nn.init.normal_(blocks, std=0.02)
        elif branches == 2:  # which cancel out: two that are equal would stay equal, and the router would not learn
            nn.init.normal_(blocks[0], std=0.02)
            blocks[1] = -blocks[0]
        values = {
            "down": kaiming(rank, size),
            "up": blocks,
            "bias": torch.zeros(branches, size) if config.use_bias else None,
            "router": torch.zeros(2) if config.router == "static" else None,
        }
        for name, value in values.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value.to(device=device, dtype=dtype)))
        self.scaling = config.scaling
        self.dropout = config.dropout

    def dense(self) -> Dense:
        """The adapter in the form that the mathematics has it."""
        up, bias = self._unscaled()
        return Dense(self.down, up * self.scaling, None if bias is None else bias * self.scaling)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Equation (1): `(B, T, d) -> (B, T, d)`, of the dtype of `z`."""
        down = self.down
        read = z if z.dtype == down.dtype else z.to(down.dtype)
        if self.dropout:
            read = F.dropout(read, self.dropout, self.training)
        # not `dense()`, which scales matrices: this adds the scaled tokens up in one step
        added = F.linear(F.linear(read, down), *self._unscaled())
        mapped = torch.add(z, added, alpha=self.scaling)
        return mapped if mapped.dtype == z.dtype else mapped.to(z.dtype)

    def _unscaled(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The matrix `(d, r)` and the bias `(d,)` that the branches come to."""
        up, bias, router = self.up, self.bias, self.router
        if router is None and up.shape[1] == 1:  # one matrix: the default, and what decoding asks for once a token
            return up.flatten(0, 2), None if bias is None else bias.flatten()
        alpha = None if router is None else torch.softmax(router, dim=-1)
        return pia.mix(pia.dense_up(up), alpha), None if bias is None else pia.mix(bias, alpha)


def kaiming(rows: int, columns: int) -> torch.Tensor:
    """As PEFT's LoRA and `nn.Linear` initialise a projection."""
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
