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
from .layer import Adapter, EASLayer, Wrappers


@dataclass
class MergePlan:
    """What has to be known of the adapters after they are gone.

    Attributes:
        eas: The record `config.eas` of the merged model.
        containers: Name in the model of each list of layers, in the order of `eas["attentions"]`.
        adapters: For each of these, by name in the list, each module before which an adapter stays, with that adapter.
        stand_ins: What is added where an attention is skipped, by the attention's name in the model.
    """

    eas: dict
    containers: list[str]
    adapters: list[dict[str, modeling_eas.InputShift | modeling_eas.RoutedAdapter]]
    stand_ins: dict[str, torch.Tensor]


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
    forms, containers, adapters, stand_ins = [], [], [], {}
    for row in layers.family.attentions:
        if row.layers not in layers.containers:
            continue
        container = layers.containers[row.layers]
        form = row.form() | {
            "present": [arm.index for arm in layers.values() if arm.row == row],
            "norms": [*row.attention_norms, *row.output_norms],
            "skip": [],
            "stand_in": [],
            "biased": [],
        }
        kept = {}
        for key, arm in layers.items():
            if arm.row != row:
                continue
            attention, ffns = wrappers[key]
            inside = f"{arm.index}.{row.attention}"
            in_list = [ffn.name.removeprefix(f"{arm.container}.") for ffn in ffns]
            places = list(zip(ffns, in_list, in_list, strict=True))
            if key in skipped:
                form["skip"].append(arm.index)
                stand_in = attention.eas_stand_in.get(name)
                form["stand_in"].append(0 if stand_in is None else len(stand_in))
                if stand_in is not None:
                    device, dtype = attention._get_base_layer_device_and_dtype(attention.base_layer)
                    stand_ins[arm.attention] = stand_in.detach().to(device, dtype, copy=True)
            else:
                places.append((attention, inside, f"{inside}.{row.core}".rstrip(".")))
            for wrapper, inside, where in places:
                if wrapper is None or not wrapper.acts(name):
                    continue
                if config.router == "prompt":
                    kept[where] = _routed_adapter(wrapper, name)
                elif wrapper.is_shifted(name):
                    shifts = wrapper.input_shifts(name)
                    kept |= {where: shifts[arm]} if arm in shifts else {}
                elif config.use_bias and arm == wrapper.arm:  # a FFN may follow several attentions
                    form["biased"] += [f"{inside}.{linear}".rstrip(".") for linear in wrapper.without_bias()]
        form["adapters"] = {where: adapter.record for where, adapter in kept.items()}
        forms.append(form)
        containers.append(container)
        adapters.append(kept)
    eas = {
        "format": modeling_eas.FORMAT,
        "model_type": type(model).config_class.model_type,
        "decoder": layers.decoder or None,
        "attentions": forms,
        "by_name": layers.by_name,
        "config": config.record(),
    }
    return MergePlan(eas, containers, adapters, stand_ins)


def finish_merge(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """Strip the skipped attentions from `model`, whose adapters are folded in, and let it say what it is."""
    forms = plan.eas["attentions"]
    if not any(form["skip"] or form["biased"] or form["adapters"] for form in forms):
        return model
    for form, container, adapters in zip(forms, plan.containers, plan.adapters, strict=True):
        layers = model.get_submodule(container)
        modeling_eas.strip_attentions(layers, form)
        for where, adapter in adapters.items():
            modeling_eas.keep_adapter(layers, form, where, adapter)
    for attention, stand_in in plan.stand_ins.items():
        model.get_submodule(attention).stand_in = torch.nn.Parameter(stand_in, requires_grad=False)
    modeling_eas.forget_ties(model)
    _change_config(model, plan.eas)
    config_class = type(model.config)
    modeling_eas.register_models(config_class)
    model.__class__ = modeling_eas.eas_class(type(model))
    if modeling_eas.depends_on_prompt(plan.eas):
        modeling_eas.watch_prompt(model, modeling_eas.always)
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
    is_decoder = not eas["by_name"] and eas["attentions"][0]["pools"] == "prompt"
    if skip and is_decoder and not getattr(text, "is_heterogeneous", False):  # some families have their own
        text.per_layer_config = {index: {"skip": ["attention"]} for index in skip}
    renewed = {id(old): new}
    for name, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            renewed[id(value)] = getattr(new, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]


def _routed_adapter(wrapper: EASLayer, name: str) -> modeling_eas.RoutedAdapter:
    adapter: Adapter = wrapper.adapter(name)
    prompt_down, prompt_down_bias = wrapper.informed(name).get(wrapper.arm, (None, None))
    device, dtype = wrapper._get_base_layer_device_and_dtype(wrapper.base_layer)
    temperature = wrapper.eas_config[name].temperature
    routed = modeling_eas.RoutedAdapter(
        wrapper.hidden_size,
        adapter.down.shape[0],
        bias=adapter.down_bias is not None,
        propagates=prompt_down is not None,
        device=device,
        dtype=dtype,
    )
    weights = [
        (routed.router, wrapper.eas_router[name] / temperature, wrapper.eas_router_bias[name] / temperature),
        (routed.down, adapter.down, adapter.down_bias),
        (routed.up, adapter.up.flatten(0, 1), None if adapter.up_bias is None else adapter.up_bias.flatten()),
        (routed.prompt_down, prompt_down, prompt_down_bias),
    ]
    with torch.no_grad():
        for projection, weight, bias in weights:
            if weight is not None:
                projection.weight.copy_(weight)
            if bias is not None:
                projection.bias.copy_(bias)
    return routed.requires_grad_(False)
