"""Finding the attentions of a model by the row of its family."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..runtime.eas_structure import has_module, outermost
from .spec import Attentions, Family
from .table import FAMILIES


@dataclass(frozen=True)
class Place:
    """One attention of a model that can be skipped, or adapted.

    Attributes:
        row: How attentions of its kind are built.
        index: Index of its layer.
        container: Name in the model of the list of layers.
        depth: How deep in its list the layer is, in [0, 1).
        is_skippable: Whether it can be skipped, or only adapted, because others need something of it.
        has_ffn: Whether a FFN follows it.
    """

    row: Attentions
    index: int
    container: str
    depth: float
    is_skippable: bool = True
    has_ffn: bool = True

    @property
    def name(self) -> str:
        """Such as `"decoder.3.self"`."""
        return f"{self.row.stack}.{self.index}.{self.row.kind}"

    @property
    def layer(self) -> str:
        """Name of the layer in the model."""
        return f"{self.container}.{self.index}"

    @property
    def attention(self) -> str:
        """Name of the attention in the model."""
        return f"{self.layer}.{self.row.attention}"

    @property
    def ffns(self) -> list[str]:
        """Name in the model of the FFN that follows, if one does; of both for an attention that looks both ways."""
        return [f"{self.container}.{name}" for name in self.ffns_in_list]

    @property
    def ffns_in_list(self) -> list[str]:
        """The same, as they are called in the list of layers."""
        names = (self.row.ffn, self.row.ffn_back) if self.has_ffn else ()
        return [f"{self.index + self.row.ffn_after}.{name}" for name in names if name]


class Layers(dict[int | str, Place]):
    """The attentions of one model by what they are called: the index of the layer if that says which is meant (one
    attention a layer, one list of layers), the name (`"encoder.3.self"`) otherwise.

    Attributes:
        family: The row of the model, or of its decoder.
        decoder: What the model calls its decoder, `""` if it is one itself.
        containers: Name in the model of each list of layers, by the name that the row has for it.
        by_name: Whether it takes names to say which attention is meant.
    """

    def __init__(self, family: Family, decoder: str, containers: dict[str, str], places: list[Place]) -> None:
        indices = [place.index for place in places]
        self.by_name = len(set(indices)) < len(indices)
        super().__init__({place.name if self.by_name else place.index: place for place in places})
        self.family = family
        self.decoder = decoder
        self.containers = containers
        self._keys = {place.name: key for key, place in self.items()}

    def key_of(self, place: Place) -> int | str:
        """What an attention is called here."""
        return self._keys[place.name]

    def resolve(self, given: Iterable[int | str]) -> list[int | str]:
        """The attentions that are meant, in the model's order, by indices of layers or by names.

        Raises:
            ValueError: for one that there is not, or an index where it takes a name.
        """
        given = list(given)
        wrong = [item for item in given if item not in self and item not in self._keys]
        if wrong:
            names = list(self._keys)
            also = "" if names == list(self) else f", also called {names[0]!r} to {names[-1]!r}"
            raise ValueError(f"`skip_layers` names {wrong}, but the attentions of this model are {list(self)}{also}.")
        meant = {self._keys.get(str(item), item) for item in given}
        return [key for key in self if key in meant]


def find_layers(model: nn.Module) -> Layers:
    """Find the attentions of `model` by the row of its family.

    Raises:
        ValueError: if no row fits the model, with the families that are known and what to do; if its FFNs get their
            input in chunks.
    """
    row = family = _row(model)
    name, decoder = "", model
    if row.decoder is not None:
        name, decoder = outermost(model, row.decoder)
        family = _row(decoder)
    # it may be one of several towers; one that is alone and should have an encoder is something else
    present = [kind for kind in family.attentions if len(family.attentions) == 1 or has_module(decoder, kind.layers)]
    kinds = family.attentions if row.decoder is None else present
    has_encoder = any(not kind.causal and not kind.context for kind in kinds)
    if has_encoder and getattr(decoder.config, "is_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has `is_decoder=True`, but EAS knows models of type {family.model_type!r} only as "
            "encoders or with one."
        )
    containers: dict[str, str] = {}
    places = []
    for attentions in present:
        inner, found = outermost(decoder, attentions.layers)
        layers = cast(nn.ModuleList, found)
        container = containers[attentions.layers] = f"{name}.{inner}".strip(".")
        is_needed = attentions.keeps_first
        seen: set[int] = set()
        there = filter(None, (_get(layer, attentions.attention) for layer in layers))
        times = Counter(parameter for attention in there for parameter in _own(attention))
        for index, layer in enumerate(layers):
            attention = _get(layer, attentions.attention)
            if attention is None or (attentions.has and not hasattr(attention, attentions.has)):
                continue
            if attentions.keeps_if:
                is_needed = is_needed or getattr(attention, attentions.keeps_if)
            if not attentions.attention_inputs:
                own = set(_own(attention))
                is_needed = is_needed or (not own <= seen and max(map(times.__getitem__, own)) > 1)
                seen |= own
            has_ffn = _is_ffn(attentions, layers[index + attentions.ffn_after :][:1])
            places.append(Place(attentions, index, container, index / len(layers), has_ffn and not is_needed, has_ffn))
            is_needed = False
    if not places:
        raise ValueError(f"{type(model).__name__} has none of the layers that the row of {family.model_type!r} names.")
    return Layers(family, row.decoder or "", containers, places)


def _is_ffn(row: Attentions, layers: Iterable[nn.Module]) -> bool:
    """Whether there is a layer, and it holds a FFN of the row, with or without adapters."""
    names = [name.partition("*")[0] for given in row.ffn_inputs for name in given.split("|")]
    return any(_get(layer, f"{row.ffn}.{name}".rstrip(".")) is not None for layer in layers for name in names)


def _own(attention: nn.Module) -> list[int]:
    """The ids of an attention's parameters, without those of adapters."""
    return [id(parameter) for parameter in getattr(attention, "base_layer", attention).parameters()]


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _row(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if hasattr(config, "eas"):
        raise ValueError(
            f"{type(model).__name__} was merged by peft_eas already, and can't get EAS again: use the base model, or "
            "train another adapter, such as LoRA, on the merged one."
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(unknown(model))


def unknown(model: nn.Module) -> str:
    """What to say of a model whose type has no row."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=3, cutoff=0)
    return (
        f"EAS does not know how models of type {model_type!r} ({type(model).__name__}) are built; the nearest that it "
        f"knows are {', '.join(map(repr, nearest))} (all: docs/supported-models.md). To add it: `peft-eas "
        "inspect-family MODEL` proposes a row, and `peft_eas.register_family(...)` puts it into the table, see "
        "docs/usage.md#families."
    )
