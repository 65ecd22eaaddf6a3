"""What is loaded into an adapter: which attentions it skips, and whether all that this needs is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from .families import Layers
from .layer import EASLayer

Entries = dict[str, torch.Tensor]
"""Entries of an adapter's state dict by their names in the base model, such as `model.layers.0.mlp.eas_down`."""


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


def place_of(wrapper: EASLayer) -> str:
    """The name in the base model of an attention or a FFN."""
    return wrapper.name if wrapper.is_ffn else wrapper.arm.attention


def entries_of(state_dict: Mapping[str, torch.Tensor], adapter_name: str, *prefixes: str) -> Entries:
    """The entries of an adapter; keys may begin with these prefixes, and end with the adapter's name."""
    entries = {}
    for key, value in state_dict.items():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        entries[key.removesuffix(f".{adapter_name}")] = value
    return entries


def skipped_in(entries: Entries, layers: Layers, wrappers: list[EASLayer], adapter_name: str) -> list[int | str]:
    """The attentions that are skipped by what is loaded; gates that it lacks are those that the adapter has.

    Raises:
        ValueError: if the adapter was made with another set, or has none yet and some gates are lacking.
    """
    config = wrappers[0].eas_config[adapter_name]
    gates = {w.arm.attention: w.gates[adapter_name] for w in wrappers if not w.is_ffn}
    lacking = [f"{place}.eas_skip" for place in gates if f"{place}.eas_skip" not in entries]
    if config.skip_layers is None and 0 < len(lacking) < len(gates):
        raise ValueError(
            f"Which attentions adapter {adapter_name!r} skips can't be told: {_some(lacking)} are missing from what is "
            "loaded. Save it again, as a whole, or load it with the set in `EASConfig(skip_layers=[...])`."
        )
    skipped = [
        key
        for key, arm in layers.items()
        if bool(entries.get(f"{arm.attention}.eas_skip", gates.get(arm.attention, False)))
    ]
    if config.is_set_given and skipped != config.skip_layers:
        raise ValueError(
            f"What is loaded skips the attentions {skipped}, but adapter {adapter_name!r} was made with `skip_layers="
            f"{config.skip_layers}`: it is the state of another adapter. Load it into one of its own set, "
            f"`EASConfig(skip_layers={skipped})`, or call `model.set_skip_layers({skipped})` before."
        )
    return skipped


def check_parameters(entries: Entries, wrappers: list[EASLayer], skipped: Collection[str], adapter_name: str) -> None:
    """Refuse what has other parameters than a forward uses if attentions of these names are skipped.

    Raises:
        ValueError: which names the first of them. What such a forward does not look at may be there or not.
    """
    lacking: list[str] = []
    unknown: list[str] = []
    for wrapper in wrappers:
        place = place_of(wrapper)
        with torch.device("meta"):
            made = wrapper.initial(wrapper.eas_config[adapter_name])
        for name in wrapper.names(place in skipped):
            if (name in made) != (f"{place}.{name}" in entries):
                (lacking if name in made else unknown).append(f"{place}.{name}")
    if lacking or unknown:
        found = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has {_some(unknown)}"] * bool(unknown)
        raise ValueError(
            f"What is loaded into adapter {adapter_name!r} {' and '.join(found)}: this is not what its configuration "
            "and the set of skipped attentions need. Save the adapter again, as a whole "
            "(`model.save_pretrained(folder)`, or `get_peft_model_state_dict(model)`), or load it with the "
            "configuration that it was saved with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
