"""From a model with adapters to a transformers model: what is left once the adapters are folded in."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from . import modeling_eas
from .config import EASConfig
from .families import Layers
from .layer import EASAttention, Wrappers


@dataclass
class MergePlan:
    """What has to be known of the adapters after they are gone.

    Attributes:
        eas: The record `config.eas` of the merged model.
        containers: Name in the model of each list of layers, in the order of `eas["attentions"]`.
        shifts: For each of these, by name in the list, what is added to the input of attentions and FFNs, `(d,)`.
        left: What stands where an attention is skipped: parameters of a `SkippedAttention`, by the attention's name in
            the model.
    """

    eas: dict
    containers: list[str]
    shifts: list[dict[str, torch.Tensor]]
    left: dict[str, dict[str, torch.Tensor]]


def plan_merge(model: PreTrainedModel, layers: Layers, wrappers: Wrappers, config: EASConfig, name: str) -> MergePlan:
    """Work out what the merged model will look like, before anything is changed.

    Args:
        model: The base model with adapters in it.
        layers: Its attentions.
        wrappers: Each wrapped attention and the FFNs behind it.
        config: Configuration of the adapter to be merged.
        name: Its name.
    """
    skipped = [key for key, (attention, _) in wrappers.items() if attention is not None and attention.gates.get(name)]
    if config.skip_layers is None and not skipped:
        warnings.warn(
            "No attention is skipped, since no set has been chosen: train with an `EASCallback`, or name one with "
            "`EASConfig(skip_layers=...)` or `model.set_skip_layers(...)`.",
            stacklevel=2,
        )
    forms, containers, shifts, left = [], [], [], {}
    for row in layers.family.attentions:
        if row.layers not in layers.containers:
            continue
        form = row.form() | {
            "present": [arm.index for arm in layers.values() if arm.row == row],
            "norms": list(row.attention_norms),
            "output_norms": list(row.output_norms),
            "skip": [],
            "left": [],
            "biased": [],
        }
        shifted = {}
        for key, arm in layers.items():
            if arm.row != row:
                continue
            attention, ffns = wrappers[key]
            inside = f"{arm.index}.{row.attention}"
            in_list = [ffn.name.removeprefix(f"{arm.container}.") for ffn in ffns]
            places = list(zip(ffns, in_list, in_list, strict=True))
            if key in skipped:
                form["skip"].append(arm.index)
                sizes, left[arm.attention] = _left(attention, name)
                form["left"].append(sizes)
            else:
                places.append((attention, inside, f"{inside}.{row.core}".rstrip(".")))
            for wrapper, inside, where in places:
                if wrapper is None or arm != wrapper.arm or not wrapper.acts(name):  # a FFN may follow several
                    continue
                if wrapper.is_shifted(name):
                    shifted[where] = wrapper.input_shift(name)
                elif config.use_bias:
                    form["biased"] += [f"{inside}.{linear}".rstrip(".") for linear in wrapper.without_bias()]
        form["shifted"] = {where: len(shift) for where, shift in shifted.items()}
        forms.append(form)
        containers.append(layers.containers[row.layers])
        shifts.append(shifted)
    eas = {
        "format": modeling_eas.FORMAT,
        "model_type": type(model).config_class.model_type,
        "decoder": layers.decoder or None,
        "attentions": forms,
        "by_name": layers.by_name,
        "config": config.record(),
    }
    return MergePlan(eas, containers, shifts, left)


def _left(attention: EASAttention, name: str) -> tuple[dict[str, int | bool], dict[str, torch.Tensor]]:
    """The sizes and the parameters of the `SkippedAttention` in this one's place."""
    device, dtype = attention._get_base_layer_device_and_dtype(attention.base_layer)
    constant, down, up = attention.left(name)
    parameters = {
        key: value for key, value in (("stand_in", constant), ("down", down), ("up", up)) if value is not None
    }
    sizes = {
        "width": attention.stream_size,
        "constant": constant is not None,
        "rank": 0 if down is None else len(down),
        "pooled": 0 if down is None else down.shape[1],
    }
    return sizes, {key: value.detach().to(device, dtype, copy=True) for key, value in parameters.items()}


def finish_merge(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """Strip the skipped attentions from `model`, whose adapters are folded in, and let it say what it is."""
    forms = plan.eas["attentions"]
    if not any(form["skip"] or form["biased"] or form["shifted"] for form in forms):
        return model
    for form, container, shifts in zip(forms, plan.containers, plan.shifts, strict=True):
        layers = model.get_submodule(container)
        modeling_eas.strip_attentions(layers, form)
        for where, shift in shifts.items():
            modeling_eas.shift_input(layers, where, shift)
    for attention, parameters in plan.left.items():
        for key, value in parameters.items():
            setattr(model.get_submodule(attention), key, torch.nn.Parameter(value, requires_grad=False))
    modeling_eas.forget_ties(model)
    _change_config(model, plan.eas)
    config_class = type(model.config)
    modeling_eas.register_models(config_class)
    model.__class__ = modeling_eas.eas_class(type(model))
    return model


def _change_config(model: PreTrainedModel, eas: dict) -> None:
    """Give `model` a configuration of its own kind; the one it came with may be another model's, too.

    It is over the one that the model's class belongs to: InternLM 3 is a Llama with a configuration of another name.
    """
    old = model.config
    new = copy.deepcopy(old)
    new.__class__ = modeling_eas.eas_class(type(model).config_class)
    new.model_type = type(new).model_type  # one that was read from a file has it in the instance, too
    new.eas = eas
    text, skip = new.get_text_config(decoder=True), modeling_eas.skipped(eas)
    is_decoder = not eas["by_name"] and eas["attentions"][0]["causal"]
    if skip and is_decoder and not getattr(text, "is_heterogeneous", False):  # some families have their own
        text.per_layer_config = {index: {"skip": ["attention"]} for index in skip}
    renewed = {id(old): new}
    for name, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            renewed[id(value)] = getattr(new, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]
