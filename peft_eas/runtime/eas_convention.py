"""How attentions are called and what they return: three conventions, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .eas_record import CONVENTIONS, Form


def hidden_states_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """The first argument of an attention or a FFN, given by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


def change_input(args: tuple, kwargs: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments of a module with its `hidden_states` changed, wherever they are given (some attentions take their
    queries and keys as two arguments)."""
    given = hidden_states_of(args, kwargs)
    changed = change(given)
    if not kwargs and len(args) == 1:  # as FFNs are called
        return (changed,), kwargs
    args = tuple(changed if value is given else value for value in args)
    return args, {name: changed if value is given else value for name, value in kwargs.items()}


class Convention:
    """The attention returns what it adds to the stream: `"plain"`.

    Args:
        form: How such attentions are built and called.
        attention: One of them, for the names of its arguments.
    """

    def __init__(self, form: Form, attention: nn.Module) -> None:
        parameters = inspect.signature(type(attention).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
        self.form = form

    def argument(self, name: str, args: tuple, kwargs: dict) -> Any:
        """An argument of the attention, given by position or by name; `None` if it is not given."""
        if name in kwargs:
            return kwargs[name]
        where = self.names.index(name) if name in self.names else len(args)
        return args[where] if where < len(args) else None

    def stream(self, attention: nn.Module, added: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """The attention's output when it adds `added`, of the shape `(B, T, d)` or one like it, to the stream."""
        return added

    def returned(self, attention: nn.Module, added: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | tuple:
        """All that it returns then."""
        stream = self.stream(attention, added, args, kwargs)
        if self.form.returns is None:
            return stream
        return stream, *(self.argument(name, args, kwargs) if name else None for name in self.form.returns)


class AddsInput(Convention):
    """It adds its own input, and normalises the sum if it has a norm for that (BERT): `"adds_input"`."""

    def stream(self, attention: nn.Module, added: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        total = hidden_states_of(args, kwargs) + added
        return attention.get_submodule(self.form.residual_norm)(total) if self.form.residual_norm else total


class AddsResidual(Convention):
    """It adds the stream, which it gets as its second argument (BLOOM): `"adds_residual"`."""

    def stream(self, attention: nn.Module, added: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        return args[1] + added


BY_NAME = dict(zip(CONVENTIONS, (Convention, AddsInput, AddsResidual), strict=True))
