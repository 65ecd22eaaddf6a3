"""What a skipped attention says of other tokens: an attention with queries of zero, equation (3) of docs/method.md."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

UNREADABLE = (
    "With `propagation='mean'`, skipped attentions read their mask, which can't be with {}: load the model with "
    "`attn_implementation='sdpa'` or `'eager'`, and generate by `generate`. Models with `propagation='none'` run with "
    "all."
)


def uniform_attention(values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """A mean over the tokens that are looked at.

    Args:
        values: `(B, S, r)`.
        allowed: `(B or 1, T or 1, S)`, whether each token may look at each; `None`: all at all.

    Returns:
        `(B, T or 1, r)`; zero for a token that may look at none, such as padding.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if allowed is None:
        return wide.mean(dim=1, keepdim=True).to(values.dtype)
    weights = allowed.to(wide.dtype)
    return (weights @ wide / weights.sum(-1, keepdim=True).clamp(min=1)).to(values.dtype)


def causal_mean(values: torch.Tensor) -> torch.Tensor:
    """The same where each token looks at itself and those before it: `(B, T, r) -> (B, T, r)`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    counts = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    return (wide.cumsum(dim=1) / counts).to(values.dtype)


def looked_at(
    attention_mask: torch.Tensor, length: int, total: int, is_causal: bool, hides: bool = False
) -> torch.Tensor:
    """Whether each of `length` tokens may look at each of `total`, `(B or 1, T or 1, S)`, by an attention's mask.

    Args:
        attention_mask: `(B, S)` of tokens that are no padding, or `(B, heads or 1, T or 1, S)`, or without the heads;
            bool, numbers of which 0 means no, or numbers below 0 that are added to scores.
        length: `T`; they are the last of the `S`.
        total: `S`.
        is_causal: Whether a token looks at none that follow, where the mask does not say which tokens look.
        hides: Whether a bool mask says the opposite, what may not be looked at (MPT).
    """
    mask = attention_mask[..., :total]
    mask = mask >= 0 if mask.is_floating_point() else mask.bool() ^ hides
    if mask.dim() == 4:
        mask = mask.any(dim=1)
    elif mask.dim() == 2:
        mask = mask[:, None]
    if is_causal and mask.shape[1] == 1 < length:
        mask = mask & torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
    return mask


def check_readable(mask: object, config: PreTrainedConfig | None) -> None:
    """Refuse a mask in a form that can't be read.

    Raises:
        ValueError: if the mask is no tensor, or the attention of this configuration is one that takes another form.
    """
    kind = getattr(config, "_attn_implementation", None) or ""
    if not isinstance(mask, (torch.Tensor, type(None))) or any(
        name in kind for name in ("flash", "flex", "paged", "vllm")
    ):
        raise ValueError(UNREADABLE.format(repr(kind)))
