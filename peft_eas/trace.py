"""Proposing a row for a family that is not in the table, by watching which modules read what."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .batches import hooks
from .config import EASConfig
from .families import FAMILIES, Attentions, Family, find_layers
from .runtime.eas_structure import outermost
from .runtime.modeling_eas import auto_classes

WORDS = 1024
"""How many words a random model has at most."""


class TraceError(ValueError):
    """A model is built so that no row can be proposed for it."""


@dataclasses.dataclass
class Call:
    """One call of a module: its name in the layer, its first tensor, what comes second, and what it gives."""

    name: str
    module: nn.Module
    given: torch.Tensor
    second: object
    result: torch.Tensor | None


def propose_family(model: PreTrainedModel, input_ids: torch.Tensor | None = None) -> Family:
    """The row that a model's forward suggests; for a person to look at, and for `check_family` to try.

    The attention is the module of that name; the FFN is what the layer calls next that has weight matrices; a linear
    reads their input if it is given the very same memory.

    Args:
        model: A decoder; random weights do.
        input_ids: What to run it with, `(B, T)`.

    Raises:
        TraceError: if what it says of a token depends on those that follow, there is no list of layers with attentions,
            none of its layers calls an attention before a FFN, or nothing reads the input of one of them as it is.
    """
    if input_ids is None:
        input_ids = torch.arange(6)[None] + 3
    with torch.no_grad():
        whole, part = (model.eval()(input_ids=ids, use_cache=False).logits for ids in (input_ids, input_ids[:, :-1]))
    if not torch.allclose(whole[:, :-1], part, rtol=1e-3, atol=1e-4):
        raise TraceError(f"{type(model).__name__} is no decoder: what it says of a token depends on those that follow.")
    path, container = layers_of(model)
    parts = path.split(".")
    suffixes = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
    layers = next(suffix for suffix in suffixes if outermost(model, suffix)[1] is container)
    found = [_attentions_of(layers, calls) for calls in _watch(model, container, input_ids)]
    kinds = [kind for kind in found if kind is not None]
    if not kinds:
        raise TraceError(f"No layer of {type(model).__name__} calls an attention and then a FFN.")
    # layers differ in having experts or not; a row names what any of them has
    merged: dict[str, Any] = {
        field.name: tuple(dict.fromkeys(name for kind in kinds for name in getattr(kind, field.name)))
        for field in dataclasses.fields(Attentions)
        if isinstance(getattr(kinds[0], field.name), tuple)
    }
    for module, inputs in ((kinds[0].attention, merged["attention_inputs"]), (kinds[0].ffn, merged["ffn_inputs"])):
        if not inputs:
            raise TraceError(f"Nothing in {module!r} of {type(model).__name__} reads the input that this is given.")
    stacked_axis = min(kind.stacked_axis for kind in kinds)
    kind = dataclasses.replace(kinds[0], **merged, stacked_axis=stacked_axis)
    return Family(model.config.model_type, (kind,))


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The longest list of layers with attentions that the decoder of `model` has, and its name there.

    Raises:
        TraceError: if there is none.
    """
    decoder = model.get_decoder()
    lists = [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and any(map(_attention, m))]
    if not lists:
        raise TraceError(f"{type(model).__name__} has no list of layers with attentions.")
    return max(lists, key=lambda item: len(item[1]))


