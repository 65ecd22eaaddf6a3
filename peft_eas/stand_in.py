"""Stand-ins: what a skipped attention leaves, and what attentions add to the residual stream at all.

Equation (2) of docs/method.md: `x' = x + k + F E z`. It starts as near as it gets to `x + a`, where `z (d',)` is what
the attention reads, and `a (d,)` what it adds to the stream: after the norms on its output, and before a norm of the
sum.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.logging import tqdm

from .batches import arguments_of, arguments_seen, batches_of, counted_tokens, evaluating, explaining, hooks
from .families import Place, find_layers
from .layer import EASAttention
from .model import EASModel
from .processes import gather_object
from .runtime.eas_attention import StandIn
from .runtime.eas_convention import BY_NAME
from .shards import fill, wholes
from .site import EASLayer

MEASURING = "Measuring attentions"  # as bars of progress say

ENOUGH = 16
"""Tokens to measure with, for each number that a token has: more make no difference in the end (docs/results.md)."""

RIDGE = 2.0
"""Of the least squares (4), in units of the mean variance of what is read, a number it has for each token."""

ROUNDING = 1e-6
"""The ridge is as much of the largest variance at least, as it is not known better."""


class Fit(NamedTuple):
    """The parameters of a stand-in that is as near as it gets to what an attention adds. In float64 on the CPU."""

    constant: torch.Tensor
    """`(d,)`."""
    maps: tuple[torch.Tensor, torch.Tensor] | None = None
    """`down (r, d')` and `up (d, r)` of a linear one."""


@dataclass
class Moments:
    """Of tokens: what an attention reads, `z (d',)`, and adds, `a (d,)`. In float64 on the CPU.

    Attributes:
        count: Number of tokens.
        mean: `(d,)`, of `a`.
        read: `(d',)`, `(d', d')` and `(d', d)`: the mean of `z`, and the sums over tokens of `z z^T` and `z a^T` about
            their means; `None` if they are not wanted.
    """

    count: int
    mean: torch.Tensor
    read: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, added: torch.Tensor, read: torch.Tensor | None = None) -> Moments:
        """Those of tokens: `added (n, d)` and `read (n, d')`, in single precision or double."""
        mean = added.double().mean(dim=0)
        if read is None:
            return cls(len(added), mean.cpu())
        center = read.double().mean(dim=0)
        # In single precision, as double takes most of the time on many GPUs; so about the means, without which numbers
        # that are far from zero would leave no digits for what varies. Moved before they are made longer.
        a, z = added - mean.to(added), read - center.to(read)
        squares, products = (product.cpu().double() for product in (z.T @ z, z.T @ a))
        return cls(len(added), mean.cpu(), (center.cpu(), squares, products))

    def __iadd__(self, other: Moments) -> Moments:
        """Those of the tokens of both (Chan, Golub, LeVeque: Updating formulae, 1979)."""
        count = self.count + other.count
        shift, share = other.mean - self.mean, other.count / count
        if self.read is not None and other.read is not None:
            center, squares, products = self.read
            moved = other.read[0] - center
            squares.add_(other.read[1]).addr_(moved, moved, alpha=self.count * share)
            products.add_(other.read[2]).addr_(moved, shift, alpha=self.count * share)
            center.add_(moved, alpha=share)
        self.mean.add_(shift, alpha=share)
        self.count = count
        return self

    def fit(self, rank: int) -> Fit:
        """The best one with a map of this rank at most, equation (4); without `read`, the mean."""
        if self.read is None:
            return Fit(self.mean)
        center, squares, products = self.read
        covariance, crossed = squares / self.count, products / self.count
        variances = covariance.diagonal()
        ridge = torch.maximum(RIDGE * len(center) / self.count * variances.mean(), ROUNDING * variances.max())
        variances.add_(ridge.clamp(min=torch.finfo(ridge.dtype).tiny))
        # covariance = L L^T and Y = L^-1 crossed, so Y^T Y = S_za^T W, and W V = L^-T (Y V): a tenth of the work of
        # W and all eigenvectors
        factor = torch.linalg.cholesky(covariance)
        left, values, up = leading(torch.linalg.solve_triangular(factor, crossed, upper=False), rank)
        down = torch.linalg.solve_triangular(factor.T, left * values, upper=True).T
        # both factors learn at one rate, so they are of one size
        size = down.norm(dim=1).sqrt()
        down, up = down / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None], up * size
        constant = self.mean - up @ (down @ center)
        missing = rank - len(down)  # of a tower that is narrower than the rank
        return Fit(constant, (F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))))


def leading(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` largest singular values of a matrix, or all, with their vectors: `(m, r)`, `(r,)` and `(n, r)`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # all processes find the same; `torch.manual_seed` is of GPUs, too
        found = torch.svd_lowrank(matrix, min(2 * count, *matrix.shape), niter=8)
    return found[0][:, :count], found[1][:count], found[2][:, :count]


@torch.no_grad()
def initialize_eas_weights(
    model: nn.Module, dataloader: Iterable[dict[str, torch.Tensor]], adapter_name: str | None = None
) -> None:
    """Start the stand-ins of an adapter as near as they get to what each attention adds to the residual stream.

    A constant starts at the mean, a linear map at the least squares of its rank (equation (4) of docs/method.md).
    One pass without gradients through the base model, as a whole and in eval mode; over the tokens of all batches, in
    all processes, that are no padding and, in decoders, not the first of their sequence. Nothing else changes. An
    `EASCallback` does this when a training begins. For a map, sums of `d x d` numbers are kept for each attention, on
    the CPU, while it is measured.

    Args:
        model: What `get_peft_model(model, EASConfig(...))` returned, or a wrapper of it that can be called.
        dataloader: Batches `{input_ids, attention_mask, ...}` of the task: several thousand tokens in all, or, for
            constants alone, a thousand.
        adapter_name: Adapter; the active one by default.

    Raises:
        ValueError: for a model or adapter without stand-ins, while it is merged, without any tokens, for batches that
            the model does not take, and for values that are not finite; nothing is changed then.
    """
    tuner = eas_model(model)
    adapter_name = tuner.named(adapter_name)
    if not tuner.stand_ins(adapter_name):
        raise ValueError(
            f"Adapter {adapter_name!r} has no stand-ins: it skips nothing, or was made with `stand_in='zero'`."
        )
    if any(isinstance(module, EASLayer) and module.merged for module in tuner.modules()):
        raise ValueError("The adapter is merged: call `unmerge_adapter()` before its stand-ins are measured.")

    def forward(batch: dict[str, torch.Tensor]) -> None:
        with explaining():
            model(**arguments_of(batch, tuner.model))

    fill_stand_ins(tuner, adapter_name, tqdm(batches_of(dataloader), desc=MEASURING, unit="batch"), forward)


def fill_stand_ins(
    tuner: EASModel,
    adapter_name: str,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    enough: float = math.inf,
    is_adapted: bool = False,
) -> None:
    """Start the stand-ins of an adapter at what the attentions add in what `forward` computes of each batch; see
    `moments`. With nothing skipped: in the base model or, if `is_adapted`, in the one that the adapter makes of it."""
    config, stand_ins = tuner.peft_config[adapter_name], tuner.stand_ins(adapter_name)
    is_linear, all_layers = config.stand_in == "linear", find_layers(tuner.model)
    layers = {key: all_layers[key] for key in stand_ins}
    whole = tuner.skip_gates(adapter_name).skipping([]) if is_adapted else tuner.without_adapters()
    with whole, evaluating(tuner):
        found = moments(tuner.model, layers, batches, is_linear, forward, tuner, enough)
    for key in list(found):
        stand_in, fit = stand_ins[key], found.pop(key).fit(config.r_pia if is_linear else 0)
        down, up = fit.maps or (None, None)
        for name, value in (("constant", fit.constant), ("down", down), ("up", up)):
            if value is not None:
                fill(getattr(stand_in, name), value)
    for module in tuner.modules():
        if isinstance(module, EASAttention):
            module.measured.add(adapter_name)


def are_zero(stand_ins: Iterable[StandIn]) -> bool:
    """Whether the constants of all of these are zero, as they are before they are measured or trained."""
    constants = [stand_in.constant for stand_in in stand_ins if stand_in.constant is not None]
    return not any(bool(constant.any()) for constant in wholes(constants))


def moments(
    model: nn.Module,
    layers: Mapping[int | str, Place],
    batches: Iterable[Any],
    is_linear: bool,
    forward: Callable[[Any], Any] | None = None,
    caller: nn.Module | None = None,
    enough: float = math.inf,
) -> dict[int | str, Moments]:
    """What attentions of `model` read and add, over all processes.

    Args:
        model: The transformers model, in eval mode.
        layers: The attentions.
        batches: Batches.
        is_linear: Whether what is read is of interest, too.
        forward: What is done with each, if that isn't `model(**batch)`; it may run several forwards of `model`.
        caller: What calls `model.forward`, if that goes around the model's hooks.
        enough: After so many tokens for each number that one has, the batches that are left are not looked at.

    Raises:
        ValueError: without any tokens, and for values that are not finite.
    """
    forward = forward or (lambda batch: model(**arguments_of(batch, model)))
    found: dict[int | str, Moments] = {}

    def add(key: int | str, place: Place, before: torch.Tensor, added: torch.Tensor, read: torch.Tensor) -> None:
        kept = counted_tokens(seen, place.row, added.shape[:-1], added.device)
        a, z = (t[kept].to(torch.promote_types(t.dtype, torch.float32)) for t in (added, read))
        if not len(a):
            return
        new = Moments.of(a, z if is_linear else None)
        if key in found:
            found[key] += new
        else:
            found[key] = new

    def is_enough() -> bool:
        gathered = gather_object([{key: own.count / len(own.mean) for key, own in found.items()}])
        return all(sum(of.get(key, 0) for of in gathered) >= enough for key in layers)

    with arguments_seen(*dict.fromkeys([model, caller or model])) as seen, watching(model, layers, add):
        for batch in batches:
            forward(batch)
            if enough < math.inf and is_enough():
                break
    for key in layers:
        gathered = gather_object([found.pop(key, None)])  # one by one, as they may be large
        parts = [own for own in gathered if own is not None]
        if not parts:
            raise ValueError(f"The dataloader gave no tokens to measure the attention {key} with.")
        found[key] = functools.reduce(operator.iadd, parts)
    wrong = [key for key, of in found.items() if not all(map(_is_finite, (of.mean, *(of.read or ()))))]
    if wrong:
        raise ValueError(
            f"What the attentions {wrong} read or add is not finite: look for NaN in the model's weights or in the "
            "batches."
        )
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def watching(
    model: nn.Module,
    layers: Mapping[int | str, Place],
    see: Callable[[int | str, Place, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """Call `see(attention, place, before, added, read)` for each call of an attention in forwards inside of the `with`.

    `before (B, T, d)` is the residual stream, `added (B, T, d)` what the attention adds to it, and `read (B, T, d')`
    its input.
    """
    streams: dict[int | str, torch.Tensor] = {}
    inputs: dict[int | str, torch.Tensor] = {}

    def look(module: nn.Module, args: tuple, kwargs: dict, key: int | str) -> None:
        inputs[key] = args[0] if args else kwargs["hidden_states"]

    def remember(module: nn.Module, args: tuple, kwargs: dict, key: int | str) -> None:
        streams[key] = args[0] if args else kwargs["hidden_states"]

    def compare(module: nn.Module, args: tuple, output: Any, key: int | str) -> None:
        place, before = layers[key], streams.pop(key)
        output = output[0] if isinstance(output, tuple) else output
        see(key, place, before, output if place.row.convention == "plain" else output - before, inputs.pop(key))

    def before_norm(norm: nn.Module, args: tuple, key: int | str) -> None:
        see(key, layers[key], streams[key], args[0] - streams.pop(key), inputs.pop(key))

    with hooks() as handles:
        for key, place in layers.items():
            layer, row = model.get_submodule(place.layer), place.row
            attention = layer.get_submodule(row.attention)
            handles.append(attention.register_forward_pre_hook(functools.partial(look, key=key), with_kwargs=True))
            # where the residual stream is read: by the attention's own norm, by the layer, or by the attention
            names = dict(layer.named_modules())
            norms = [name for name in row.attention_norms if name in names]
            reader = layer.get_submodule(norms[0]) if norms else attention if row.context or row.core else layer
            handles.append(reader.register_forward_pre_hook(functools.partial(remember, key=key), with_kwargs=True))
            if row.residual_norm:
                norm = attention.get_submodule(row.residual_norm)
                handles.append(norm.register_forward_pre_hook(functools.partial(before_norm, key=key)))
                continue
            # a norm after the attention is part of what it adds
            behind = [name for name in row.output_norms if name in names]
            last = layer.get_submodule(behind[-1]) if behind else attention
            handles.append(last.register_forward_hook(functools.partial(compare, key=key)))
        yield


@contextmanager
def replaced(model: nn.Module, place: Place, stand_in: torch.Tensor) -> Iterator[None]:
    """Forwards inside of the `with` have `stand_in (d,)` where this attention is."""
    layer, row = model.get_submodule(place.layer), place.row
    attention = layer.get_submodule(row.attention)
    convention = BY_NAME[row.convention](row, getattr(attention, "base_layer", attention))

    def constant(output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output) + stand_in.to(output)

    def instead(attention: nn.Module, args: tuple, kwargs: dict, output: Any) -> torch.Tensor | tuple:
        added = constant(output[0] if isinstance(output, tuple) else output)
        return convention.returned(attention, added, args, kwargs)

    names = dict(layer.named_modules())
    behind = [name for name in row.output_norms if name in names]
    with hooks() as handles:
        if behind:
            last = layer.get_submodule(behind[-1])
            handles.append(last.register_forward_hook(lambda module, args, output: constant(output)))
        else:
            handles.append(attention.register_forward_hook(instead, with_kwargs=True))
        yield


def eas_model(model: nn.Module) -> EASModel:
    """The EAS tuner in `model`.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, EASModel):
            return module
    raise ValueError(
        f"This needs a model with an EAS adapter, and got a {type(model).__name__} without one: make it with "
        "`get_peft_model(model, EASConfig(...))`."
    )
