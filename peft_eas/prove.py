"""Models of a type that has no row: one is proposed, proved on a few random layers, and then used."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from .config import EASConfig
from .families import FAMILIES, Family, Place, find_layers, register_family, unknown
from .trace import TraceError, as_source, few_layers, known, layers_of, propose_family

EXACT = 1e-4
"""How far logits that should be equal may be apart, relative to the largest."""
MOST_LAYERS = 12
"""How many layers may be made for a proof."""


def learn_family(model: nn.Module) -> None:
    """See that the type of `model` has a row: if none is known, propose one, prove it, and register it with a warning.

    Does nothing for models that can't be learned about like this: whose type transformers does not know, or that
    were merged already.

    Raises:
        ValueError: if no row can be proved; says why.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES or model_type not in CONFIG_MAPPING or hasattr(model.config, "eas"):
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            few = _like(model)
            family = _around_known(few) or propose_family(few)
            prove_family(few, family)
    except Exception as error:  # whatever happens in a layer that is built in another way
        reason = error if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{unknown(model)} It could not be learned from a few random layers: {reason}") from error
    register_family(family)
    warnings.warn(
        f"EAS did not know how models of type {model_type!r} are built. A row was proposed, and proved on a few random "
        "layers, with which merging and generation are exact. It is used from now on; look at it, and before you load "
        f"an adapter or a merged model elsewhere: peft_eas.register_family(peft_eas.{as_source(family)})",
        stacklevel=2,
    )


def _like(model: PreTrainedModel) -> PreTrainedModel:
    """A random model with the first few layers of `model`, as many as have all kinds of layers that it has.

    Raises:
        TraceError: if these are too many.
    """
    kinds = [_kind(layer) for layer in layers_of(model)[1]]
    count = max(4, *(kinds.index(kind) + 1 for kind in kinds))
    if count > MOST_LAYERS:
        raise TraceError(f"The first {MOST_LAYERS} layers have not all kinds of layers that there are.")
    few = few_layers(model.config, count)
    same_type = few.config.model_type == model.config.model_type
    if not same_type or not {*kinds} <= {_kind(layer) for layer in layers_of(few)[1]}:
        raise TraceError("With fewer layers, the model is built in another way.")
    return few


def _kind(layer: nn.Module) -> frozenset[tuple[str, str]]:
    """What a layer consists of: names of its modules, and classes of those with others in them (others may be
    quantised)."""
    modules = dict(layer.named_modules())
    return frozenset((name, type(m).__name__ if any(True for _ in m.children()) else "") for name, m in modules.items())


def _around_known(model: PreTrainedModel) -> Family | None:
    """The row of a model around one whose type is known, if it is that."""
    decoder = model.get_decoder()
    names = [name for name, module in model.named_modules() if module is decoder and name]
    if not names or decoder.config.model_type not in FAMILIES:
        return None
    return Family(model.config.model_type, decoder=names[0].rpartition(".")[2])


@torch.no_grad()
def prove_family(model: PreTrainedModel, family: Family) -> None:
    """Try whatever a row may be wrong about, on a model with random weights.

    With fresh adapters, a model that skips attentions has to be the model whose attentions give zero. With random ones,
    merged has to equal unmerged, and so a model that is built from the merged one's configuration. All of them have to
    give the same of a text in parts, with a KV cache, as at once, and to look neither at what follows nor at padding.

    Raises:
        TraceError: for the first that is not so.
    """
    ids = torch.randint(3, min(60, model.get_input_embeddings().num_embeddings), (2, 10))
    model = model.eval()
    _check_readings("the model itself", model, ids)
    with known(family):
        layers = find_layers(model)
        skippable = [key for key, place in layers.items() if place.is_skippable]
        for skip_layers in filter(None, (skippable[::2], skippable[1::2])):
            if len(skip_layers) == len(layers):
                continue
            silent = _silenced(model, [layers[key] for key in skip_layers])(ids).logits
            fresh = get_peft_model(copy.deepcopy(model), EASConfig(skip_layers=skip_layers)).eval()
            _check_close("A skipped attention is not one that gives zero", silent, fresh(ids).logits)
            if _distance(silent, model(ids).logits) < EXACT:
                raise TraceError("Its attentions do nothing.")
            for propagation in ("none", "mean"):
                config = EASConfig(skip_layers=skip_layers, propagation=propagation, r=4, r_pia=4, init_weights=False)
                tuned = get_peft_model(copy.deepcopy(model), config).eval()
                for name, parameter in tuned.named_parameters():
                    if "eas_" in name:
                        parameter.add_(0.05 * torch.randn_like(parameter))
                unmerged = _check_readings("the model with adapters", tuned, ids)
                merged = tuned.merge_and_unload()
                _check_close("Merging is not exact", unmerged, _check_readings("the merged model", merged, ids))
                again = type(merged)(copy.deepcopy(merged.config)).eval()
                again.load_state_dict(merged.state_dict())
                _check_close("A loaded merged model is another one", unmerged, again(ids).logits)


def _silenced(model: PreTrainedModel, places: list[Place]) -> PreTrainedModel:
    """A copy of `model` in which these attentions have only zeros as parameters, and so add nothing."""
    silent = copy.deepcopy(model)
    for place in places:
        for parameter in silent.get_submodule(place.attention).parameters():
            parameter.zero_()
    return silent


def _check_readings(what: str, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits `(2, 10, V)` of `ids` read at once, if nothing is wrong with how the model reads texts."""
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    kept, others = padded.bool(), ids.flip(0)
    logits = model(ids).logits
    behind_padding = model(ids, attention_mask=padded).logits
    _check_close(f"With a KV cache, {what} gives something else", logits, _in_parts(model, ids, None))
    _check_close(
        f"With a KV cache and padding, {what} gives something else",
        behind_padding[kept],
        _in_parts(model, ids, padded)[kept],
    )
    _check_close(
        f"Padding changes what {what} gives",
        behind_padding[kept],
        model(torch.where(kept, ids, others), attention_mask=padded).logits[kept],
    )
    ending = torch.cat([ids[:, :6], others[:, 6:]], dim=1)
    _check_close(f"Tokens that follow change what {what} gives", logits[:, :6], model(ending).logits[:, :6])
    return logits


def _in_parts(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of `ids` read in four parts."""
    read, cache = [], None
    for start, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
        seen = None if mask is None else mask[:, :end]
        outputs = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        read.append(outputs.logits)
    return torch.cat(read, dim=1)


def _check_close(what: str, expected: torch.Tensor, actual: torch.Tensor) -> None:
    distance = _distance(expected, actual)
    if not distance < EXACT:
        raise TraceError(f"{what} (by {distance:.0e} of the largest logit).")


def _distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())
