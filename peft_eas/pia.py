"""The mathematics of the adapters and of their folds, on plain tensors.

Shapes: hidden size `d`, rank `r`, `g` groups, linear outputs `o`. Two branches share one down-projection. With the
scaling `s`, the branch weights `alpha` and the prompt's information `p` (section numbers are those of docs/method.md):

    adapt(z) = z + s * sum_j alpha_j * ((z A^T + a) B_j^T + b_j)                    (1)  retained attention
    pia(z)   = z + s * sum_j alpha_j * (1/2 (z C^T + c + p) B_j^T + b_j)            (2)  skipped attention
    p        = mean over the prompt's tokens of (z A^T + a)                         (3)

Both are `z + h U^T + u` with `h` the down-projected input, so one fold serves both.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def dense_up(blocks: torch.Tensor) -> torch.Tensor:
    """Grouped up-projections as matrices: `(2, g, d/g, r/g) -> (2, d, r)`, block-diagonal."""
    return torch.stack([torch.block_diag(*branch) for branch in blocks])


def mix(per_branch: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Sum of the two branches weighted by `alpha (2,)`: `(2, ...) -> (...)`."""
    return torch.tensordot(alpha, per_branch, dims=1)


def up_project(
    hidden: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor | None, alpha: torch.Tensor
) -> torch.Tensor:
    """The adapter's output `sum_j alpha_j * (hidden up_j^T + up_bias_j)`: `(B, T, r) -> (B, T, d)`.

    Args:
        hidden: Down-projected input `(B, T, r)`.
        up: `(2, d, r)`.
        up_bias: `(2, d)` or `None`.
        alpha: `(2,)` learned weights, or `(B, 1, 2)` weights of each sequence.
    """
    if alpha.dim() == 1:
        return F.linear(hidden, mix(up, alpha), None if up_bias is None else mix(up_bias, alpha))
    first, second = (F.linear(hidden, up[j], None if up_bias is None else up_bias[j]) for j in range(2))
    return alpha[..., :1] * first + alpha[..., 1:] * second


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Fold `z -> z + (z down^T + down_bias) up^T + up_bias` into the linear `y = z weight^T + bias` that reads it.

    With `R = I + up down` and `t = up down_bias + up_bias` this is `weight R`, `bias + weight t` (from the weight as
    it was, not the folded one) and, for a vector `p (r,)` added to the down-projection, `y += weight up p`.

    Args:
        weight: `(o, d)`.
        bias: `(o,)` or `None`.
        down: `(r, d)`.
        down_bias: `(r,)` or `None`.
        up: `(d, r)`, scaling and branch weights included.
        up_bias: `(d,)` or `None`, likewise.

    Returns:
        `(o, d)` folded weight, `(o,)` folded bias or `None` if there is none, `(o, r)` projection of `p`; computed in
        float32 or wider and rounded once, to the dtype of `weight`.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(dtype)
    projected = wide @ up.to(dtype)
    shift = None if bias is None else bias.to(dtype)
    if down_bias is not None:
        shift = _add(shift, projected @ down_bias.to(dtype))
    if up_bias is not None:
        shift = _add(shift, wide @ up_bias.to(dtype))
    folded = torch.addmm(wide, projected, down.to(dtype))
    return folded.to(weight.dtype), None if shift is None else shift.to(weight.dtype), projected.to(weight.dtype)


def _add(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term
