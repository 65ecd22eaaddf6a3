"""`EASModel`: the PEFT tuner."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from . import checks
from .config import EASConfig
from .families import Arm, find_layers
from .freeze import FrozenContext, freeze
from .gates import SkipGates
from .layer import EASAttention, EASFeedForward, EASLayer, Wrappers, check_single, inputs_of
from .loading import check_parameters, entries_of, skipped_in, wrappers_of
from .merge import finish_merge, plan_merge
from .prove import learn_family
from .quantized import Dequantiser, Requantiser, dequantise, is_quantised, unquantised_dtype
from .runtime.eas_attention import UNREADABLE


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
        self._layers = layers = find_layers(model)
        if peft_config.target_modules is None:
            rows = layers.family.attentions
            names = {name for row in rows for name in (row.attention, row.ffn, row.ffn_back)}
            peft_config.target_modules = names - {""}  # type: ignore[assignment]  # PEFT takes sets, too
        self._places: dict[str, list[Arm]] = {arm.attention: [arm] for arm in layers.values()}
        for arm in layers.values():
            for ffn in arm.ffns:
                self._places.setdefault(ffn, []).append(arm)
        targeted = {name for name in self._places if self._check_target_module_exists(peft_config, name)}
        if not targeted and isinstance(peft_config.target_modules, set):
            raise ValueError(
                f"EAS adapts whole attentions and FFNs, but `target_modules`={sorted(peft_config.target_modules)} with "
                f"`exclude_modules` and `layers_to_transform` leaves none of them, such as "
                f"{next(iter(self._places))!r}. Leave it out to adapt all."
            )
        widths = []
        for name, arms in self._places.items():
            if name not in targeted:
                continue
            module = model.get_submodule(name)
            base_layer = module.base_layer if isinstance(module, EASLayer) else module
            _, width = inputs_of(base_layer, arms[0], is_ffn=name != arms[0].attention)
            if width % peft_config.groups:
                raise ValueError(f"`groups`={peft_config.groups} does not divide the model's hidden size {width}.")
            widths.append(width)
        rank = max(peft_config.r, peft_config.r_pia)
        if widths and rank > max(widths):
            raise ValueError(
                f"`r`={peft_config.r} and `r_pia`={peft_config.r_pia} must be at most the model's hidden size, "
                f"{max(widths)}."
            )
        skippable = [key for key, arm in layers.items() if arm.is_skippable and {arm.attention, *arm.ffns} <= targeted]
        if peft_config.skip_layers is not None:
            peft_config.skip_layers = self._checked(peft_config.skip_layers, skippable)
        elif not skippable and peft_config.num_skip != 0:
            raise ValueError(
                "No attention can be skipped: `target_modules`, `exclude_modules`, `layers_to_transform` and "
                "`modules_to_save` leave none that has an adapter together with its FFN. Let them leave some, or say "
                "`num_skip=0`."
            )
        peft_config.is_set_given = peft_config.skip_layers is not None
        count = peft_config.count_to_skip(len(skippable))
        if count > len(skippable):
            raise ValueError(f"`num_skip`={count} is more than the {len(skippable)} attentions that can be skipped.")
        self._check_some_left(count)

    def _checked(self, skip_layers: Iterable[int | str], skippable: list[int | str]) -> list[int | str]:
        """The attentions that are meant by indices or names, in the model's order."""
        keys = self._layers.resolve(checks.attentions("skip_layers", skip_layers))
        wrong = [key for key in keys if key not in skippable]
        if wrong:
            raise ValueError(
                f"`skip_layers` names {wrong}, but the attentions that can be skipped (that have adapters, with their "
                f"FFN, and that no other layer needs) are {skippable}."
            )
        self._check_some_left(len(keys))
        return keys

    def _check_some_left(self, num_skip: int) -> None:
        # without any attention, tokens know nothing of each other, and a KV cache can't tell how long it is
        if num_skip == len(self._layers):
            raise ValueError(f"All {num_skip} attentions of the model would be skipped: keep at least one.")

    def _check_target_module_exists(self, peft_config: EASConfig, key: str) -> Any:
        if key not in self._places:
            return False
        layers = peft_config.layers_to_transform
        index = self._places[key][0].index
        if layers not in (None, []) and index not in ([layers] if isinstance(layers, int) else layers):
            return False
        # PEFT reads the index off the name, and finds none in those of a bare decoder, such as "layers.0.mlp".
        config = copy.copy(peft_config)
        config.layers_to_transform = None
        return check_target_module_exists(config, key)

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
        arms = self._places[current_key]
        is_attention = current_key == arms[0].attention
        if not isinstance(target, EASLayer):
            if is_attention:
                sizes = self._stream_size(arms[0]), self._context_size(arms[0])
                wrapper = EASAttention(target, arms[0], *sizes, self._output_norms(arms[0]))
            else:
                wrapper = EASFeedForward(target, arms[0], current_key)
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        target.eas_config[adapter_name] = peft_config
        names = target.adapter_layer_names  # until the set is chosen, all that any set needs
        if peft_config.skip_layers is not None:
            names = target.names(self._layers.key_of(arms[0]) in peft_config.skip_layers)
        if is_attention:
            skipped = peft_config.skip_layers or ()
            target.set_gate(adapter_name, self._layers.key_of(arms[0]) in skipped)
        target.create_parameters(adapter_name, peft_config, names)
        if adapter_name not in self.active_adapters:
            target.set_requires_grad(adapter_name, requires_grad=False)

    def _context_size(self, arm: Arm) -> int | None:
        """Size of the tokens that a cross-attention looks at; `None` where these are those of the residual stream."""
        if not arm.row.context:
            return None
        return self.model.get_submodule(f"{arm.attention}.{arm.row.context_inputs[0]}").in_features

    def _stream_size(self, arm: Arm) -> int:
        """Size of the residual stream that an attention adds to, which is what the FFN behind it reads."""
        if not arm.is_skippable:
            return 0
        ffn = self.model.get_submodule(arm.ffns[0])
        return inputs_of(ffn.base_layer if isinstance(ffn, EASLayer) else ffn, arm, is_ffn=True)[1]

    def _output_norms(self, arm: Arm) -> list[nn.Module]:
        modules = dict(self.model.get_submodule(arm.layer).named_modules())
        return [modules[name] for name in arm.row.output_norms if name in modules]

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
        skip_layers = self._checked(skip_layers, list(targeted))
        if any(adapter_name in w.merged_adapters for w in _all(targeted)):
            raise ValueError(
                f"Adapter {adapter_name!r} is merged: call `unmerge_adapter()` before changing its skip set."
            )
        wrappers = _all(targeted)
        like = next(w.eas_up[adapter_name] for w in wrappers if w.has_adapter(adapter_name))
        for key, (attention, _) in targeted.items():
            attention.set_gate(adapter_name, key in skip_layers)
        for wrapper in wrappers:
            names = wrapper.names(wrapper.skips(adapter_name))
            wrapper.create_parameters(adapter_name, config, names, dtype=like.dtype)
            wrapper.freeze_idle(adapter_name)
        config.settle(skip_layers)

    def skip_gates(self, adapter_name: str | None = None) -> SkipGates:
        """The gates of an adapter, by default the active one, for a search to work with."""
        adapter_name = self.named(adapter_name)
        return SkipGates(self._targeted(adapter_name), adapter_name)

    def stand_ins(self, adapter_name: str) -> dict[int | str, nn.Parameter]:
        """The constants of an adapter, `(d,)`, by attention; of those that are skipped, or may be."""
        attentions = {key: attention for key, (attention, _) in self._targeted(adapter_name).items()}
        return {k: a.eas_stand_in[adapter_name] for k, a in attentions.items() if adapter_name in a.eas_stand_in}

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
        for key, arm in self._layers.items():
            attention, ffns = self._wrappers(key)
            if attention is None or not arm.is_skippable or len(ffns) < len(arm.ffns):
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
        if any(".eas_B" in key for key in state_dict):
            raise ValueError(
                "This adapter was trained with peft_eas 0.1, whose adapters had another form. Ways out: merge it with "
                "peft_eas 0.1, or train it anew."
            )
        wrappers = wrappers_of(model, adapter_name)
        tuner = next((m for m in model.modules() if isinstance(m, cls)), None)
        layers = find_layers(model) if tuner is None else tuner._layers  # none: `inject_adapter_in_model`
        prefix = "base_model.model."
        entries = entries_of(state_dict, adapter_name, "_orig_mod.", prefix)
        skipped = skipped_in(entries, layers, wrappers, adapter_name)
        check_parameters(entries, wrappers, [layers[i].attention for i in skipped], adapter_name)
        if tuner is not None and skipped != tuner._skipped_by(adapter_name):
            places = [layers[i].attention for i in skipped if layers[i].row.attention_inputs]
            has_both = all(any(key.startswith(f"{place}.eas_up") for key in entries) for place in places)
            if config.skip_layers is None and has_both:
                tuner.skip_gates(adapter_name).set(skipped)  # the search that saved it may go on
            else:
                tuner.set_skip_layers(skipped, adapter_name)
        gates = {f"{w.arm.attention}.eas_skip": w.gates[adapter_name] for w in wrappers if not w.is_ffn}
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
        self._check_in_memory()
        self._prepare_merge(self.active_adapters if adapter_names is None else adapter_names, safe_merge)
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

    def _prepare_merge(self, names: list[str], safe_merge: bool) -> list[EASLayer]:
        """Refuse what can't be merged before anything is changed, and say what becomes of quantised linears."""
        wrappers = [module for module in self.model.modules() if isinstance(module, EASLayer)]
        quantised = any(map(is_quantised, self.model.parameters()))
        dequantiser = Dequantiser(unquantised_dtype(self.model)) if quantised else EASLayer.unquantised
        for wrapper in wrappers:
            wrapper.unquantised = dequantiser
            wrapper.check_foldable()
            for name in names if safe_merge else ():
                wrapper.check_finite(name)
        return wrappers

    def _check_in_memory(self) -> None:
        """Refuse to fold weights, or to put them back, where some are on the meta device, as offloaded ones are."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        elsewhere = [name for name, tensor in tensors if tensor.device.type == "meta"]
        if elsewhere:
            raise ValueError(
                f"{len(elsewhere)} weights, such as {elsewhere[0]}, are offloaded or on the meta device. Adapters are "
                "merged and unloaded in memory: load the base model without offloading (such as `device_map='cpu'`), "
                "put the adapter on it with `PeftModel.from_pretrained`, and merge that."
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
        self._check_in_memory()
        plan = requantiser = None
        if merge:  # refuses before anything is changed
            names = self.active_adapters if adapter_names is None else adapter_names
            check_single(names)
            if not names or names[0] not in self.peft_config:
                raise ValueError(f"There is no adapter {list(names)} to merge: name one of {list(self.peft_config)}.")
            all_wrappers = self._prepare_merge(names, safe_merge)
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
    if any(name is not None and attention.skips(name) and name in attention.eas_mean_up for attention, name in acting):
        raise ValueError(UNREADABLE.format("continuous batching"))
    return type(model).init_continuous_batching(model, *args, **kwargs)
