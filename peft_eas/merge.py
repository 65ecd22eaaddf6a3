"""From a model with adapters to a transformers model: what is left once the adapters are folded in."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from . import modeling_eas
from .config import EASConfig
from .families import Layers
from .layer import Adapter, EASAttention, EASFeedForward, EASLayer

Wrappers = dict[int, tuple[EASAttention | None, EASFeedForward | None]]


@dataclass
class MergePlan:
    """What has to be known of the adapters after they are gone.

    Attributes:
        eas: The record `config.eas` of the merged model.
        layers: The decoder layers.
        adapters: For each module before which an adapter stays, by its name in the list of layers, that adapter.
    """

    eas: dict
    layers: Layers
    adapters: dict[str, modeling_eas.InputShift | modeling_eas.RoutedAdapter] = field(default_factory=dict)


def plan_merge(model: PreTrainedModel, layers: Layers, wrappers: Wrappers, config: EASConfig, name: str) -> MergePlan:
    """Work out what the merged model will look like, before anything is changed.

    Args:
        model: The base model with adapters in it.
        layers: Its decoder layers.
        wrappers: The wrapped attention and FFN of each layer, `None` for what has no adapter.
        config: Configuration of the adapter to be merged.
        name: Its name.
    """
    if config.skip_layers is None and not any(a is not None and a.gates.get(name) for a, _ in wrappers.values()):
        warnings.warn(
            "No attention is skipped, since no set has been chosen: train with an `EASCallback`, or name one with "
            "`EASConfig(skip_layers=...)` or `model.set_skip_layers(...)`.",
            stacklevel=2,
        )
    family = layers.family
    skip: list[int] = []
    biased: list[str] = []
    plan = MergePlan(eas={}, layers=layers)
    for index in layers.names:
        attention, ffn = wrappers[index]
        is_skipped = attention is not None and attention.gates.get(name, False)
        wrapper, where = (ffn, family.ffn) if is_skipped else (attention, family.attention)
        if is_skipped:
            skip.append(index)
        if wrapper is None or not wrapper.has_adapter(name):
            continue
        if config.router == "prompt":
            plan.adapters[f"{index}.{where}"] = _routed_adapter(wrapper, name)
        elif wrapper.is_shifted(name):
            plan.adapters[f"{index}.{where}"] = wrapper.input_shift(name)
        elif config.use_bias:
            biased += [f"{index}.{where}.{linear}".rstrip(".") for linear in wrapper.without_bias()]
    plan.eas = {
        "format": modeling_eas.FORMAT,
        "model_type": model.config.model_type,
        "decoder": layers.decoder or None,
        "layers": family.layers,
        "attention": family.attention,
        "ffn": family.ffn,
        "adds_residual": family.adds_residual,
        "norms": [*family.attention_norms, *family.output_norms],
        "skip": skip,
        "biased": biased,
        "adapters": {where: adapter.record for where, adapter in plan.adapters.items()},
        "config": config.record(),
    }
    return plan


def finish_merge(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """Strip the skipped attentions from `model`, whose adapters are folded in, and let it say what it is."""
    eas = plan.eas
    if not (eas["skip"] or eas["biased"] or eas["adapters"]):
        return model
    container = model.get_submodule(plan.layers.container)
    modeling_eas.strip_attentions(container, eas)
    for where, adapter in plan.adapters.items():
        modeling_eas.keep_adapter(container, where, adapter, is_ffn=not where.endswith(f".{eas['attention']}"))
    _change_config(model, eas)
    config_class = type(model.config)
    modeling_eas.register_models(config_class)
    model.__class__ = modeling_eas.eas_class(type(model))
    if modeling_eas.depends_on_prompt(eas):
        modeling_eas.watch_prompt(model, modeling_eas.always)
    return model


def _change_config(model: PreTrainedModel, eas: dict) -> None:
    """Give `model` a configuration of its own kind; the one it came with may be another model's, too."""
    old = model.config
    new = copy.deepcopy(old)
    new.__class__ = modeling_eas.eas_class(type(old))
    new.eas = eas
    if eas["skip"]:
        text = new.get_text_config(decoder=True)
        text.per_layer_config = {index: {"skip": ["attention"]} for index in eas["skip"]}
    renewed = {id(old): new}
    for name, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            renewed[id(value)] = getattr(new, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]


def _routed_adapter(wrapper: EASLayer, name: str) -> modeling_eas.RoutedAdapter:
    adapter: Adapter = wrapper.adapter(name)
    device, dtype = wrapper._get_base_layer_device_and_dtype(wrapper.base_layer)
    temperature = wrapper.eas_config[name].temperature
    routed = modeling_eas.RoutedAdapter(
        wrapper.hidden_size,
        adapter.down.shape[0],
        bias=adapter.down_bias is not None,
        propagates=adapter.prompt_down is not None,
        device=device,
        dtype=dtype,
    )
    weights = [
        (routed.router, wrapper.eas_router[name] / temperature, wrapper.eas_router_bias[name] / temperature),
        (routed.down, adapter.down, adapter.down_bias),
        (routed.up, adapter.up.flatten(0, 1), None if adapter.up_bias is None else adapter.up_bias.flatten()),
        (routed.prompt_down, adapter.prompt_down, adapter.prompt_down_bias),
    ]
    with torch.no_grad():
        for projection, weight, bias in weights:
            if weight is not None:
                projection.weight.copy_(weight)
            if bias is not None:
                projection.bias.copy_(bias)
    return routed.requires_grad_(False)
