"""From a model with adapters to a transformers model: what is left once the adapters are folded in."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn
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
        prompt_down: For each skipped layer, the projection of the propagated information.
        routed: For each module whose adapter stays, by its name in the list of layers, that adapter.
    """

    eas: dict
    layers: Layers
    prompt_down: dict[int, nn.Linear] = field(default_factory=dict)
    routed: dict[str, modeling_eas.RoutedAdapter] = field(default_factory=dict)


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
    propagates = config.propagation == "prompt"
    is_static = config.router == "static"
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
        if is_static:
            linears = {linear: wrapper.base_layer.get_submodule(linear) for linear in wrapper.inputs}
            linears |= wrapper._unfolded
            biased += [f"{index}.{where}.{k}" for k, m in linears.items() if config.use_bias and m.bias is None]
            if is_skipped and propagates:
                plan.prompt_down[index] = _prompt_down(wrapper, name)
        else:
            plan.routed[f"{index}.{where}"] = _routed_adapter(wrapper, name)
    plan.eas = {
        "format": modeling_eas.FORMAT,
        "model_type": model.config.model_type,
        "layers": family.layers,
        "attention": family.attention,
        "ffn": family.ffn,
        "norms": list(family.attention_norms),
        "skip": skip,
        "biased": biased,
        "prompt": {"rank": config.r_pia, "bias": config.use_bias, "linears": list(family.ffn_inputs)}
        if plan.prompt_down
        else None,
        "routed": {where: adapter.down.out_features for where, adapter in plan.routed.items()},
        "propagates": propagates,
        "use_bias": config.use_bias,
        "adapter": config.record(),
    }
    return plan


def finish_merge(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """Strip the skipped attentions from `model`, whose adapters are folded in, and let it say what it is."""
    eas = plan.eas
    if not (eas["skip"] or eas["biased"] or eas["routed"]):
        return model
    for index in eas["skip"]:
        stand_in = modeling_eas.SkippedAttention(index, plan.prompt_down.get(index))
        layer = model.get_submodule(plan.layers.names[index])
        modeling_eas.strip_attention(layer, eas["attention"], eas["norms"], stand_in.train(layer.training))
    container = model.get_submodule(plan.layers.decoder).get_submodule(eas["layers"])
    for where, adapter in plan.routed.items():
        module = container.get_submodule(where)
        module.eas_adapter = adapter.train(module.training)
        modeling_eas.hook_routed_adapter(module, is_ffn=where.endswith(f".{eas['ffn']}"))
    _change_config(model, eas)
    config_class = type(model.config)
    modeling_eas.register_models(config_class)
    model.__class__ = getattr(modeling_eas, f"EAS{type(model).__name__}")
    modeling_eas.watch_prompt(model)
    return model


def _change_config(model: PreTrainedModel, eas: dict) -> None:
    """Give `model` a configuration of its own kind; the one it came with may be another model's, too."""
    old = model.config
    new = copy.deepcopy(old)
    new.__class__ = getattr(modeling_eas, f"EAS{type(old).__name__}")
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


def _like(wrapper: EASLayer) -> dict:
    device, dtype = wrapper._get_base_layer_device_and_dtype(wrapper.base_layer)
    return {"device": device, "dtype": dtype}


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(device, dtype, copy=True), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(device, dtype, copy=True), requires_grad=False)
    return linear


def _prompt_down(wrapper: EASLayer, name: str) -> nn.Linear:
    adapter = wrapper.adapter(name)
    return _linear(adapter.prompt_down, adapter.prompt_down_bias, **_like(wrapper))


def _routed_adapter(wrapper: EASLayer, name: str) -> modeling_eas.RoutedAdapter:
    adapter: Adapter = wrapper.adapter(name)
    like = _like(wrapper)
    temperature = wrapper.eas_config[name].temperature
    routed = modeling_eas.RoutedAdapter(
        wrapper.hidden_size, adapter.down.shape[0], adapter.down_bias is not None, False, device="meta"
    )
    routed.router = _linear(wrapper.eas_router[name] / temperature, wrapper.eas_router_bias[name] / temperature, **like)
    routed.down = _linear(adapter.down, adapter.down_bias, **like)
    up_bias = None if adapter.up_bias is None else adapter.up_bias.flatten()
    routed.up = _linear(adapter.up.flatten(0, 1), up_bias, **like)
    if adapter.prompt_down is not None:
        routed.prompt_down = _linear(adapter.prompt_down, adapter.prompt_down_bias, **like)
    return routed
