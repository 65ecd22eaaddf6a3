"""Tensors that are not there yet: they have a shape and a dtype, and are read, or computed, when their values are
wanted, and only then.

A model of such tensors is loaded, adapted and merged by the code that does so with any other, and takes no memory:
what would have computed its weights is kept, and done one by one when they are written (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from . import pia

_WHOLE: tuple[Any, ...] = (pia.fold,)
"""Functions that are kept as one step, as they are careful with memory."""

_aten = torch.ops.aten
_FACTORIES = (
    *(_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like),
    *(_aten.new_empty, _aten.new_empty_strided, _aten.new_zeros, _aten.new_ones, _aten.new_full),
)
"""What makes a tensor like another one, whose values it does not look at."""


@dataclass(frozen=True)
class Recipe:
    """How to come by the values of a tensor.

    Attributes:
        like: One of its shape, strides and dtype, on the meta device.
        function: Gives the values.
        args: Its arguments; tensors, or recipes of some.
        kwargs: Likewise.
        part: Which one, if it gives several.
    """

    like: torch.Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    part: int | None = None

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The values. Nothing is kept of them here."""
        args, kwargs = tree_map_only(Recipe, Recipe.read, (self.args, dict(self.kwargs)))
        values = self.function(*args, **kwargs)
        return values if self.part is None else values[self.part]

    def sources(self) -> Iterator[Recipe | torch.Tensor]:
        """What the values come from: tensors that are there, and recipes that need none."""
        given = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, (Recipe, torch.Tensor))]
        if not given:
            yield self
        for source in given:
            yield from source.sources() if isinstance(source, Recipe) else (source,)

    def peak(self) -> int:
        """How many bytes there are at most while it is read, its own included."""
        inputs = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Recipe)]
        sizes = [recipe.like.nbytes for recipe in inputs]
        extra = pia.workspace(self.args[0].like) if self.function is pia.fold else 0
        return max(sum(sizes) + self.like.nbytes + extra, *(sum(sizes[:n]) + r.peak() for n, r in enumerate(inputs)), 0)


@dataclass
class _Cell:
    """What is changed in place is so for all tensors that are names of the same."""

    recipe: Recipe
    is_aliased: bool = False
    """Whether it is a view of another one, or another one is a view of it."""


class Unread(torch.Tensor):
    """A tensor with a recipe in place of values.

    What is computed from it is another one, and what makes it anew in place gives it another recipe. What looks at
    values is refused, and so is what changes a view or what has one.
    """

    cell: _Cell

    @staticmethod
    def __new__(cls, cell: _Cell | Recipe) -> Unread:
        cell = cell if isinstance(cell, _Cell) else _Cell(cell)
        like = cell.recipe.like
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.cell = cell
        return made

    def __init__(self, cell: _Cell | Recipe) -> None:
        pass

    @property
    def recipe(self) -> Recipe:
        return self.cell.recipe

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has no types
        return f"Unread({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:
            return _later(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():  # results are of the kind that they are, see below
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the one that is none
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if func in (_aten.detach.default, _aten.alias.default):  # another name for the same
            return Unread(first.cell)
        if func.overloadpacket in _FACTORIES:
            return func(first.recipe.like, *args[1:], **kwargs | {"device": torch.device("cpu")})
        if func is _aten._local_scalar_dense.default:
            raise NotImplementedError("the value of a tensor that is not read yet")
        is_view = any(result.alias_info for result in func._schema.returns)
        if not func._schema.is_mutable:
            made = _later(func, args, kwargs)
            if is_view:
                for tensor in tree_leaves((first, made)):
                    tensor.cell.is_aliased = True
            return made
        if not isinstance(first, Unread) or first.cell.is_aliased:
            raise NotImplementedError(f"{func} of a tensor that is not read yet")
        changed = _later(lambda values, *rest, **named: func(values.clone(), *rest, **named), args, kwargs)
        first.cell.recipe = changed.recipe
        return first


def _later(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `function` gives, unread."""
    on_meta = tree_map_only(torch.Tensor, meta_of, (tuple(args), dict(kwargs)))
    on_meta = tree_map_only(torch.device, lambda _: torch.device("meta"), on_meta)
    given: Any = tree_map_only(Unread, lambda tensor: tensor.recipe, (tuple(args), dict(kwargs)))
    like = function(*on_meta[0], **on_meta[1])
    if isinstance(like, torch.Tensor):
        return Unread(Recipe(like, function, *given))
    made = (
        None if one is None else Unread(Recipe(one, function, given[0], given[1], part))
        for part, one in enumerate(like)
    )
    return type(like)(made)


def meta_of(tensor: torch.Tensor) -> torch.Tensor:
    """One of its shape, strides and dtype, on the meta device."""
    return tensor.recipe.like if isinstance(tensor, Unread) else torch.empty_like(tensor, device="meta")
