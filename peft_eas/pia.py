"""The mathematics of the adapters and of their folds, on plain tensors.

Shapes: hidden size `d`, rank `r`, `g` groups, linear outputs `o`. All branches (one, or two) share one down-projection.
With the scaling `s`, the weights `alpha` of the branches (1 if there is one) and the prompt's information `p` (equation
numbers are those of docs/method.md):

    adapt(z) = z + s * sum_j alpha_j * ((z A^T + a) B_j^T + b_j)                    (1)  attention, or FFN
    pia(z)   = z + s * sum_j alpha_j * ((z A^T + a + p) B_j^T + b_j)                (2)  FFN of a skipped attention
    p        = mean over the prompt's tokens of (z C^T + c)                         (3)

Both are `z + h U^T + u` with `h` the down-projected input, so one fold serves both.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

LARGEST_AMPLIFICATION = 1e3
"""How many times as large as `up` the solution of `input_shift` may be; in trained models it is about 1."""


def dense_up(blocks: torch.Tensor) -> torch.Tensor:
    """Grouped up-projections as matrices: `(branches, g, d/g, r/g) -> (branches, d, r)`, block-diagonal."""
    return blocks[:, 0] if blocks.shape[1] == 1 else torch.stack([torch.block_diag(*branch) for branch in blocks])


def mix(per_branch: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """Sum of the branches weighted by `alpha (2,)`, or the only one: `(branches, ...) -> (...)`."""
    return per_branch[0] if alpha is None else torch.tensordot(alpha, per_branch, dims=1)


def up_project(
    hidden: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor | None, alpha: torch.Tensor | None
) -> torch.Tensor:
    """The adapter's output `sum_j alpha_j * (hidden up_j^T + up_bias_j)`: `(B, T, r) -> (B, T, d)`.

    Args:
        hidden: Down-projected input `(B, T, r)`.
        up: `(branches, d, r)`.
        up_bias: `(branches, d)` or `None`.
        alpha: `(2,)` learned weights, `(B, 1, 2)` weights of each sequence, or `None` if there is one branch.
    """
    if alpha is None or alpha.dim() == 1:
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold `z -> z + (z down^T + down_bias) up^T + up_bias` into the linear `y = z weight^T + bias` that reads it.

    With `R = I + up down` and `t = up down_bias + up_bias` this is `weight R` and `bias + weight t` (from the weight as
    it was, not the folded one).

    Args:
        weight: `(o, d)`, or `(n, o, d)` of `n` experts, which have no bias here.
        bias: `(o,)` or `None`.
        down: `(r, d)`.
        down_bias: `(r,)` or `None`.
        up: `(d, r)`, scaling and branch weights included.
        up_bias: `(d,)` or `None`, likewise.

    Returns:
        `(o, d)` folded weight and `(o,)` folded bias, or `None` if there is none; computed in float32 or wider and
        rounded once, to the dtype of `weight`.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(dtype)
    projected = wide @ up.to(dtype)
    shift = None if bias is None else bias.to(dtype)
    if down_bias is not None:
        shift = _add(shift, projected @ down_bias.to(dtype))
    if up_bias is not None:
        shift = _add(shift, wide @ up_bias.to(dtype))
    folded = (projected @ down.to(dtype)).add_(wide)
    return folded.to(weight.dtype), None if shift is None else shift.to(weight.dtype)


def input_shift(
    down: torch.Tensor, down_bias: torch.Tensor | None, up: torch.Tensor, up_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a linear with the folded weight `weight R` has to be given on top of `z`, equation (10) of docs/method.md.

    `z -> z + (z down^T + down_bias + p) up^T + up_bias` is `R z + up (down_bias + p) + up_bias` with `R = I + up down`;
    that is `R (z + shift)` with `shift = S p + s`, `S = R^-1 up` and `s = R^-1 (up down_bias + up_bias)`. Since
    `R^-1 up = up (I + down up)^-1`, only an `r x r` matrix is inverted.

    Args:
        down: `(r, d)`.
        down_bias: `(r,)` or `None`.
        up: `(d, r)`, scaling and branch weights included.
        up_bias: `(d,)` or `None`, likewise.

    Returns:
        `S (d, r)`, and `s (d,)` or `None` if there are no biases; in float64.

    Raises:
        ValueError: if `R` all but erases a direction that the shift needs, so that rounding would show.
    """
    down, up = down.double(), up.double()
    inner = torch.eye(len(down), dtype=down.dtype, device=down.device) + down @ up
    try:
        solved = torch.linalg.solve(inner, up, left=False)
    except torch.linalg.LinAlgError:
        solved = torch.full_like(up, torch.inf)
    if not solved.norm() <= LARGEST_AMPLIFICATION * up.norm():
        raise ValueError(
            "An adapter erases a direction of its input (it turns it into zero, or nearly), so the prompt's "
            f"information can't be added in front of it: {solved.norm() / up.norm():.1e} times its size would be "
            f"needed, and up to {LARGEST_AMPLIFICATION:.0e} is allowed. Ways out: train further, with a lower learning "
            "rate or weight decay; or `model.freeze_context(dataloader)` before merging."
        )
    constant = None
    if down_bias is not None:
        constant = up @ down_bias.double()
    if up_bias is not None:
        constant = _add(constant, up_bias.double())
    return solved, None if constant is None else constant - solved @ (down @ constant)


def _add(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term
