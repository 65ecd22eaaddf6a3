"""From a model with adapters to a transformers model: what is left once the adapters are folded in."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import EASConfig
from .families import Layers
from .layer import EASAttention, EASFeedForward
from .quantized import Dequantiser, is_quantised, unquantised_dtype
from .runtime import modeling_eas
from .runtime.eas_attention import Shift, StandIn, put_in_front
from .runtime.eas_record import Form, Record, Stripped
from .runtime.eas_structure import forget_ties, strip_attentions
from .shards import is_shared_out
from .site import EASLayer


@dataclass
class MergePlan:
    """What has to be known of the adapters after they are gone.

    Attributes:
        record: That of the merged model.
        containers: Name in the model of each list of layers, in the order of `record.attentions`.
        shifts: For each of these, by name in the list, what is added to the input of attentions and FFNs, `(d,)`.
        stand_ins: What skipped attentions leave, by the attention's name in the model.
    """

    record: Record
    containers: list[str]
    shifts: list[dict[str, torch.Tensor]]
    stand_ins: dict[str, StandIn]


def check_in_memory(model: nn.Module) -> None:
    """Refuse to fold weights, or to put them back, where some are on the meta device, as offloaded ones are, or shared
    out among processes.

    Raises:
        ValueError: names one of them.
    """
    if any(map(is_shared_out, model.parameters())):
        raise ValueError(
            "The weights are shared out among processes, by FSDP or DeepSpeed. Save the adapter in all of them, by "
            "`trainer.save_model(folder)`; then merge in one process of its own, "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()`."
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    elsewhere = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if elsewhere:
        raise ValueError(
            f"{len(elsewhere)} weights, such as {elsewhere[0]}, are offloaded or on the meta device. Adapters are "
            "merged and unloaded in memory: load the base model without offloading (such as `device_map='cpu'`), "
            "put the adapter on it with `PeftModel.from_pretrained`, and merge that."
        )


def prepare_merge(model: PreTrainedModel, names: list[str], safe_merge: bool) -> list[EASLayer]:
    """Refuse what can't be merged before anything is changed, and say what becomes of quantised linears.

    Returns:
        All that have adapters.

    Raises:
        ValueError: for linears that nothing can be folded into; with `safe_merge`, for NaN.
    """
    wrappers = [module for module in model.modules() if isinstance(module, EASLayer)]
    quantised = any(map(is_quantised, model.parameters()))
    dequantiser = Dequantiser(unquantised_dtype(model)) if quantised else EASLayer.unquantised
    for wrapper in wrappers:
        wrapper.unquantised = dequantiser
        wrapper.check_foldable()
        for name in names if safe_merge else ():
            wrapper.check_finite(name)
    return wrappers


def plan_merge(
    model: PreTrainedModel,
    layers: Layers,
    wrappers: Mapping[int | str, tuple[EASAttention | None, list[EASFeedForward]]],
    config: EASConfig,
    name: str,
) -> MergePlan:
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
    kinds, containers, shifts, stand_ins = [], [], [], {}
    for row in layers.family.attentions:
        if row.layers not in layers.containers:
            continue
        skip, shapes, biased, shifted = [], [], [], {}
        for key, place in layers.items():
            if place.row != row:
                continue
            attention, ffns = wrappers[key]
            inside = f"{place.index}.{row.attention}"
            in_list = [ffn.name.removeprefix(f"{place.container}.") for ffn in ffns]
            places: list[tuple[EASLayer | None, str, str]] = list(zip(ffns, in_list, in_list, strict=True))
            if attention is not None and key in skipped:
                skip.append(place.index)
                device, dtype = attention._get_base_layer_device_and_dtype(attention.base_layer)
                stand_in = copy.deepcopy(attention.stand_in(name)).to(device, dtype).requires_grad_(False)
                stand_ins[place.attention] = stand_in
                shapes.append(dataclasses.replace(stand_in.shape, width=attention.stream_size))
            else:
                places.append((attention, inside, f"{inside}.{row.core}".rstrip(".")))
            for wrapper, inside, where in places:
                if wrapper is None or place != wrapper.place or not wrapper.acts(name):  # a FFN may follow several
                    continue
                if wrapper.is_shifted(name):
                    shifted[where] = wrapper.shift(name)
                elif config.use_bias:
                    biased += [f"{inside}.{linear}".rstrip(".") for linear in wrapper.without_bias()]
        kinds.append(
            Stripped(
                **{field.name: getattr(row, field.name) for field in dataclasses.fields(Form)},
                present=tuple(place.index for place in layers.values() if place.row == row),
                norms=row.attention_norms,
                output_norms=row.output_norms,
                skip=tuple(skip),
                stand_ins=tuple(shapes),
                biased=tuple(biased),
                shifted={where: len(shift) for where, shift in shifted.items()},
            )
        )
        containers.append(layers.containers[row.layers])
        shifts.append(shifted)
    record = Record(
        model_type=type(model).config_class.model_type,
        decoder=layers.decoder or None,
        attentions=tuple(kinds),
        by_name=layers.by_name,
        config=config.record(),
    )
    return MergePlan(record, containers, shifts, stand_ins)


def finish_merge(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """Strip the skipped attentions from `model`, whose adapters are folded in, and let it say what it is."""
    kinds = plan.record.attentions
    if not any(kind.skip or kind.biased or kind.shifted for kind in kinds):
        return model
    for kind, container, shifts in zip(kinds, plan.containers, plan.shifts, strict=True):
        layers = model.get_submodule(container)
        strip_attentions(layers, kind)
        for where, shift in shifts.items():
            put_in_front(layers, where, Shift(shift))
    for attention, stand_in in plan.stand_ins.items():
        model.get_submodule(attention).stand_in = stand_in.train(model.training)
    forget_ties(model)
    _change_config(model, plan.record)
    config_class = type(model.config)
    modeling_eas.register_models(config_class)
    model.__class__ = modeling_eas.eas_class(type(model))
    return model


def _change_config(model: PreTrainedModel, record: Record) -> None:
    """Give `model` a configuration of its own kind; the one it came with may be another model's, too.

    It is over the one that the model's class belongs to: InternLM 3 is a Llama with a configuration of another name.
    """
    old = model.config
    new = copy.deepcopy(old)
    new.__class__ = modeling_eas.eas_class(type(model).config_class)
    new.model_type = type(new).model_type  # one that was read from a file has it in the instance, too
    new.eas = record.written()
    text, skip = new.get_text_config(decoder=True), record.skipped
    is_decoder = not record.by_name and record.attentions[0].causal
    if skip and is_decoder and not getattr(text, "is_heterogeneous", False):  # some families have their own
        text.per_layer_config = {index: {"skip": ["attention"]} for index in skip}
    renewed = {id(old): new}
    for name, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            renewed[id(value)] = getattr(new, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in renewed:
            module.config = renewed[id(module.config)]