def few_layers(config: PreTrainedConfig, count: int, **kwargs: Any) -> PreTrainedModel:
    """A random model that generates text, of the first `count` layers that `config` says, and of few words.

    Args:
        config: Configuration of a model.
        count: How many layers; fewer if it has not as many.
        **kwargs: For `from_config`.

    Raises:
        TraceError: if transformers has no model for `config` that generates text, or it is an encoder-decoder.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)
    few = type(config).from_dict(values)
    text = few.get_text_config(decoder=True)
    whole = getattr(text, "num_hidden_layers", None)
    if config.is_encoder_decoder or not isinstance(whole, int):
        raise TraceError(f"Rows are proposed for decoders, and models of type {config.model_type!r} are none.")
    text.num_hidden_layers = min(whole, count)
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == whole:  # one entry a layer
            setattr(text, name, value[:count])
    if getattr(text, "vocab_size", 0) > WORDS:
        text.vocab_size = WORDS
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, 0)
    named = {*auto_classes(few.model_type), *(getattr(few, "auto_map", None) or ())}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if auto.__name__ in named:
            return auto.from_config(few, dtype=torch.float32, **kwargs).eval()
    raise TraceError(f"Rows are proposed for decoders, and transformers has none of type {config.model_type!r}.")


@contextlib.contextmanager
def known(family: Family) -> Iterator[None]:
    """Let `family` be the row of its model type inside of the `with`."""
    before = FAMILIES.get(family.model_type)
    FAMILIES[family.model_type] = family
    try:
        yield
    finally:
        if before is None:
            del FAMILIES[family.model_type]
        else:
            FAMILIES[family.model_type] = before


def check_family(model: PreTrainedModel, family: Family, input_ids: torch.Tensor | None = None) -> float:
    """Largest difference that merging makes to a logit with this row, relative to the largest logit.

    About 1e-6 in float32 if the row is complete; far more if something else reads the attention's or the FFN's input.
    """
    if input_ids is None:
        input_ids = torch.arange(6)[None] + 3
    with known(family):
        model = copy.deepcopy(model).eval()
        skip_layers = list(find_layers(model))[::2]
        tuned = get_peft_model(model, EASConfig(skip_layers=skip_layers, propagation="mean", init_weights=False)).eval()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "eas_" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
            unmerged = tuned(input_ids=input_ids).logits
            merged = tuned.merge_and_unload()(input_ids=input_ids).logits
        return float((merged - unmerged).abs().max() / unmerged.abs().max())


def as_source(family: Family) -> str:
    """The row as it is written in Python, without what is a default."""
    said = [repr(family.model_type)]
    if family.decoder is not None:
        said.append(f"decoder={family.decoder!r}")
    elif family.attentions != Family(family.model_type).attentions:
        kinds = [f"Attentions({', '.join(_said(kind))})" for kind in family.attentions]
        said.append(f"({', '.join(kinds)}{',' * (len(kinds) == 1)})")
    return f"Family({', '.join(said)})"


def _said(kind: Attentions) -> list[str]:
    """The arguments of `Attentions` that are not the default."""
    values = {field.name: getattr(kind, field.name) for field in dataclasses.fields(Attentions)}
    return [f"{name}={value!r}" for name, value in values.items() if value != getattr(Attentions(), name)]


def _attention(layer: nn.Module) -> str | None:
    """Name of the outermost attention of a layer."""
    names = [n for n, m in layer.named_modules() if n and re.search(r"Attention", type(m).__name__)]
    return min(names, key=lambda name: name.count("."), default=None)


def _watch(model: PreTrainedModel, container: nn.ModuleList, input_ids: torch.Tensor) -> list[list[Call]]:
    """The calls of each layer's modules, in the order in which they return, in one forward."""
    calls: list[list[Call]] = [[] for _ in container]
    with hooks() as handles, torch.no_grad():
        for layer, made in zip(container, calls, strict=True):
            for name, module in layer.named_modules():
                if name:

                    def remember(module, args, kwargs, output, name=name, made=made):
                        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                        first = kwargs.get("hidden_states", tensors[0] if tensors else None)
                        result = output[0] if isinstance(output, tuple) else output
                        if first is not None:
                            second = args[1] if len(args) > 1 else None
                            made.append(Call(name, module, first, second, result))

                    handles.append(module.register_forward_hook(remember, with_kwargs=True))
        model.eval()(input_ids=input_ids, use_cache=False)
    return calls


def _attentions_of(layers: str, calls: list[Call]) -> Attentions | None:
    names = [call.name for call in calls]
    attention = next(
        (c for c in calls if "Attention" in type(c.module).__name__ and not _is_inside(c, calls, "Attention")), None
    )
    if attention is None:
        return None
    after = calls[names.index(attention.name) + 1 :]
    top = [c for c in after if "." not in c.name and any(p.dim() > 1 for p in c.module.parameters())]
    if not top:
        return None
    ffn = top[0]
    norms = [c for c in calls if "." not in c.name and c.module.__dict__.get("_parameters") and _is_norm(c.module)]
    before = [c.name for c in norms if _same(c.result, attention.given) and not _same(c.result, ffn.given)]
    adds_residual = isinstance(attention.second, torch.Tensor) and attention.second.shape == attention.given.shape
    behind = [c.name for c in norms if _same(c.given, attention.result)] if not adds_residual else []
    hidden_size = attention.given.shape[-1]
    inputs, stacked = _readers(ffn, calls, hidden_size)
    return Attentions(
        layers=layers,
        attention=attention.name,
        attention_inputs=_readers(attention, calls, hidden_size)[0],
        attention_norms=tuple(before),
        output_norms=tuple(behind),
        ffn=ffn.name,
        ffn_inputs=inputs,
        stacked_axis=stacked,
        convention="adds_residual" if adds_residual else "plain",
    )


def _is_inside(call: Call, calls: list[Call], kind: str) -> bool:
    return any(kind in type(c.module).__name__ and call.name.startswith(f"{c.name}.") for c in calls)


def _is_norm(module: nn.Module) -> bool:
    return all(p.dim() == 1 for p in module.parameters())


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are the same memory, whatever their shapes."""
    return a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _readers(block: Call, calls: list[Call], hidden_size: int) -> tuple[tuple[str, ...], int]:
    """Names in `block` of what reads its input, and the input's axis of stacked weights."""
    prefix, axis = f"{block.name}.", -1
    found: dict[str, None] = {}
    if isinstance(getattr(block.module, "weight", None), nn.Parameter):
        return ("",), axis
    for call in calls:
        if not call.name.startswith(prefix) or not _same(call.given, block.given):
            continue
        name = call.name.removeprefix(prefix)
        own = dict(call.module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].dim() == 2:
            found[name] = None
        for stacked, parameter in own.items():
            if parameter.dim() == 3 and not re.search(r"down|w2|output", stacked):
                found[f"{name}.{stacked}"] = None
                axis = -1 if parameter.shape[-1] == hidden_size else -2
    order = {name: i for i, (name, _) in enumerate(block.module.named_parameters())}
    key = {name: min((i for n, i in order.items() if n.startswith(name)), default=0) for name in found}
    return tuple(sorted(found, key=key.__getitem__)), axis
