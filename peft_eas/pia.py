"""The mathematics of the adapters and of their folds, on plain tensors.

Shapes: hidden size `d`, rank `r`, `g` groups, linear outputs `o`. All branches (one, or two) share one down-projection.
With the scaling `s` and the weights `alpha` of the branches (1 if there is one), an adapter in front of an attention or
of a FFN is (numbers of equations are those of docs/method.md)

    adapt(z) = z + s * sum_j alpha_j * (z A^T B_j^T + b_j)                          (1)
"""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

WORKSPACE = 3 << 26
"""Bytes that `fold` takes beside what it is given and returns; more only where one row of all experts is more."""
_WIDE = 3
"""How many wider copies of some rows `fold` has at once."""
LARGEST_AMPLIFICATION = 1e3
"""How many times as large as what it is the inverse of an `input_shift` may be; in trained models it is about 1."""


def dense_up(blocks: torch.Tensor) -> torch.Tensor:
    """Grouped up-projections as matrices: `(branches, g, d/g, r/g) -> (branches, d, r)`, block-diagonal."""
    return blocks.squeeze(1) if blocks.shape[1] == 1 else torch.stack([torch.block_diag(*branch) for branch in blocks])


def mix(per_branch: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """Sum of the branches weighted by `alpha (2,)`, or the only one: `(branches, ...) -> (...)`."""
    return per_branch.squeeze(0) if alpha is None else torch.tensordot(alpha, per_branch, dims=1)


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold `z -> z + z down^T up^T + added` into the linear `y = z weight^T + bias` that reads it.

    With `R = I + up down` this is `weight R` and `bias + weight added` (from the weight as it was, not the folded one).

    Args:
        weight: `(o, d)`, or `(n, o, d)` of `n` experts, which have no bias here.
        bias: `(o,)` or `None`.
        down: `(r, d)`.
        up: `(d, r)`, scaling and branch weights included.
        added: `(d,)` or `None`, likewise.

    Returns:
        `(o, d)` folded weight and `(o,)` folded bias, or `None` if there is none; computed in float32 or wider and
        rounded once, to the dtype of `weight`.
    """
    if has_torch_function((weight,)):
        return handle_torch_function(fold, (weight,), weight, bias, down, up, added)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    down, up = down.to(dtype), up.to(dtype)
    folded, shifts = torch.empty_like(weight), []
    # a part of the rows at a time, since they are wider here
    count = max(1, WORKSPACE // (_WIDE * dtype.itemsize * max(1, weight[..., :1, :].numel())))
    for start in range(0, weight.shape[-2], count):
        rows = slice(start, start + count)
        wide = weight[..., rows, :].to(dtype)
        shift = None if bias is None else bias[rows].to(dtype)
        if added is not None:
            moved = wide @ added.to(dtype)
            shift = moved if shift is None else shift + moved
        folded[..., rows, :] = (wide @ up @ down).add_(wide)
        if shift is not None:
            shifts.append(shift.to(weight.dtype))
    return folded, torch.cat(shifts, -1) if shifts else None


def largest(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    added: torch.Tensor | None,
) -> float:
    """What no number that `fold` makes of these exceeds, on the way or in the end, found without folding.

    Not a number, or infinite, if one of these is.
    """
    sums = up.double().abs().sum(dim=0)  # (r,), by which the largest of `weight up` exceed those of `weight`
    shift = sums.new_zeros(()) if added is None else added.double().abs().sum()
    factors = torch.stack([1 + sums @ down.double().abs().amax(dim=1), sums.amax(), shift])
    return float((_size(weight) * factors + (0 if bias is None else _size(bias))).amax())


def _size(tensor: torch.Tensor) -> float:
    """The largest absolute value; not a number if there is one that isn't."""
    ends = torch.stack(torch.aminmax(tensor.detach())) if tensor.numel() else torch.zeros(2)  # takes no memory
    return float(ends.double().abs().amax())


def workspace(weight: torch.Tensor) -> int:
    """How many bytes folding into `weight` takes, beside what is given and returned."""
    a_number = _WIDE * torch.promote_types(weight.dtype, torch.float32).itemsize
    return min(a_number * weight.numel(), max(WORKSPACE, a_number * weight[..., :1, :].numel()))


def input_shift(down: torch.Tensor, up: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """What a linear with the folded weight `weight R`, and no bias, has to be given on top of `z`, equation (10).

    `z -> z + z down^T up^T + u` is `R z + u` with `R = I + up down`; that is `R (z + R^-1 u)`, where
    `R^-1 u = u - up (I + down up)^-1 down u` takes the inverse of an `r x r` matrix only.

    Args:
        down: `(r, d)`.
        up: `(d, r)`, scaling and branch weights included.
        added: `u`, `(d,)`, likewise.

    Returns:
        `R^-1 u`, `(d,)`, in float64.

    Raises:
        ValueError: if `R` all but erases a direction that the shift needs, so that rounding would show.
    """
    down, up, added = down.double(), up.double(), added.double()
    inner = torch.eye(len(down), dtype=down.dtype, device=down.device) + down @ up
    try:
        shift = added - up @ torch.linalg.solve(inner, down @ added)
    except torch.linalg.LinAlgError:
        shift = torch.full_like(added, torch.inf)
    if not shift.norm() <= LARGEST_AMPLIFICATION * added.norm():
        raise ValueError(
            "An adapter erases a direction of its input (it turns it into zero, or nearly), so its bias can't be added "
            f"in front of it: {shift.norm() / added.norm():.1e} times its size would be needed, and up to "
            f"{LARGEST_AMPLIFICATION:.0e} is allowed. Ways out: train further, with a lower learning rate or weight "
            "decay; or train with `use_bias=False`."
        )
    return shift
