"""The tuner layers: an attention with its adapter, skip gate and stand-in, and a FFN with its adapter."""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import pia
from .config import EASConfig
from .families import Arm
from .quantized import Dequantiser, Linear, check_foldable, is_quantised, weight_of
from .runtime.eas_attention import Bypass, change_input


class Adapter(NamedTuple):
    """The parameters of one adapter as the mathematics has them: groups are block-diagonal matrices here, the branches
    are added up, and the scaling is in."""

    down: torch.Tensor  # (r, d)
    down_bias: torch.Tensor | None  # (r,)
    up: torch.Tensor  # (d, r)
    up_bias: torch.Tensor | None  # (d,)


OWN = ("eas_down", "eas_down_bias", "eas_up", "eas_up_bias", "eas_router")
"""Names of the parameters of an adapter (1): `A`, `a`, `B`, `b` and what `alpha` is made of."""

LEFT = ("eas_stand_in", "eas_map_down", "eas_map_up", "eas_mean_down", "eas_mean_up")
"""Names of the parameters of what a skipped attention leaves (2): `k`, `E`, `F`, `C` and `D`."""


class EASLayer(nn.Module, BaseTunerLayer):
    """What the wrappers of an attention and of a FFN share: an adapter (1) in front, folded into the linears that read
    the module's input.

    Args:
        base_layer: The attention or the FFN.
        arm: The attention, or the first of those that the FFN follows.

    Raises:
        ValueError: if it has none of the linears that the family's row names.
    """

    adapter_layer_names: tuple[str, ...] = OWN
    other_param_names: tuple[str, ...] = ("eas_config", "eas_dropout")
    is_ffn: bool
    touch_idle = False
    """Whether parameters that a training forward does not use take part all the same, by adding zero: for
    DistributedDataParallel, which expects a gradient for every parameter."""
    unquantised = Dequantiser(torch.float32)
    """What makes folded linears out of quantised ones; `EASModel` sets it before it merges."""

    def __init__(self, base_layer: nn.Module, arm: Arm) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.arm = arm
        self.stacked_axis = arm.row.stacked_axis
        self.inputs, self.hidden_size = inputs_of(base_layer, arm, self.is_ffn)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.eas_dropout = nn.ModuleDict()
        self.eas_config: dict[str, EASConfig] = {}
        self._disable_adapters = False
        self.frozen_peft_weight_names: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._unfolded: dict[str, nn.Module | nn.Parameter] = {}
        self._shift: torch.Tensor | None = None  # of a folded adapter, see `input_shift`

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes of its attentions
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # Parameters -------------------------------------------------------------------------------------------------------

    def skips(self, adapter_name: str) -> bool:
        """Whether a forward skips this module."""
        return False

    def names(self, is_skipped: bool) -> tuple[str, ...]:
        """Names of the parameters that a forward uses here."""
        return OWN

    def idle(self, adapter_name: str) -> list[str]:
        """Names of the parameters that a forward does not use now."""
        used = self.names(self.skips(adapter_name))
        return [name for name in self.adapter_layer_names if name not in used]

    def initial(self, config: EASConfig) -> dict[str, torch.Tensor]:
        """All parameters of a fresh adapter, by name; those of (1) are an identity if `config.init_weights`.

        None for a module whose weights are others', too: see `Attentions.attention_inputs`.
        """
        if not self.inputs:
            return {}
        d, groups, rank = self.hidden_size, config.groups, config.r_pia if self.is_ffn else config.r
        branches = 1 if config.router == "none" else 2
        parameters = {"eas_down": _kaiming(rank, d)}
        blocks = torch.zeros(branches, groups, d // groups, rank // groups)
        if not config.init_weights:
            nn.init.normal_(blocks, std=0.02)
        elif branches == 2:  # which cancel out: two that are equal would stay equal, and the router would not learn
            nn.init.normal_(blocks[0], std=0.02)
            blocks[1] = -blocks[0]
        parameters["eas_up"] = blocks
        if config.use_bias:
            parameters |= {"eas_down_bias": torch.zeros(rank), "eas_up_bias": torch.zeros(branches, d)}
        if config.router == "static":
            parameters["eas_router"] = torch.zeros(2)
        return parameters

    def create_parameters(
        self, adapter_name: str, config: EASConfig, names: Iterable[str], dtype: torch.dtype | None = None
    ) -> None:
        """Create those of these parameters that an adapter has and lacks; of the base's dtype by default."""
        missing = [name for name in names if adapter_name not in getattr(self, name)]
        device, base_dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        for name, value in self.initial(config).items() if missing else ():
            if name in missing:
                getattr(self, name)[adapter_name] = nn.Parameter(value.to(device=device, dtype=dtype or base_dtype))
        if adapter_name not in self.eas_dropout:
            self.eas_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def parameters_of(self, adapter_name: str, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """The parameters of an adapter, or those of these names."""
        by_name = (getattr(self, name) for name in (self.adapter_layer_names if names is None else names))
        return [parameters[adapter_name] for parameters in by_name if adapter_name in parameters]

    def freeze_idle(self, adapter_name: str) -> None:
        """Train what the set that is skipped needs of an adapter, and nothing else."""
        self.frozen_peft_weight_names[adapter_name] = tuple(self.idle(adapter_name))
        self.set_adapter(self.active_adapters, inference_mode=self.eas_config[adapter_name].inference_mode)

    def drop_idle(self, adapter_name: str) -> None:
        """Delete what the set that is skipped does not need of an adapter."""
        for name in self.idle(adapter_name):
            parameters = getattr(self, name)
            if adapter_name in parameters:
                del parameters[adapter_name]

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether there is an adapter (1) of this name here."""
        return adapter_name in self.eas_up

    def adapter(self, adapter_name: str) -> Adapter:
        """The parameters of an adapter, in the form that the mathematics has them."""
        config, alpha = self.eas_config[adapter_name], None
        if config.router == "static":
            alpha = torch.softmax(self.eas_router[adapter_name], dim=-1)
        up_bias = self.eas_up_bias.get(adapter_name)
        return Adapter(
            down=self.eas_down[adapter_name],
            down_bias=self.eas_down_bias.get(adapter_name),
            up=pia.mix(pia.dense_up(self.eas_up[adapter_name]), alpha) * config.scaling,
            up_bias=None if up_bias is None else pia.mix(up_bias, alpha) * config.scaling,
        )

    def acting_adapter(self) -> str | None:
        """The adapter that this forward goes through, if any."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        names = self.merged_adapters or self.active_adapters
        return names[0] if names and names[0] in self.eas_config else None

    def adapted(self, adapter_name: str, z: torch.Tensor) -> torch.Tensor:
        """`adapt(z)` (1) of the input `z (B, T, d)`; what is left of it where the adapter is folded."""
        if self.merged:
            return z if self._shift is None else z + self._shift.to(z.device)
        adapter = self.adapter(adapter_name)
        wide = self.eas_dropout[adapter_name](self._cast_input_dtype(z, adapter.down.dtype))
        hidden = F.linear(wide, adapter.down, adapter.down_bias)
        return z + F.linear(hidden, adapter.up, adapter.up_bias).to(z.dtype)

    def _touched(self, hidden_states: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if not (self.touch_idle and self.training):
            return hidden_states
        idle = self.parameters_of(adapter_name, self.idle(adapter_name))
        return hidden_states + sum((0.0 * parameter.sum() for parameter in idle), hidden_states.new_zeros(()))

    # Folding ----------------------------------------------------------------------------------------------------------

    def acts(self, adapter_name: str) -> bool:
        """Whether this adapter changes the input here."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold an adapter into the linears that read this module's input; they are kept aside for `unmerge`.

        Raises:
            ValueError: if several adapters are named, or `safe_merge` finds values that are not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        check_single(adapter_names)
        adapter_name = adapter_names[0]
        if adapter_name not in self.eas_config:
            return
        if safe_merge:
            self.check_finite(adapter_name)
        if self.acts(adapter_name):
            self._shift = self.input_shift(adapter_name) if self.is_shifted(adapter_name) else None
            self._unfolded = self.fold(adapter_name)
        self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def fold(self, adapter_name: str) -> dict[str, nn.Module | nn.Parameter]:
        """Put folded linears in place, and return those that were there, by name."""
        before = {}
        for name, folded in self._folded(adapter_name):
            before[name] = _get(self.base_layer, name)
            self._put(name, folded)
        return before

    def _put(self, name: str, linear: Linear) -> None:
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(self.base_layer.get_submodule(parent), leaf, linear)
        else:
            self.base_layer = linear

    @torch.no_grad()
    def check_finite(self, adapter_name: str) -> None:
        """Refuse an adapter with NaN or infinite values, or one whose fold has some; changes nothing.

        Raises:
            ValueError: in the words of PEFT's other tuners.
        """
        tensors: list[torch.Tensor] = list(self.parameters_of(adapter_name))
        if self.acts(adapter_name):
            tensors += [t for _, linear in self._folded(adapter_name) for t in _tensors(linear)]
        if not all(torch.isfinite(t).all() for t in tensors):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")

    def _folded(self, adapter_name: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """What reads this module's input, one by one, with the adapter folded in."""
        adapter = self.adapter(adapter_name)
        biases = (None, None) if self.is_shifted(adapter_name) else (adapter.down_bias, adapter.up_bias)
        for name in self.inputs:
            linear = _get(self.base_layer, name)
            check_foldable(linear)
            yield name, _fold(linear, self.stacked_axis, adapter, *biases, self.unquantised)

    def check_foldable(self) -> None:
        """Refuse linears that nothing can be folded into, see `quantized.check_foldable`."""
        for name in self.inputs:
            check_foldable(_get(self.base_layer, name))

    def is_shifted(self, adapter_name: str) -> bool:
        """Whether folding leaves something to be added to the input: biases that there is no place for."""
        return self.eas_config[adapter_name].use_bias and not all(
            isinstance(linear, nn.Module) and "bias" in linear._parameters
            for linear in (_get(self.base_layer, name) for name in self.inputs)
        )

    def without_bias(self) -> list[str]:
        """Names of the linears that read the input and had no bias before anything was folded."""
        linears = {name: _get(self.base_layer, name) for name in self.inputs} | self._unfolded
        return [name for name, linear in linears.items() if linear.bias is None]

    @torch.no_grad()
    def input_shift(self, adapter_name: str) -> torch.Tensor:
        """What a folded adapter leaves to be added to the input, `(d,)`, equation (10)."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        return pia.input_shift(*self.adapter(adapter_name)).to(device, dtype)

    def unmerge(self) -> None:
        """Put the original linears back: the very tensors, so nothing is lost to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, linear in self._unfolded.items():
            device = _tensors(_get(self.base_layer, name))[0].device
            if isinstance(linear, nn.Parameter):
                linear.data = linear.data.to(device)
            self._put(name, linear.to(device) if isinstance(linear, nn.Module) else linear)
        self._unfolded, self._shift = {}, None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the adapter folded in if `merge`; called by PEFT.

        `safe_merge` is not looked at here: `EASModel` has checked all modules before the first is changed.
        """
        if not merge:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            names = check_adapters_to_merge(self, adapter_names)
            if names and names[0] in self.eas_config and self.acts(names[0]):
                self.fold(names[0])
        return self.base_layer

    # PEFT -------------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str):
            check_single(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        for parameter in base_layer.parameters():
            if is_quantised(parameter) or not parameter.is_floating_point():
                return parameter.device, self.unquantised.dtype
            return parameter.device, parameter.dtype
        return None, None


class EASAttention(EASLayer):
    """An attention that its layer keeps, with an adapter in front (1), or that is skipped and leaves its stand-in.

    The gate is saved with the adapter, as the buffer `eas_skip`, so that it survives a resume.

    Args:
        base_layer: The attention.
        arm: What it is in its model.
        stream_size: Size of the residual stream that it adds to; 0 for one that is never skipped.
        context_size: Size of the tokens that a cross-attention looks at.
        output_norms: The norms behind it, which what it leaves does not go through.
    """

    is_ffn = False
    adapter_layer_names = (*OWN, *LEFT)
    other_param_names = (*EASLayer.other_param_names, "gates", "eas_skip")

    def __init__(
        self,
        base_layer: nn.Module,
        arm: Arm,
        stream_size: int = 0,
        context_size: int | None = None,
        output_norms: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__(base_layer, arm)
        self.stream_size = stream_size
        self.read_size = self.hidden_size or stream_size
        self.pooled_size = context_size or self.read_size
        self.bypass = Bypass(arm.row, arm.index, base_layer)
        self._hooks = [norm.register_forward_hook(self._passed) for norm in output_norms]
        if arm.row.core:
            core = base_layer.get_submodule(arm.row.core)
            self._hooks.append(core.register_forward_pre_hook(self._adapted, with_kwargs=True))
        # Whether each adapter skips the attention.
        self.gates: dict[str, bool] = {}
        self.eas_skip = BufferDict(persistent=True)
        # Adapters whose stand-ins have been measured, or are known not to have been; one set for all attentions.
        self.measured: set[str] = set()
        # Likewise, those whose attentions a search chooses, or are known not to be chosen by any.
        self.searched: set[str] = set()
        self.register_load_state_dict_post_hook(_read_gates)

    def set_gate(self, adapter_name: str, skip: bool) -> None:
        """Skip this attention whenever `adapter_name` is active, or don't."""
        self.gates[adapter_name] = skip
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        self.eas_skip[adapter_name] = torch.tensor(skip, device=device)

    def skips(self, adapter_name: str) -> bool:
        return self.gates[adapter_name]

    def names(self, is_skipped: bool) -> tuple[str, ...]:
        return LEFT if is_skipped else OWN

    def initial(self, config: EASConfig) -> dict[str, torch.Tensor]:
        parameters = super().initial(config)
        if self.stream_size and config.stand_in != "zero":
            parameters["eas_stand_in"] = torch.zeros(self.stream_size)
        maps = {"map": self.read_size} if config.stand_in == "linear" else {}
        maps |= {"mean": self.pooled_size} if config.propagation == "mean" else {}
        for name, size in maps.items() if self.stream_size else ():
            up = torch.zeros(self.stream_size, config.r_pia)
            parameters[f"eas_{name}_down"] = _kaiming(config.r_pia, size)
            parameters[f"eas_{name}_up"] = up if config.init_weights else nn.init.normal_(up, std=0.02)
        return parameters

    def left(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What is left where the attention is skipped (2), by the names that `SkippedAttention` has, scaling included:
        of `stand_in (d,)`, `down (r, d')`, `up (d, r)`, `mean_down (r, d'')` and `mean_up (d, r)` those that there are.
        """
        names = dict(zip(("stand_in", "down", "up", "mean_down", "mean_up"), LEFT, strict=True))
        there = {name: getattr(self, own).get(adapter_name) for name, own in names.items()}
        there = {name: parameter for name, parameter in there.items() if parameter is not None}
        if "mean_up" in there:
            there["mean_up"] = there["mean_up"] * self.eas_config[adapter_name].scaling
        return there

    def acts(self, adapter_name: str) -> bool:
        return self.has_adapter(adapter_name) and not self.gates[adapter_name]

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Refuse a gate that contradicts the set that the adapter has the parameters of; see `EASModel`, which follows
        it where it can."""
        for name, skip in self.gates.items():
            saved = state_dict.get(f"{prefix}eas_skip.{name}")
            if self.eas_config[name].skip_layers is not None and saved is not None and bool(saved) != skip:
                loaded, present = ("keeps", "skips") if skip else ("skips", "keeps")
                raise ValueError(
                    f"What is loaded {loaded} the attention {self.arm.name!r}, and adapter {name!r} {present} it: make "
                    "the adapter with the set that was saved, `EASConfig(skip_layers=[...])`, or load into the PEFT "
                    "model, and not into a part of it."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        if name is None:
            self.bypass.retain(kwargs)
            return self.base_layer(*args, **kwargs)
        if self.training and self.eas_config[name].skip_layers is None:
            self._check_searched(name)
        if self.skips(name):
            if self.training and name not in self.measured:
                self._check_measured(name)
            stream = self.bypass.stream(args, kwargs, self.base_layer, self._added(name, args, kwargs))
            return self.bypass.returned(self._touched(stream, name), args, kwargs)
        self.bypass.retain(kwargs)
        args, kwargs = change_input(args, kwargs, lambda z: self._touched(z, name))
        if not self.arm.row.core:
            args, kwargs = self._adapted(self.base_layer, args, kwargs)
        return self.base_layer(*args, **kwargs)

    def _check_searched(self, adapter_name: str) -> None:
        """Say, once, that a training is to skip attentions and nothing chooses them."""
        if (
            torch.compiler.is_compiling()
            or adapter_name in self.searched
            or self.eas_config[adapter_name].num_skip == 0
        ):
            return
        if not torch.is_grad_enabled():
            return  # a reference, as TRL's DPO has one
        self.searched.add(adapter_name)
        warnings.warn(
            f"Adapter {adapter_name!r} is to skip attentions, but none is chosen and no search is running, so this "
            "training skips none: give the Trainer `callbacks=[EASCallback(held_out)]`, or name the attentions with "
            "`EASConfig(skip_layers=[...])` or `model.set_skip_layers([...])`.",
            stacklevel=2,
        )

    def _check_measured(self, adapter_name: str) -> None:
        """Say, once, that a training starts without stand-ins."""
        if torch.compiler.is_compiling():
            return
        self.measured.add(adapter_name)
        if adapter_name in self.eas_stand_in and not self.eas_stand_in[adapter_name].any():
            warnings.warn(
                f"The stand-ins of adapter {adapter_name!r} start at zero: skipped attentions leave nothing at first. "
                "Call `peft_eas.initialize_eas_weights(model, dataloader)` before training, or give the Trainer an "
                "`EASCallback`, which does it; `stand_in='zero'` is for models that are to have none.",
                stacklevel=2,
            )

    def _added(self, adapter_name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """What a skipped attention adds to the stream, `(B, T, d)`."""
        left = self.left(adapter_name)
        first = args[0] if args else kwargs["hidden_states"]
        added = first.new_zeros(*first.shape[:-1], self.stream_size)
        if "down" in left:
            hidden = F.linear(self._cast_input_dtype(first, left["down"].dtype), left["down"])
            added = added + F.linear(hidden, left["up"]).to(first.dtype)
        if "mean_down" in left:
            config = getattr(self.base_layer, "config", None)
            information = self.bypass.information(args, kwargs, left["mean_down"], config)
            added = added + F.linear(information.to(left["mean_up"].dtype), left["mean_up"]).to(first.dtype)
        else:
            self.bypass.pass_over(args, kwargs)
        return added + left["stand_in"].to(first.dtype) if "stand_in" in left else added

    def _passed(self, norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The output of a norm behind the attention: a stand-in is what is left after it."""
        name = self.acting_adapter()
        return args[0] if name is not None and self.skips(name) else output

    def _adapted(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the attention, or of its core, with the input as the active adapter gives it."""
        name = self.acting_adapter()
        if name is None or not self.has_adapter(name):
            return args, kwargs
        return change_input(args, kwargs, lambda z: self.adapted(name, z))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for hook in self._hooks:
            hook.remove()
        return base_layer


class EASFeedForward(EASLayer):
    """A FFN with an adapter in front (1), which is the PIA where an attention of its layer is skipped.

    Args:
        base_layer: The FFN.
        arm: The attention, or the first of those that it follows.
        name: Name of the FFN in the model.
    """

    is_ffn = True

    def __init__(self, base_layer: nn.Module, arm: Arm, name: str) -> None:
        super().__init__(base_layer, arm)
        self.name = name

    def acts(self, adapter_name: str) -> bool:
        return self.has_adapter(adapter_name)

    def is_shifted(self, adapter_name: str) -> bool:
        if self.arm.row.ffn_masks_input:
            return self.eas_config[adapter_name].use_bias
        return super().is_shifted(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        if name is not None and self.has_adapter(name):
            args, kwargs = change_input(args, kwargs, lambda z: self.adapted(name, self._touched(z, name)))
        return self.base_layer(*args, **kwargs)


Wrappers = dict[int | str, tuple[EASAttention, list[EASFeedForward]]]
"""The attentions of a model, each wrapped (`None`: it has no adapter), with the wrapped FFNs behind it."""


def inputs_of(module: nn.Module, arm: Arm, is_ffn: bool) -> tuple[tuple[str, ...], int]:
    """Names of what reads the input of an attention or a FFN, and the size of that input; `(), 0` if it has no adapter.

    Raises:
        ValueError: if it has none of what the family's row names, or another tuner's adapter on some of it.
    """
    named = arm.row.ffn_inputs if is_ffn else arm.row.attention_inputs
    if not named:
        return (), 0
    # rows name all that some layers have
    names = tuple(name for given in named for name in _meant(module, given))
    if not names:
        raise ValueError(
            f"{type(module).__name__} of layer {arm.index} has none of {', '.join(named)}, which the family's row "
            "names as what reads its input."
        )
    for name in names:
        if isinstance(_get(module, name), BaseTunerLayer):
            raise ValueError(
                f"{name} of layer {arm.index} has an adapter of another kind ({type(_get(module, name)).__module__}), "
                "which folding would lose: merge or unload that one first."
            )
    return names, _in_features(_get(module, names[0]), arm.row.stacked_axis)


def _meant(module: nn.Module, given: str) -> list[str]:
    """What a name in a row stands for here: nothing, or several modules if there is a `*` in it."""
    if "*" in given:
        return fnmatch.filter(dict(module.named_modules()), given)
    there = (name for name in given.split("|") if not isinstance(_get(module, name), (type(None), nn.Identity)))
    return list(there)[:1]


def check_single(adapter_names: list[str]) -> None:
    """EAS adapters don't add up: each skips attentions of its own."""
    if len(adapter_names) > 1:
        raise ValueError(
            f"EAS adapters can't be combined, since each skips attentions of its own: choose one of {adapter_names}."
        )


def _kaiming(rows: int, columns: int) -> torch.Tensor:
    """As PEFT's LoRA and `nn.Linear` initialise a projection."""
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def _get(module: Any, name: str) -> Linear:
    """A linear or a stacked weight of `module` by its name, `""` for the module itself; `None` if there is none."""
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)
    return module


def _tensors(linear: nn.Module | nn.Parameter) -> list[torch.Tensor]:
    return [linear] if isinstance(linear, nn.Parameter) else list(linear.parameters())


def _is_transposed(linear: nn.Module) -> bool:
    return isinstance(linear, Conv1D)


def _in_features(linear: Linear, stacked_axis: int) -> int:
    if isinstance(linear, nn.Parameter):
        return linear.shape[stacked_axis]
    if hasattr(linear, "in_features"):
        return linear.in_features
    return linear.weight.shape[0 if _is_transposed(linear) else -1]


def _fold(
    linear: Linear,
    stacked_axis: int,
    adapter: Adapter,
    down_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    unquantised: Dequantiser,
) -> nn.Module | nn.Parameter:
    """A linear, or the stacked weights of experts, with an adapter folded in; of the same class, if not quantised."""
    is_stacked = isinstance(linear, nn.Parameter)
    is_transposed = stacked_axis == -2 if is_stacked else _is_transposed(linear)
    weight, bias = (linear, None) if is_stacked else (weight_of(linear), getattr(linear, "bias", None))
    folded, bias = pia.fold(weight.mT if is_transposed else weight, bias, adapter.down, down_bias, adapter.up, up_bias)
    if not is_stacked and is_quantised(linear.weight):
        return unquantised(linear, folded, bias)
    new_weight = nn.Parameter(folded.mT.contiguous() if is_transposed else folded, requires_grad=weight.requires_grad)
    if is_stacked:
        return new_weight
    new = copy.copy(linear)
    new._parameters = linear._parameters | {"weight": new_weight}
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias, requires_grad=weight.requires_grad)
    return new


def _read_gates(module: EASAttention, _incompatible_keys: Any) -> None:
    """After loading: the gate that a forward looks at is a Python bool, since reading a tensor would synchronise."""
    for name, gate in module.eas_skip.items():
        module.gates[name] = bool(gate)
