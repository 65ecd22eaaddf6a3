"""`EASModel`: the PEFT tuner."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from . import checks
from .config import EASConfig
from .families import Layers, find_layers
from .freeze import FrozenContext, freeze
from .gates import SkipGates
from .layer import EASAttention, EASFeedForward, Wrappers
from .loading import check_form, check_parameters, entries_of, skipped_in, wrappers_of
from .merge import check_in_memory, finish_merge, plan_merge, prepare_merge
from .prove import learn_family
from .quantized import Requantiser, dequantise, is_quantised
from .runtime.eas_attention import StandIn
from .runtime.eas_propagation import UNREADABLE
from .site import EASLayer, check_single
from .targets import Targets, context_size, output_norms, stream_size


class EASModel(BaseTuner):
    """Injects adapters and skip gates into the decoder layers of a transformers model.

    Made by `get_peft_model(model, EASConfig(...))`; its public members are members of the `PeftModel`, too.

    Raises:
        ValueError: for a model whose family is not known, or a configuration that does not fit the model; the model is
            left as it was.
    """

    prefix: str = "eas_"
    tuner_layer_cls = EASLayer
    target_module_mapping: dict[str, list[str]] = {}

    # Injection --------------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: EASConfig, model_config: dict) -> EASConfig:
        return peft_config  # the defaults need the model, see `_prepare_model`

    def _prepare_model(self, peft_config: EASConfig, model: nn.Module) -> None:
        learn_family(model)
        self._targets = Targets(find_layers(model))
        self._targets.fit(peft_config, model)

    @property
    def _layers(self) -> Layers:
        return self._targets.layers

    def _check_target_module_exists(self, peft_config: EASConfig, key: str) -> Any:
        return self._targets.has(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: EASConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._targets.places[current_key][0]
        if not isinstance(target, EASLayer):
            if current_key == place.attention:
                sizes = stream_size(self.model, place), context_size(self.model, place)
                wrapper: EASLayer = EASAttention(target, place, *sizes, output_norms(self.model, place))
            else:
                wrapper = EASFeedForward(target, place, current_key)
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        target.eas_config[adapter_name] = peft_config
        is_skipped = self._layers.key_of(place) in (peft_config.skip_layers or ())
        # until the set is chosen, all that any set needs
        parts = target.adapter_layer_names if peft_config.skip_layers is None else target.needed(is_skipped)
        if isinstance(target, EASAttention):
            target.set_gate(adapter_name, is_skipped)
        target.create(adapter_name, peft_config, parts)
        if adapter_name not in self.active_adapters:
            target.set_requires_grad(adapter_name, requires_grad=False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: PreTrainedModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        attentions = []
        for key in self._layers:
            attention, _ = self._wrappers(key, model)
            if attention is not None:
                attentions.append(attention)
                attention.measured, attention.searched = attentions[0].measured, attentions[0].searched
        if model.can_generate():
            model.init_continuous_batching = functools.partial(_init_continuous_batching, model)

    def _wrappers(
        self, key: int | str, model: nn.Module | None = None
    ) -> tuple[EASAttention | None, list[EASFeedForward]]:
        """A wrapped attention, `None` if it has no adapter, and the wrapped FFNs behind it."""
        model = self.model if model is None else model
        attention, *ffns = map(model.get_submodule, (self._layers[key].attention, *self._layers[key].ffns))
        is_wrapped = isinstance(attention, EASAttention)
        return attention if is_wrapped else None, [ffn for ffn in ffns if isinstance(ffn, EASFeedForward)]

    # The skip set -----------------------------------------------------------------------------------------------------

    @property
    def skip_layers(self) -> list[int | str]:
        """The attentions that the active adapter skips: indices of layers, or names where indices are not enough."""
        return [i for name in self.active_adapters for i in self._skipped_by(name)]

    def _skipped_by(self, adapter_name: str) -> list[int | str]:
        attentions = {i: self._wrappers(i)[0] for i in self._layers}
        return [i for i, attention in attentions.items() if attention is not None and attention.gates.get(adapter_name)]

    def named(self, adapter_name: str | None) -> str:
        """An adapter's name, by default that of the active one.

        Raises:
            ValueError: if there is no such adapter.
        """
        name = next(iter(self.active_adapters), None) if adapter_name is None else adapter_name
        if not isinstance(name, str) or name not in self.peft_config:
            raise ValueError(f"There is no adapter {checks.shown(name)}: name one of {list(self.peft_config)}.")
        return name

    def set_skip_layers(self, skip_layers: list[int | str], adapter_name: str | None = None) -> None:
        """Skip just these attentions.

        What is needed for the first time is created: the adapter of an attention as an identity, a stand-in as zero.
        What is no longer needed is kept, frozen, for the case that the set changes back.

        Args:
            skip_layers: Indices of layers or names of attentions, as in `EASConfig`.
            adapter_name: Adapter; the active one by default.

        Raises:
            ValueError: for an attention that is not there, or that the adapter can't skip, or while merged.
        """
        adapter_name = self.named(adapter_name)
        config = self.peft_config[adapter_name]
        targeted = self._targeted(adapter_name)
        skip_layers = self._targets.resolve(skip_layers, list(targeted))
        if any(adapter_name in w.merged_adapters for w in _all(targeted)):
            raise ValueError(
                f"Adapter {adapter_name!r} is merged: call `unmerge_adapter()` before changing its skip set."
            )
        wrappers = _all(targeted)
        like = next(w.adapter(adapter_name).up for w in wrappers if w.has_adapter(adapter_name))
        for key, (attention, _) in targeted.items():
            attention.set_gate(adapter_name, key in skip_layers)
        for wrapper in wrappers:
            parts = wrapper.needed(wrapper.skips(adapter_name))
            wrapper.create(adapter_name, config, parts, dtype=like.dtype)
            wrapper.freeze_idle(adapter_name)
        config.settle(skip_layers)

    def skip_gates(self, adapter_name: str | None = None) -> SkipGates:
        """The gates of an adapter, by default the active one, for a search to work with."""
        adapter_name = self.named(adapter_name)
        return SkipGates(self._targeted(adapter_name), adapter_name)

    def stand_ins(self, adapter_name: str) -> dict[int | str, StandIn]:
        """The stand-ins of an adapter that have a constant, by attention; of those that are skipped, or may be."""
        attentions = {key: attention for key, (attention, _) in self._targeted(adapter_name).items()}
        there = {k: a.stand_in(adapter_name) for k, a in attentions.items() if adapter_name in a.eas_stand_in}
        return {key: stand_in for key, stand_in in there.items() if stand_in.constant is not None}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model inside of the `with`; then its adapters again, as trainable as before."""
        trainable = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    def _targeted(self, adapter_name: str) -> Wrappers:
        """The attentions that the adapter can skip, with the FFNs behind them."""
        targeted: Wrappers = {}
        for key, place in self._layers.items():
            attention, ffns = self._wrappers(key)
            if attention is None or not place.is_skippable or len(ffns) < len(place.ffns):
                continue
            if all(adapter_name in wrapper.eas_config for wrapper in (attention, *ffns)):
                targeted[key] = attention, ffns
        return targeted

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: EASConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Follow the skip set of a checkpoint that is loaded into an adapter that exists (resume, best model).

        Raises:
            ValueError: for an adapter of peft_eas 0.1, whose parameters are others; for one that skips other attentions
                than `config.skip_layers` named when the adapter was made, or lacks parameters that its set needs.
        """
        check_form(state_dict)
        wrappers = wrappers_of(model, adapter_name)
        tuner = next((m for m in model.modules() if isinstance(m, cls)), None)
        layers = find_layers(model) if tuner is None else tuner._layers  # none: `inject_adapter_in_model`
        prefix = "base_model.model."
        entries = entries_of(state_dict, adapter_name, "_orig_mod.", prefix)
        skipped = skipped_in(entries, layers, wrappers, adapter_name)
        check_parameters(entries, wrappers, [layers[i].attention for i in skipped], adapter_name)
        if tuner is not None and skipped != tuner._skipped_by(adapter_name):
            both = [layers[i].attention for i in skipped if layers[i].row.attention_inputs]
            has_both = all(f"{attention}.eas_adapter.up" in entries for attention in both)
            if config.skip_layers is None and has_both:
                tuner.skip_gates(adapter_name).set(skipped)  # the search that saved it may go on
            else:
                tuner.set_skip_layers(skipped, adapter_name)
        gates = {f"{w.place.attention}.eas_skip": w.gates[adapter_name] for w in wrappers if not w.is_ffn}
        lacking = {prefix + key: torch.tensor(gate) for key, gate in gates.items() if key not in entries}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict | lacking)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Follow the skip sets of what torch's `load_state_dict` loads, before it loads any of it.

        Raises:
            ValueError: as `_remap_adapter_state_dict_for_load`; parts are loaded that have the same set.
        """
        inside = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}model.")}
        changes = {}
        for name, config in self.peft_config.items():
            entries = entries_of(inside, name, f"{prefix}model.")
            # until a set is chosen there is all that any set needs, and the attentions read their gates
            if config.skip_layers is not None and any(key.endswith(".eas_skip") for key in entries):
                wrappers = wrappers_of(self, name)
                skipped = skipped_in(entries, self._layers, wrappers, name)
                if skipped != self._skipped_by(name):
                    check_parameters(entries, wrappers, [self._layers[i].attention for i in skipped], name)
                    changes[name] = skipped
        for name, skipped in changes.items():
            self.set_skip_layers(skipped, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: EASConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """What is saved of an adapter; with its gates, also out of a `state_dict` of parameters alone.

        Raises:
            ValueError: if the model was merged or unloaded, and nothing is left of the adapter.
        """
        wrappers = wrappers_of(model, adapter_name)
        names = {module: name.replace("_fsdp_wrapped_module.", "") for name, module in model.named_modules()}
        gates = {f"{names[w]}.eas_skip.{adapter_name}": w.eas_skip[adapter_name] for w in wrappers if not w.is_ffn}
        return gates | super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def freeze_context(
        self, dataloader: Iterable[dict[str, torch.Tensor]], adapter_name: str | None = None
    ) -> FrozenContext:
        """Replace what skipped attentions leave (2) by its mean over the tokens of `dataloader`.

        From then on the adapter is one with `stand_in="mean"` and `propagation="none"`: it merges into plain weights,
        which other engines run, and can be trained further (with a new optimizer). Says by how much loss and
        logits moved.

        Args:
            dataloader: Batches as for training; read twice.
            adapter_name: Adapter; the active one by default.

        Raises:
            ValueError: if what the adapter leaves is constant, or it has no skip set yet, is merged or not active; and
                without any tokens. The model is then as it was.
        """
        adapter_name = self.named(adapter_name)
        config = self.peft_config[adapter_name]
        if config.propagation == "none" and config.stand_in != "linear":
            raise ValueError(
                f"Adapter {adapter_name!r} has `stand_in={config.stand_in!r}` and `propagation='none'`: what its "
                "skipped attentions leave is constant, and there is nothing to freeze."
            )
        if config.skip_layers is None:
            raise ValueError("No set of attentions to skip has been chosen yet: freeze the context after the search.")
        targeted = self._targeted(adapter_name)
        if any(adapter_name in w.merged_adapters for w in _all(targeted)):
            raise ValueError(f"Adapter {adapter_name!r} is merged: call `unmerge_adapter()` first.")
        if [adapter_name] != self.active_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is not active: call `set_adapter({adapter_name!r})` first.")
        moved = freeze(self.model, [attention for attention, _ in targeted.values()], adapter_name, dataloader)
        config.propagation, config.stand_in = "none", "mean"
        self.set_skip_layers(config.skip_layers, adapter_name)
        print(moved)
        return moved

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would ignore it
            raise ValueError(
                "`adapter_names`: the rows of a batch can't go through different EAS adapters, since each skips "
                "attentions of its own. Choose one by `set_adapter`."
            )
        yield

    # Merging ----------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str):
            check_single(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_in_memory(self.model)
        prepare_merge(self.model, self.active_adapters if adapter_names is None else adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> PreTrainedModel:
        """Fold the active adapter into the weights, and hand back a transformers model without the skipped attentions.

        A quantised base model is dequantised, all of it, to the dtype of its embeddings: the merged model computes with
        the weights that the adapter was trained on.

        Args:
            progressbar: Whether to show one.
            safe_merge: Whether to look for NaN before anything is changed.
            adapter_names: The adapter, in a list; the active one by default.
            requantize: Whether to quantise the folded linears again, as they were (bitsandbytes only), and leave the
                others quantised. Warns of what that loses.

        Raises:
            ValueError: for linears that nothing can be folded into, for NaN, and for `requantize` without a base model
                that bitsandbytes has quantised; nothing is changed then.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, requantize=requantize
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        if not any(isinstance(module, EASLayer) for module in self.model.modules()):
            return self.model  # merged or unloaded before
        check_in_memory(self.model)
        plan = requantiser = None
        if merge:  # refuses before anything is changed
            names = self.active_adapters if adapter_names is None else adapter_names
            check_single(names)
            if not names or names[0] not in self.peft_config:
                raise ValueError(f"There is no adapter {list(names)} to merge: name one of {list(self.peft_config)}.")
            all_wrappers = prepare_merge(self.model, names, safe_merge)
            if requantize:
                requantiser = Requantiser(self.model)
            wrappers = {i: self._wrappers(i) for i in self._layers}
            plan = plan_merge(self.model, self._layers, wrappers, self.peft_config[names[0]], names[0])
            for wrapper in all_wrappers:
                if wrapper.merged:  # to be folded from the weights as they were
                    wrapper.unmerge()
                wrapper.unquantised = requantiser or wrapper.unquantised
        dequantises = requantiser is None and any(map(is_quantised, self.model.parameters()))
        is_tied = getattr(self.model.config, "tie_word_embeddings", False)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # PEFT compares the head with the input embeddings of the encoder, but T5Gemma ties it to the decoder's
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        if is_tied and ties and all(model.get_parameter(a) is model.get_parameter(b) for a, b in ties.items()):
            model.config.tie_word_embeddings = True
        model.__dict__.pop("init_continuous_batching", None)
        if plan is None:
            return model
        model = finish_merge(model, plan)
        if dequantises:
            dequantise(model)
        if requantiser is not None:
            requantiser.warn()
        return model


def _all(wrappers: Wrappers) -> list[EASLayer]:
    """All of them, once each."""
    return list(dict.fromkeys(w for attention, ffns in wrappers.values() for w in (attention, *ffns)))


def _init_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """That of the class of `model`, but refused where masks are read, before anything runs."""
    attentions = [module for module in model.modules() if isinstance(module, EASAttention)]
    acting = [(attention, attention.acting_adapter()) for attention in attentions]
    skipped = [attention.stand_in(name) for attention, name in acting if name is not None and attention.skips(name)]
    if any(stand_in.mean_up is not None for stand_in in skipped):
        raise ValueError(UNREADABLE.format("continuous batching"))
    return type(model).init_continuous_batching(model, *args, **kwargs)
