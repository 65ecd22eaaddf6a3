"""What is loaded into an adapter: which attentions it skips, and whether all that this needs is there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from .families import Layers
from .site import EASLayer

Entries = dict[str, torch.Tensor]
"""Entries of an adapter's state dict by their names in the base model: `model.layers.0.mlp.eas_adapter.down`."""


def wrappers_of(model: nn.Module, adapter_name: str) -> list[EASLayer]:
    """The attentions and FFNs that have an adapter of this name.

    Raises:
        ValueError: if there are none.
    """
    wrappers = [m for m in model.modules() if isinstance(m, EASLayer) and adapter_name in m.eas_config]
    if not wrappers:
        raise ValueError(
            f"Adapter {adapter_name!r} is no longer in this model, which was merged or unloaded: there is nothing to "
            "save, or to load into. What `merge_and_unload()` or `unload()` returned is a transformers model (here: "
            "`model.get_base_model()`). Save that one, by its own `save_pretrained`."
        )
    return wrappers


def name_of(wrapper: EASLayer) -> str:
    """The name in the base model of an attention or a FFN."""
    return wrapper.name if wrapper.is_ffn else wrapper.place.attention


def entries_of(state_dict: Mapping[str, torch.Tensor], adapter_name: str, *prefixes: str) -> Entries:
    """The entries of an adapter; keys may begin with these prefixes, and have the adapter's name in them."""
    named, entries = re.compile(rf"(\.eas_\w+)\.{re.escape(adapter_name)}(?=\.|$)"), {}
    for key, value in state_dict.items():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        entries[named.sub(r"\1", key)] = value
    return entries


def skipped_in(entries: Entries, layers: Layers, wrappers: list[EASLayer], adapter_name: str) -> list[int | str]:
    """The attentions that are skipped by what is loaded; gates that it lacks are those that the adapter has.

    Raises:
        ValueError: if the adapter was made with another set, or has none yet and some gates are lacking.
    """
    config = wrappers[0].eas_config[adapter_name]
    gates = {w.place.attention: w.gates[adapter_name] for w in wrappers if not w.is_ffn}
    lacking = [f"{name}.eas_skip" for name in gates if f"{name}.eas_skip" not in entries]
    if config.skip_layers is None and 0 < len(lacking) < len(gates):
        raise ValueError(
            f"Which attentions adapter {adapter_name!r} skips can't be told: {_some(lacking)} are missing from the "
            "state dict. Save it again, as a whole, or load it with the set in `EASConfig(skip_layers=[...])`."
        )
    skipped = [
        key
        for key, place in layers.items()
        if bool(entries.get(f"{place.attention}.eas_skip", gates.get(place.attention, False)))
    ]
    if config.is_set_given and skipped != config.skip_layers:
        raise ValueError(
            f"The state dict skips the attentions {skipped}, but adapter {adapter_name!r} was made with `skip_layers="
            f"{config.skip_layers}`: it is the state of another adapter. Load it into one of its own set, "
            f"`EASConfig(skip_layers={skipped})`, or call `model.set_skip_layers({skipped})` before."
        )
    return skipped


def check_form(names: Iterable[str]) -> None:
    """Refuse parameters of the form that older versions gave adapters.

    Raises:
        ValueError: with what to do.
    """
    if any(re.search(r"\.eas_(B|up)\b", name) for name in names):
        raise ValueError(
            "This adapter was trained with an older peft_eas, whose adapters had another form. Ways out: merge it with "
            "the version that it was trained with, or train it anew."
        )


def check_parameters(entries: Entries, wrappers: list[EASLayer], skipped: Collection[str], adapter_name: str) -> None:
    """Refuse what has other parameters than a forward uses if attentions of these names are skipped.

    Raises:
        ValueError: which names the first of them. What such a forward does not look at may be there or not.
    """
    lacking: list[str] = []
    unknown: list[str] = []
    for wrapper in wrappers:
        name, config = name_of(wrapper), wrapper.eas_config[adapter_name]
        for part in wrapper.needed(name in skipped):
            with torch.device("meta"):
                made = wrapper.make(part, config)
            wanted = [] if made is None else [f"{name}.{part}.{key}" for key in made.state_dict()]
            lacking += [key for key in wanted if key not in entries]
            unknown += [key for key in entries if key.startswith(f"{name}.{part}.") and key not in wanted]
    if lacking or unknown:
        found = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has {_some(unknown)}"] * bool(unknown)
        raise ValueError(
            f"The state dict for adapter {adapter_name!r} {' and '.join(found)}: this is not what its configuration "
            "and the set of skipped attentions need. Save the adapter again, as a whole "
            "(`model.save_pretrained(folder)`, or `get_peft_model_state_dict(model)`), or load it with the "
            "configuration that it was saved with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
