"""From a model as its base class builds it to one whose attentions are partly gone."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .eas_attention import Shift, SkippedAttention, put_in_front
from .eas_record import Record, Stripped


def restructure(model: PreTrainedModel, record: Record) -> None:
    """Give `model`, built as its base class builds it, the structure that `record` says. Idempotent.

    Raises:
        ValueError: if `record` names layers or modules that are not there; says which field does.
    """
    decoder = model if record.decoder is None else _found(model, record.decoder, "eas.decoder")
    for number, kind in enumerate(record.attentions):
        where = f"eas.attentions[{number}]"
        layers = _found(decoder, kind.layers, f"{where}.layers")
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"`{where}.layers` in config.json names {kind.layers!r}, which is no list of layers.")
        if kind.present and kind.present[-1] >= len(layers):
            raise ValueError(
                f"`{where}.present` in config.json has layer {kind.present[-1]}, but there are {len(layers)} layers."
            )
        for index in kind.skip:
            attention = _inside(layers, f"{index}.{kind.attention}", f"{where}.attention")
            if not isinstance(attention, SkippedAttention):
                _inside(attention, kind.core, f"{where}.core")
                _inside(attention, kind.residual_norm, f"{where}.residual_norm")
        for name in kind.biased:
            linear = _inside(layers, name, f"{where}.biased")
            if not hasattr(linear, "out_features"):
                raise ValueError(f"`{where}.biased` in config.json names {name!r}, which is no linear.")
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        for name, width in kind.shifted.items():
            module = _inside(layers, name, f"{where}.shifted")
            if not hasattr(module, "eas_front"):
                put_in_front(layers, name, Shift(next(module.parameters()).new_zeros(width)))
        strip_attentions(layers, kind)
    forget_ties(model)


def _found(model: nn.Module, suffix: str, where: str) -> nn.Module:
    try:
        return outermost(model, suffix)[1]
    except ValueError as error:
        raise ValueError(f"`{where}` in config.json names what is not there: {error}") from None


def _inside(module: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"`{where}` in config.json names {name!r}, which is not there.") from None


def outermost(model: nn.Module, suffix: str) -> tuple[str, nn.Module]:
    """The outermost module of `model` whose name ends with `suffix`, and that name; of suffixes with a `|` between
    them, with the first that there is.

    Raises:
        ValueError: if there is none.
    """
    for end in suffix.split("|"):
        found = [(name, m) for name, m in model.named_modules() if f".{name}".endswith(f".{end}")]
        if found:
            return min(found, key=lambda item: item[0].count("."))
    raise ValueError(f"{type(model).__name__} has no module {suffix!r}.")


def has_module(model: nn.Module, suffix: str) -> bool:
    """Whether `model` has a module whose name ends with `suffix`."""
    return any(f".{name}".endswith(f".{suffix}") for name, _ in model.named_modules())


def strip_attentions(layers: nn.ModuleList, kind: Stripped) -> None:
    """Put a `SkippedAttention` where each skipped attention was, and drop the norms that only the attention needed."""
    for index, shape in zip(kind.skip, kind.stand_ins, strict=True):
        layer = layers[index]
        attention = layer.get_submodule(kind.attention)
        if not isinstance(attention, SkippedAttention):
            like = next(p for p in layer.parameters() if p.is_floating_point())  # an attention may be quantised
            put_in = SkippedAttention(kind, index, attention, shape, device=like.device, dtype=like.dtype)
            layer.set_submodule(kind.attention, put_in.train(layer.training))
        for name in (*kind.output_norms, *(() if shape.reads else kind.norms)):
            if name in dict(layer.named_modules()):
                layer.set_submodule(name, nn.Identity())


def forget_ties(model: PreTrainedModel) -> None:
    """Let `model` know which of its tied weights are gone (layers of Zamba share those of their attentions)."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, _ in tensors}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if name in names}
