"""Where an attention is skipped: what it leaves, and the module that stands in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .eas_cache import Remembered
from .eas_convention import BY_NAME, change_input, hidden_states_of
from .eas_propagation import causal_mean, check_readable, looked_at, uniform_attention
from .eas_record import Form, StandInShape


class StandIn(nn.Module):
    """What a skipped attention adds to the stream, equation (2) of docs/method.md:

        k + z E^T F^T + p D^T,    p_t = mean of (z_u C^T) over the tokens u that t may look at            (2), (3)

    Of its parameters there are those that the shape says: `constant` is `k (d,)`, `down` and `up` are `E (r, d')` and
    `F (d, r)`, `mean_down` and `mean_up` are `C (r, d'')` and `D (d, r)`. All start at zero.

    Args:
        shape: Their sizes.
        device: As in `torch.zeros`, and so is `dtype`.
    """

    constant: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None
    mean_down: nn.Parameter | None
    mean_up: nn.Parameter | None

    def __init__(
        self, shape: StandInShape, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()

        width, rank, mean_rank = shape.width, shape.rank, shape.mean_rank
        sizes = {
            "constant": (width,) if shape.constant else None,
            "down": (rank, shape.read) if rank else None,
            "up": (width, rank) if rank else None,
            "mean_down": (mean_rank, shape.pooled) if mean_rank else None,
            "mean_up": (width, mean_rank) if mean_rank else None,
        }
        for name, size in sizes.items():
            zeros = None if size is None else torch.zeros(size, device=device, dtype=dtype)
            self.register_parameter(name, None if zeros is None else nn.Parameter(zeros))

    @property
    def shape(self) -> StandInShape:
        """The sizes of what there is."""
        sizes = {} if self.down is None else dict(zip(("rank", "read"), self.down.shape, strict=True))
        if self.mean_down is not None:
            sizes |= zip(("mean_rank", "pooled"), self.mean_down.shape, strict=True)
        widths = [p.shape[0] for p in (self.constant, self.up, self.mean_up) if p is not None]
        return StandInShape(width=widths[0] if widths else 0, constant=self.constant is not None, **sizes)

    def forward(self, z: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What is added, `(B, T, d)`, or of a shape like it.

        Args:
            z: What the attention reads, `(B, T, d')`.
            pool: Gives `p (B, T or 1, r)` of a `C`.
        """
        one, down, up, constant = (1,) * (z.dim() - 1), self.down, self.up, self.constant
        # a tensor of its own, since layers may change in place what an attention gives them
        if down is not None and up is not None:
            added = F.linear(F.linear(z.to(down.dtype), down), up, constant).to(z.dtype)
        elif constant is None:
            added = z.new_zeros(*one, 1)
        else:
            added = constant.to(z.dtype, copy=True).view(*one, -1)
        if self.mean_down is not None and self.mean_up is not None:
            added = added + F.linear(pool(self.mean_down).to(self.mean_up.dtype), self.mean_up).to(z.dtype)
        # so that dropout behind it takes each token by itself
        return added.expand(*z.shape[:-1], -1).clone() if self.training and added.shape[:-1] == one else added


class Skip:
    """A call of an attention that is skipped: its stand-in, handed on as the attention would hand on its output.

    Unmerged, folded or merged, a skipped attention is this.

    Args:
        form: How such attentions are built and called.
        index: Index of the layer.
        attention: The attention, for the names of its arguments.
    """

    def __init__(self, form: Form, index: int, attention: nn.Module) -> None:
        self.form = form
        self.index = index
        self.convention = BY_NAME[form.convention](form, attention)
        self.remembered = Remembered(form, index)

    def __call__(self, stand_in: StandIn, attention: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor | tuple:
        """What the attention returns.

        Args:
            stand_in: What it leaves.
            attention: What has its norm of the residual stream, and its configuration.
            args: Those it is called with.
            kwargs: Likewise.

        Raises:
            ValueError: if the KV cache holds what the attention left when it was not skipped; with a mean over tokens,
                if the attention's mask is in a form that can't be read.
        """
        if stand_in.mean_down is None:
            others = self.convention.argument(self.form.context, args, kwargs) if self.form.shows_keys else None
            self.remembered.nothing(kwargs, others)
        config = getattr(attention, "config", None)
        added = stand_in(hidden_states_of(args, kwargs), lambda down: self.pool(down, config, args, kwargs))
        return self.convention.returned(attention, added, args, kwargs)

    def pool(self, down: torch.Tensor, config: PreTrainedConfig | None, args: tuple, kwargs: dict) -> torch.Tensor:
        """Equation (3): what the tokens that the attention would look at say through `C (r, d'')`: `(B, T or 1, r)`."""
        hidden_states, is_cross = hidden_states_of(args, kwargs), bool(self.form.context)
        tokens = self.convention.argument(self.form.context, args, kwargs) if is_cross else hidden_states
        values = None
        if tokens is not None:
            tokens = tokens.reshape(len(hidden_states), -1, tokens.shape[-1])  # Mllama's come tile by tile
            values = F.linear(tokens.to(down.dtype), down)
        values = self.remembered.with_earlier(values, kwargs)
        mask = self.convention.argument(self.form.mask, args, kwargs)
        check_readable(mask, config)
        length, total = hidden_states.shape[1], values.shape[1]
        is_causal = self.form.causal and not is_cross
        if mask is not None:
            return uniform_attention(values, looked_at(mask, length, total, is_causal, self.form.mask_hides))
        # as torch's own causal attention: the first of the values are these tokens', unless one goes on from the cache
        return causal_mean(values[:, :length]) if is_causal and length > 1 else uniform_attention(values, None)


LOOKED_FOR = False
"""vLLM's Transformers backend runs no layer without an attention. It knows one by what stands behind this in `forward`,
whose source it reads, and hangs an attention of its own on the module, which asks for room for keys and values."""


def keeps_nothing(*_: object) -> None:
    """What an attention of vLLM says that keeps no keys and values."""


class SkippedAttention(nn.Module):
    """Stands where an attention was.

    Args:
        form: How such attentions are built and called.
        layer_idx: Index of the layer.
        attention: The attention; what it is called with is looked at, and its norm of the residual stream is kept.
        shape: Sizes of its stand-in.
    """

    def __init__(self, form: Form, layer_idx: int, attention: nn.Module, shape: StandInShape, **factory: Any) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = getattr(attention, "config", None)
        self.skip = Skip(form, layer_idx, attention)
        self.stand_in = StandIn(shape, **factory)
        *parents, leaf = form.residual_norm.split(".")
        if leaf:
            module: nn.Module = self
            for name in parents:
                module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, attention.get_submodule(form.residual_norm))

    def forward(self, *args, **kwargs) -> torch.Tensor | tuple:
        if LOOKED_FOR:
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            attend(self)
        return self.skip(self.stand_in, self, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "get_kv_cache_spec"):  # vLLM's attention, for a layer that needs none: see `LOOKED_FOR`
            value.get_kv_cache_spec = keeps_nothing
            return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


class Shift(nn.Module):
    """What a folded adapter leaves in front: biases that the linears it is folded into can't have, equation (10).

    Args:
        shift: `(d,)`.
    """

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift, requires_grad=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.shift.to(z)


def put_in_front(layers: nn.ModuleList, name: str, shift: Shift) -> None:
    """Let the input of the attention or FFN `name` (`"3.mlp"`) go through a `Shift`."""
    module = layers.get_submodule(name)
    module.eas_front = shift
    module.register_forward_pre_hook(_through_front, with_kwargs=True)


def _through_front(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return change_input(args, kwargs, module.eas_front)
