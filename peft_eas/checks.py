"""Whether what a user or a file gives is of the kind that it has to be; errors say what is allowed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

LARGEST = 2**16
"""No model has as many layers, or streams as wide; what is larger would only ask for memory."""

LENGTH = 80
"""At most how many characters of a wrong value an error repeats."""


def plain(value: Any) -> Any:
    """A number of NumPy, or an array or tensor without axes, as Python has it, which JSON can hold; else the same."""
    has_item = isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0
    if not has_item or getattr(value, "is_meta", False):
        return value
    return value.item() if isinstance(value.item(), (bool, int, float, str)) else value


def shown(value: Any) -> str:
    """A value for an error: one line, not too long, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or somebody's own `__repr__`
        return f"a {type(value).__name__}"
    return one_line(text if len(text) <= LENGTH else f"{text[:LENGTH]}...")


def one_line(text: object) -> str:
    """Text of a file, fit for a terminal: nothing in it starts a line, or is a command to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def refused(name: str, value: Any, allowed: str) -> ValueError:
    """The error for a wrong value."""
    return ValueError(f"`{name}` must be {allowed}, got {shown(value)}.")


def integer(name: str, value: Any, low: int, high: int = LARGEST) -> int:
    """An integer from `low` to `high`."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
        raise refused(name, value, f"an integer from {low} to {high}")
    return found


def number(name: str, value: Any, accepts: Callable[[float], bool], allowed: str) -> float:
    """A finite number that `accepts` accepts."""
    found = plain(value)
    try:
        is_right = not isinstance(found, bool) and isinstance(found, (int, float)) and math.isfinite(found)
    except OverflowError:  # an integer beyond all floats
        is_right = False
    if not is_right or not accepts(float(found)):
        raise refused(name, value, allowed)
    return found


def flag(name: str, value: Any) -> bool:
    """True or False."""
    found = plain(value)
    if not isinstance(found, bool):
        raise refused(name, value, "True or False")
    return found


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of some words."""
    found = plain(value)
    if not isinstance(found, str) or found not in list(allowed):
        raise refused(name, value, f"one of {', '.join(map(repr, allowed))}")
    return found


def attentions(name: str, value: Any, or_names: bool = True) -> list[int | str]:
    """Distinct indices of layers, sorted, and behind them distinct names of attentions."""
    wrong = refused(name, value, "a list of distinct layer indices (0 or more)" + " or names of attentions" * or_names)
    found = [plain(item) for item in listed(value, wrong)]
    indices = [i for i in found if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < LARGEST]
    names = [i for i in found if isinstance(i, str) and or_names]
    if len(indices) + len(names) < len(found) or len(set(found)) < len(found):
        raise wrong
    return sorted(indices) + names


def modules(name: str, value: Any) -> list[str]:
    """Names of modules."""
    wrong = refused(name, value, "a list of names of modules")
    found = [plain(item) for item in listed(value, wrong)]
    if not all(isinstance(item, str) and re.fullmatch(r"[\w.-]+", item) for item in found):
        raise wrong
    return found


def modules_or_pattern(name: str, value: Any) -> set[str] | str:
    """Names of modules, or one regular expression for them."""
    value = plain(value)
    if not isinstance(value, str):
        return set(modules(name, value))
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise refused(name, value, f"a list of names of modules, or a regular expression ({error})") from None
    return value


def listed(value: Any, wrong: ValueError) -> list[Any]:
    """The items of a list, set, array or anything else that has some and an end."""
    value = plain(value)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wrong
    try:
        found = list(itertools.islice(value, LARGEST + 1))
    except TypeError:  # a tensor without values, for one
        raise wrong from None
    if len(found) > LARGEST:
        raise wrong
    return found
