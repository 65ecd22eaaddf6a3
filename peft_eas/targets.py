"""Which attentions and FFNs of a model get adapters, and which attentions can be skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from . import checks
from .config import EASConfig
from .families import Layers, Place
from .readers import readers_of
from .site import EASLayer


class Targets:
    """The modules of a model that adapters can stand in front of.

    Args:
        layers: The attentions of the model.

    Attributes:
        layers: Likewise.
        places: The attention that a module is, or those that the FFN follows, by the module's name in the model.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.places: dict[str, list[Place]] = {place.attention: [place] for place in layers.values()}
        for place in layers.values():
            for ffn in place.ffns:
                self.places.setdefault(ffn, []).append(place)

    def has(self, config: EASConfig, name: str) -> Any:
        """Whether a module gets an adapter of this configuration; true, or what PEFT says instead."""
        if name not in self.places:
            return False
        layers = config.layers_to_transform
        index = self.places[name][0].index
        if layers not in (None, []) and index not in ([layers] if isinstance(layers, int) else layers):
            return False
        # PEFT reads the index off the name, and finds none in those of a bare decoder, such as "layers.0.mlp".
        config = copy.copy(config)
        config.layers_to_transform = None
        return check_target_module_exists(config, name)

    def fit(self, config: EASConfig, model: nn.Module) -> None:
        """Give a configuration the defaults that depend on the model, and refuse one that does not fit it.

        Raises:
            ValueError: says which setting it is.
        """
        if config.target_modules is None:
            rows = self.layers.family.attentions
            names = {name for row in rows for name in (row.attention, row.ffn, row.ffn_back)}
            config.target_modules = names - {""}  # type: ignore[assignment]  # PEFT takes sets, too
        targeted = {name for name in self.places if self.has(config, name)}
        if not targeted and isinstance(config.target_modules, set):
            raise ValueError(
                f"EAS adapts whole attentions and FFNs, but `target_modules`={sorted(config.target_modules)} with "
                f"`exclude_modules` and `layers_to_transform` leaves none of them, such as "
                f"{next(iter(self.places))!r}. Leave it out to adapt all."
            )
        widths = []
        for name in filter(targeted.__contains__, self.places):
            place = self.places[name][0]
            _, width = readers_of(unwrapped(model, name), place, is_ffn=name != place.attention)
            if width % config.groups:
                raise ValueError(f"`groups`={config.groups} does not divide the model's hidden size {width}.")
            widths.append(width)
        if widths and max(config.r, config.r_pia) > max(widths):
            raise ValueError(
                f"`r`={config.r} and `r_pia`={config.r_pia} must be at most the model's hidden size, {max(widths)}."
            )
        skippable = self.skippable(config)
        if config.skip_layers is not None:
            config.skip_layers = self.resolve(config.skip_layers, skippable)
        elif not skippable and config.num_skip != 0:
            raise ValueError(
                "No attention can be skipped: `target_modules`, `exclude_modules`, `layers_to_transform` and "
                "`modules_to_save` leave none that has an adapter together with its FFN. Let them leave some, or say "
                "`num_skip=0`."
            )
        config.is_set_given = config.skip_layers is not None
        count = config.count_to_skip(len(skippable))
        if count > len(skippable):
            raise ValueError(f"`num_skip`={count} is more than the {len(skippable)} attentions that can be skipped.")
        self._check_some_left(count)

    def skippable(self, config: EASConfig) -> list[int | str]:
        """The attentions that a configuration that has been fitted can skip."""
        targeted = {name for name in self.places if self.has(config, name)}
        return [key for key, p in self.layers.items() if p.is_skippable and {p.attention, *p.ffns} <= targeted]

    def resolve(self, skip_layers: Iterable[int | str], skippable: list[int | str]) -> list[int | str]:
        """The attentions that are meant by indices or names, in the model's order.

        Raises:
            ValueError: for one that is not there or can't be skipped, and for all that there are.
        """
        keys = self.layers.resolve(checks.attentions("skip_layers", skip_layers))
        wrong = [key for key in keys if key not in skippable]
        if wrong:
            raise ValueError(
                f"`skip_layers` names {wrong}, but the attentions that can be skipped (that have adapters, with their "
                f"FFN, and that no other layer needs) are {skippable}."
            )
        self._check_some_left(len(keys))
        return keys

    def _check_some_left(self, num_skip: int) -> None:
        # without any attention, tokens know nothing of each other, and a KV cache can't tell how long it is
        if num_skip == len(self.layers):
            raise ValueError(f"All {num_skip} attentions of the model would be skipped: keep at least one.")


def unwrapped(model: nn.Module, name: str) -> nn.Module:
    """A module of `model` as it is without adapters."""
    module = model.get_submodule(name)
    return module.base_layer if isinstance(module, EASLayer) else module


def stream_size(model: nn.Module, place: Place) -> int:
    """Size of the residual stream that an attention adds to, which is what the FFN behind it reads; 0 if it is never
    skipped."""
    return readers_of(unwrapped(model, place.ffns[0]), place, is_ffn=True)[1] if place.is_skippable else 0


def context_size(model: nn.Module, place: Place) -> int | None:
    """Size of the tokens that a cross-attention looks at; `None` where these are those of the residual stream."""
    if not place.row.context:
        return None
    linear: Any = model.get_submodule(f"{place.attention}.{place.row.context_inputs[0]}")
    return linear.in_features


def output_norms(model: nn.Module, place: Place) -> list[nn.Module]:
    """The norms that an attention's output goes through."""
    modules = dict(model.get_submodule(place.layer).named_modules())
    return [modules[name] for name in place.row.output_norms if name in modules]
