"""The tuner layers: an attention with its adapter, skip gate and stand-in, and a FFN with its PIA."""

from __future__ import annotations

import copy
import fnmatch
import functools
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
from .modeling_eas import (
    Bypass,
    InputShift,
    PromptContext,
    by_row,
    cache_state,
    change_input,
    enter_layer,
    looking_back,
    mask_of,
    slot_state,
    take_context,
)
from .quantized import Dequantiser, check_foldable, is_quantised, weight_of


class Adapter(NamedTuple):
    """The parameters of one adapter as the mathematics has them; groups are block-diagonal matrices here."""

    down: torch.Tensor  # (r, d): A of equation (1), C of (2)
    down_bias: torch.Tensor | None  # (r,)
    up: torch.Tensor  # (2, d, r), scaling included
    up_bias: torch.Tensor | None  # (2, d), scaling included
    prompt_down: torch.Tensor | None  # (r, d): A of equation (3)
    prompt_down_bias: torch.Tensor | None  # (r,)


class EASLayer(nn.Module, BaseTunerLayer):
    """What the wrappers of an attention and of a FFN share: parameters by adapter, and folding into the linears.

    Args:
        base_layer: The attention or the FFN.
        arm: The attention, or the one that the PIA stands for.

    Raises:
        ValueError: if it has none of the linears that the family's row names.
    """

    adapter_layer_names: tuple[str, ...] = (
        "eas_A",
        "eas_a",
        "eas_C",
        "eas_c",
        "eas_B",
        "eas_b",
        "eas_router",
        "eas_router_bias",
    )
    other_param_names: tuple[str, ...] = ("eas_config", "gates")
    is_pia: bool
    touch_idle = False
    """Whether an adapter that a training forward does not use takes part all the same, by adding zero: for
    DistributedDataParallel, which expects a gradient for every parameter."""
    unquantised = Dequantiser(torch.float32)
    """What makes folded linears out of quantised ones; `EASModel` sets it before it merges."""

    def __init__(self, base_layer: nn.Module, arm: Arm) -> None:
        super().__init__()
        self._wrap(base_layer)
        self.arm = arm
        self.stacked_axis = arm.row.stacked_axis
        self.inputs, self.hidden_size = inputs_of(self.base_layer, arm, self.is_pia)
        self.pooled_size = self.hidden_size
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.eas_dropout = nn.ModuleDict()
        self.eas_config: dict[str, EASConfig] = {}
        # Whether each adapter skips the attention; one dictionary for the attention and the FFN of a layer.
        self.gates: dict[str, bool] = {}
        self._disable_adapters = False
        self.frozen_peft_weight_names = {}
        self.merged_adapters: list[str] = []
        self._unfolded: dict[str, nn.Module | nn.Parameter] = {}

    def _wrap(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes of its attentions
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # Adapters ---------------------------------------------------------------------------------------------------------

    def create_adapter(self, adapter_name: str, config: EASConfig, dtype: torch.dtype | None = None) -> None:
        """Create the parameters of an adapter, an identity if `config.init_weights`; of the base's dtype by default.

        None for an attention whose weights are others', too: see `Attentions.attention_inputs`.
        """
        if not self.inputs:
            return
        d, groups, is_pia = self.hidden_size, config.groups, self.is_pia
        rank = config.r_pia if is_pia else config.r
        parameters = {"C" if is_pia else "A": _kaiming(rank, d)}
        if self.propagates(config):
            parameters["A"] = _kaiming(rank, self.pooled_size)
        if config.use_bias:
            parameters |= {k.lower(): torch.zeros(rank) for k in ("A", "C") if k in parameters}
            parameters["b"] = torch.zeros(2, d)
        if config.router == "prompt":
            # drawn, since two equal branches would never part
            parameters |= {"router": _kaiming(2, d), "router_bias": torch.zeros(2)}
        else:
            parameters["router"] = torch.zeros(2)
        blocks = torch.empty(2, groups, d // groups, rank // groups)
        parameters["B"] = nn.init.zeros_(blocks) if config.init_weights else nn.init.normal_(blocks, std=0.02)
        for name, value in parameters.items():
            getattr(self, f"eas_{name}")[adapter_name] = nn.Parameter(value)
        self.eas_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for name in parameters if dtype is not None else ():
            values = getattr(self, f"eas_{name}")
            values[adapter_name] = values[adapter_name].to(dtype)

    def propagates(self, config: EASConfig) -> bool:
        """Whether an adapter here takes the mean over the prompt's tokens, or over those of the other modality."""
        return self.is_pia and config.propagation == "prompt" and self.arm.row.pools != "nothing"

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the parameters of `adapter_name` exist here."""
        return adapter_name in self.eas_B

    def adapter(self, adapter_name: str) -> Adapter:
        """The parameters of an adapter, in the form that the mathematics has them."""

        def get(name: str) -> torch.Tensor | None:
            parameters = getattr(self, f"eas_{name}")
            return parameters.get(adapter_name)

        config = self.eas_config[adapter_name]
        up, up_bias = pia.dense_up(get("B")) * config.scaling, get("b")
        return Adapter(
            down=get("C") if self.is_pia else get("A"),
            down_bias=get("c") if self.is_pia else get("a"),
            up=up / 2 if self.is_pia else up,
            up_bias=None if up_bias is None else up_bias * config.scaling,
            prompt_down=get("A") if self.is_pia else None,
            prompt_down_bias=get("a") if self.is_pia else None,
        )

    def acting_adapter(self) -> str | None:
        """The adapter that this forward goes through, if any."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        names = self.merged_adapters or self.active_adapters
        return names[0] if names and names[0] in self.eas_config else None

    def delta(self, adapter_name: str, z: torch.Tensor, context: PromptContext) -> torch.Tensor:
        """What the adapter adds to the input `z (B, T, d)`: equations (1) and (2) without their first term."""
        config, adapter = self.eas_config[adapter_name], self.adapter(adapter_name)
        wide = self.eas_dropout[adapter_name](self._cast_input_dtype(z, adapter.down.dtype))

        def mean() -> torch.Tensor:
            return self._cast_input_dtype(context.mean(wide), adapter.down.dtype)

        router, temperature = self.eas_router[adapter_name], config.temperature
        if config.router == "static":
            alpha = torch.softmax(router, dim=-1)
        else:
            bias = self.eas_router_bias[adapter_name]
            alpha = context.once("alpha", lambda: torch.softmax(F.linear(mean(), router, bias) / temperature, dim=-1))
        hidden = F.linear(wide, adapter.down, adapter.down_bias)
        if adapter.prompt_down is not None:
            hidden = hidden + context.once("p", lambda: F.linear(mean(), adapter.prompt_down, adapter.prompt_down_bias))
        return pia.up_project(hidden, adapter.up, adapter.up_bias, alpha).to(z.dtype)

    def parameters_of(self, adapter_name: str, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """The parameters of an adapter, or those of them that are called so."""
        by_name = (getattr(self, name) for name in (self.adapter_layer_names if names is None else names))
        return [parameters[adapter_name] for parameters in by_name if adapter_name in parameters]

    def idle_names(self, is_skipped: bool) -> tuple[str, ...]:
        """Names of the parameters that a forward does not use when the attention is skipped, or is not."""
        raise NotImplementedError

    def drop_parameters(self, adapter_name: str, names: Iterable[str]) -> None:
        """Delete the parameters of an adapter that are called so; its gate stays."""
        for name in names:
            parameters = getattr(self, name)
            if adapter_name in parameters:
                del parameters[adapter_name]
        if not self.has_adapter(adapter_name) and adapter_name in self.eas_dropout:
            del self.eas_dropout[adapter_name]

    def freeze_context(self, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
        """Make constants of what an adapter takes from the prompt; its biases are created if it has none.

        Args:
            adapter_name: The adapter.
            state: What to put in its place: `p (r,)` of equation (3), `alpha (2,)` of `router="prompt"`.
        """
        like = self.eas_B[adapter_name]

        def put(name: str, value: torch.Tensor) -> None:
            getattr(self, name)[adapter_name] = nn.Parameter(value.to(like), requires_grad=like.requires_grad)

        down = self.eas_C if self.is_pia else self.eas_A
        down_bias = "eas_c" if self.is_pia else "eas_a"
        for name, size in ((down_bias, len(down[adapter_name])), ("eas_b", (2, self.hidden_size))):
            if adapter_name not in getattr(self, name):
                put(name, torch.zeros(size))
        if "alpha" in state:
            put("eas_router", state["alpha"].log())
            del self.eas_router_bias[adapter_name]
        if "p" in state:
            put("eas_c", self.eas_c[adapter_name].data.double() + state["p"])
            for parameters in (self.eas_A, self.eas_a):
                if adapter_name in parameters:
                    del parameters[adapter_name]

    def _touched(self, hidden_states: torch.Tensor, adapter_name: str) -> torch.Tensor:
        parameters = self.parameters_of(adapter_name) if self.touch_idle and self.training else []
        if not parameters:
            return hidden_states
        zero = 0.0 * sum(parameter.sum() for parameter in parameters)
        return hidden_states + zero.to(hidden_states.dtype)

    # Folding ----------------------------------------------------------------------------------------------------------

    def is_folded_by(self, adapter_name: str) -> bool:
        """Whether this adapter changes this module, and in a way that its weights can hold."""
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
        if self.is_folded_by(adapter_name):
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

    def _put(self, name: str, linear: nn.Module | nn.Parameter) -> None:
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
        if self.has_adapter(adapter_name) and self.is_folded_by(adapter_name):
            tensors += [t for _, linear in self._folded(adapter_name) for t in _tensors(linear)]
        if not all(torch.isfinite(t).all() for t in tensors):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")

    def _folded(self, adapter_name: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """What reads this module's input, one by one, with the adapter folded in."""
        adapter = self.mixed(adapter_name)
        biases = (None, None) if self.is_shifted(adapter_name) else (adapter.down_bias, adapter.up_bias)
        for name in self.inputs:
            linear = _get(self.base_layer, name)
            check_foldable(linear)
            if _tensors(linear)[0].device.type == "meta":
                raise ValueError("The model's weights are offloaded: load it without offloading before merging it.")
            yield name, _fold(linear, self.stacked_axis, adapter, *biases, self.unquantised)

    def check_foldable(self) -> None:
        """Refuse linears that nothing can be folded into, see `quantized.check_foldable`."""
        for name in self.inputs:
            check_foldable(_get(self.base_layer, name))

    def is_shifted(self, adapter_name: str) -> bool:
        """Whether folding leaves something to be added to the input: what depends on the prompt, and the biases with
        it; or biases that there is no place for."""
        if any(part.propagates(part.eas_config[adapter_name]) for part in self.parts(adapter_name)):
            return True
        if self.is_pia and self.arm.row.ffn_masks_input:
            return self.eas_config[adapter_name].use_bias
        return self.eas_config[adapter_name].use_bias and not all(
            isinstance(linear, nn.Module) and "bias" in linear._parameters
            for linear in (_get(self.base_layer, name) for name in self.inputs)
        )

    def without_bias(self) -> list[str]:
        """Names of the linears that read the input and had no bias before anything was folded."""
        linears = {name: _get(self.base_layer, name) for name in self.inputs} | self._unfolded
        return [name for name, linear in linears.items() if linear.bias is None]

    @torch.no_grad()
    def input_shifts(self, adapter_name: str) -> dict[EASLayer, InputShift]:
        """What folded adapters leave to be added to the input, equation (10), by the one that it comes from."""
        adapter = self.mixed(adapter_name)
        up, constant = pia.input_shift(adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        parts = self.parts(adapter_name)
        shifts = {}
        for part, columns in zip(parts, up.split([p.rank(adapter_name) for p in parts], dim=1), strict=True):
            rank = part.rank(adapter_name) if part.propagates(part.eas_config[adapter_name]) else 0
            has_bias = constant is not None and not shifts  # there is one constant for all of them
            shift = InputShift(self.hidden_size, rank, has_bias, part.pooled_size, device=device, dtype=dtype)
            if rank:
                shift.down.weight.copy_(part.eas_A[adapter_name])
                shift.up.weight.copy_(columns)
            if has_bias:
                shift.bias.copy_(constant)
            shifts[part] = shift.requires_grad_(False)
        return shifts

    def parts(self, adapter_name: str) -> list[EASLayer]:
        """The modules whose adapters are folded in here: this one, and see `EASFeedForward`."""
        return [self]

    @property
    def folder(self) -> EASLayer:
        """The module that folds this one's adapters in."""
        return self

    def rank(self, adapter_name: str) -> int:
        """Rank of an adapter."""
        return len((self.eas_C if self.is_pia else self.eas_A)[adapter_name])

    def mixed(self, adapter_name: str) -> Adapter:
        """What is folded, for `router="static"`, as one adapter of the form of equation (1).

        Branches are added up: `up (d, r)`, `up_bias (d,)`. Several adapters before one FFN are one of the sum of their
        ranks. The bias of equation (3) is part of `down_bias`.
        """
        mixed = []
        for part in self.parts(adapter_name):
            adapter = part.adapter(adapter_name)
            alpha = torch.softmax(part.eas_router[adapter_name], dim=-1)
            down_bias = adapter.down_bias
            if adapter.prompt_down_bias is not None:
                down_bias = down_bias + adapter.prompt_down_bias
            up_bias = None if adapter.up_bias is None else pia.mix(adapter.up_bias, alpha)
            mixed.append((adapter.down, down_bias, pia.mix(adapter.up, alpha), up_bias))
        downs, down_biases, ups, up_biases = zip(*mixed, strict=True)
        has_bias = up_biases[0] is not None
        return Adapter(
            down=torch.cat(downs),
            down_bias=torch.cat(down_biases) if has_bias else None,
            up=torch.cat(ups, dim=1),
            up_bias=sum(up_biases) if has_bias else None,
            prompt_down=None,
            prompt_down_bias=None,
        )

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
        self._unfolded = {}
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
            if names and names[0] in self.eas_config and self.is_folded_by(names[0]):
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
        output_norms: The norms behind it, which a stand-in does not go through.
    """

    is_pia = False
    adapter_layer_names = (*EASLayer.adapter_layer_names, "eas_stand_in")
    other_param_names = (*EASLayer.other_param_names, "eas_skip", "drawn")

    def __init__(
        self, base_layer: nn.Module, arm: Arm, stream_size: int = 0, output_norms: Iterable[nn.Module] = ()
    ) -> None:
        super().__init__(base_layer, arm)
        self.stream_size = stream_size
        self.bypass = Bypass(arm.row.form(), arm.index, base_layer)
        self._hooks = [norm.register_forward_hook(self._passed) for norm in output_norms]
        if arm.row.core:
            core = base_layer.get_submodule(arm.row.core)
            self._hooks.append(core.register_forward_pre_hook(self._adapted, with_kwargs=True))
        self.eas_skip = BufferDict(persistent=True)
        # What training forwards go by instead of the gates while a search draws sets.
        self.drawn: dict[str, bool] = {}
        # Adapters whose stand-ins have been measured, or are known not to have been; one set for all attentions.
        self.measured: set[str] = set()
        self.register_load_state_dict_post_hook(_read_gates)

    def set_gate(self, adapter_name: str, skip: bool) -> None:
        """Skip this attention whenever `adapter_name` is active, or don't."""
        self.gates[adapter_name] = skip
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        self.eas_skip[adapter_name] = torch.tensor(skip, device=device)

    def skips(self, adapter_name: str) -> bool:
        """Whether a forward in the present mode, of training or not, skips this attention."""
        gate = self.gates[adapter_name]
        return self.drawn.get(adapter_name, gate) if self.training else gate

    def create_stand_in(self, adapter_name: str, config: EASConfig, dtype: torch.dtype | None = None) -> None:
        """Create the stand-in `c (d,)` of an adapter, as zero, if it has one and lacks it; of the base's dtype by
        default."""
        if config.stand_in == "zero" or not self.stream_size or adapter_name in self.eas_stand_in:
            return
        self.eas_stand_in[adapter_name] = nn.Parameter(torch.zeros(self.stream_size))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if dtype is not None:
            self.eas_stand_in[adapter_name] = self.eas_stand_in[adapter_name].to(dtype)

    def idle_names(self, is_skipped: bool) -> tuple[str, ...]:
        return EASLayer.adapter_layer_names if is_skipped else ("eas_stand_in",)

    def needs_prompt(self) -> bool:
        """Whether this layer, as it stands, depends on the prompt of a decoder."""
        name = self.acting_adapter()
        if name is None or self.arm.row.pools != "prompt":
            return False
        config = self.eas_config[name]
        return config.router == "prompt" or (self.skips(name) and config.propagation == "prompt")

    def is_folded_by(self, adapter_name: str) -> bool:
        return bool(self.inputs) and not self.gates[adapter_name] and self.eas_config[adapter_name].router == "static"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        if name is not None and self.skips(name):
            enter_layer(self.bypass.form, self.bypass.context(args, kwargs, slot_state))
            first = args[0] if args else kwargs["hidden_states"]
            if self.training and name not in self.measured:
                self._check_measured(name)
            stream = self.bypass.stream(args, kwargs, self.base_layer, self._stand_in(name, first))
            return self.bypass.returned(self._touched(stream, name), args, kwargs)
        enter_layer(self.bypass.form, None)
        if name is not None:
            args, kwargs = change_input(args, kwargs, lambda z: self._touched(z, name))
        if self.arm.row.core:
            mask_of(kwargs)
        else:
            args, kwargs = self._adapted(self.base_layer, args, kwargs)
        return self.base_layer(*args, **kwargs)

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

    def _stand_in(self, adapter_name: str, first: torch.Tensor) -> torch.Tensor:
        """What a skipped attention adds to the stream `first (B, T, ...)`: `(B, T, d)`."""
        nothing = first.new_zeros(*first.shape[:-1], self.stream_size)
        if adapter_name not in self.eas_stand_in:
            return nothing
        return nothing + self.eas_stand_in[adapter_name].to(first.dtype)

    def _passed(self, norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The output of a norm behind the attention: a stand-in is what is left after it."""
        name = self.acting_adapter()
        return args[0] if name is not None and self.skips(name) else output

    def _adapted(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the attention, or of its core, with the input as the active adapter gives it."""
        name = self.acting_adapter()
        routed = name is not None and self.eas_config[name].router == "prompt"
        context = self.bypass.context(args, kwargs, cache_state if routed else _nowhere)
        if name is None or not self.inputs:
            return args, kwargs
        if not (self.merged and self.is_folded_by(name)):
            return change_input(args, kwargs, lambda z: z + self.delta(name, z, context))
        if self.is_shifted(name):
            return change_input(args, kwargs, lambda z: self.input_shifts(name)[self](z, context))
        return args, kwargs

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for hook in self._hooks:
            hook.remove()
        return base_layer


class EASFeedForward(EASLayer):
    """A FFN, with a PIA (2) in front while an attention of its layer is skipped.

    Where a layer has a cross-attention, too, there is a further PIA for that; what they add to the input adds up.

    Args:
        base_layer: The FFN.
        arms: The attentions of its layer.
        pooled_sizes: Size of the tokens that each of them takes keys and values from; `None`: that of the FFN's input.
        name: Name of the FFN in the model.
    """

    is_pia = True

    def __init__(self, base_layer: nn.Module, arms: list[Arm], pooled_sizes: list[int | None], name: str) -> None:
        super().__init__(base_layer, arms[0])
        self.name = name
        self.pooled_size = pooled_sizes[0] or self.hidden_size
        self.eas_further = nn.ModuleDict()
        for arm, size in zip(arms[1:], pooled_sizes[1:], strict=True):
            self.eas_further[arm.row.kind] = FurtherPIA(self, arm, size)

    @property
    def pias(self) -> list[EASLayer]:
        """The PIA of each attention."""
        return [self, *self.eas_further.values()]

    def pia_of(self, arm: Arm) -> EASLayer:
        """The PIA that stands for an attention."""
        return next(pia for pia in self.pias if pia.arm == arm)

    def idle_names(self, is_skipped: bool) -> tuple[str, ...]:
        return () if is_skipped else self.adapter_layer_names

    def _attention_of(self, arm: Arm) -> str:
        """What the attention is called that enters the context here, see `enter_layer`."""
        return arm.row.attention if self.name == arm.ffns[0] else looking_back(arm.row.attention)

    def parts(self, adapter_name: str) -> list[EASLayer]:
        return [pia for pia in self.pias if pia.gates.get(adapter_name, False)]

    def is_folded_by(self, adapter_name: str) -> bool:
        return bool(self.parts(adapter_name)) and self.eas_config[adapter_name].router == "static"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        contexts = [(part, take_context(self._attention_of(part.arm))) for part in self.pias]
        if name is not None:
            args, kwargs = change_input(args, kwargs, lambda z: self._adapted(name, z, contexts))
        return self.base_layer(*args, **kwargs)

    def _adapted(
        self, name: str, z: torch.Tensor, contexts: list[tuple[EASLayer, PromptContext | None]]
    ) -> torch.Tensor:
        is_folded = self.merged and self.is_folded_by(name)
        if is_folded and not self.is_shifted(name):
            return z
        changes = self.input_shifts(name) if is_folded else {}
        total = z
        for part, context in contexts:
            if context is None:
                total = part._touched(total, name)
            elif is_folded:
                total = by_row(changes[part], total, context)
            else:
                total = total + by_row(functools.partial(part.delta, name), z, context)
        return total

    def unmerge(self) -> None:
        super().unmerge()
        for part in self.eas_further.values():
            part.merged_adapters = []

    def delete_adapter(self, adapter_name: str) -> None:
        for part in self.eas_further.values():  # PEFT passes over modules whose name has the tuner's prefix
            part.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)


class FurtherPIA(EASLayer):
    """The PIA of a layer's second attention, in the `EASFeedForward` that folds it in.

    Args:
        ffn: The wrapped FFN.
        arm: The attention.
        pooled_size: Size of the tokens that it takes keys and values from.
    """

    is_pia = True

    def __init__(self, ffn: EASFeedForward, arm: Arm, pooled_size: int | None) -> None:
        super().__init__(ffn, arm)
        self.pooled_size = pooled_size or self.hidden_size

    def _wrap(self, base_layer: nn.Module) -> None:
        self._ffn = (base_layer,)  # in a tuple, so that it is not a child

    @property
    def base_layer(self) -> nn.Module:
        return self.folder.base_layer

    def idle_names(self, is_skipped: bool) -> tuple[str, ...]:
        return () if is_skipped else self.adapter_layer_names

    def is_folded_by(self, adapter_name: str) -> bool:
        return self.gates.get(adapter_name, False) and self.eas_config[adapter_name].router == "static"

    @property
    def folder(self) -> EASLayer:
        return self._ffn[0]

    def fold(self, adapter_name: str) -> dict[str, nn.Module | nn.Parameter]:
        return {}  # `folder` does it

    def unmerge(self) -> None:
        self.merged_adapters = []


Wrappers = dict[int | str, tuple[EASAttention | None, list[EASLayer]]]
"""Attentions that have an adapter (`None`: that have not), each with the PIAs that stand for it."""


def _nowhere(cache: object, layer_idx: int) -> dict[str, torch.Tensor]:
    """Where what depends on nothing is kept."""
    return {}


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


def _get(module: nn.Module, name: str) -> nn.Module | nn.Parameter | None:
    """A linear or a stacked weight of `module` by its name, `""` for the module itself; `None` if there is none."""
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)
    return module


def _tensors(linear: nn.Module | nn.Parameter) -> list[torch.Tensor]:
    return [linear] if isinstance(linear, nn.Parameter) else list(linear.parameters())


def _is_transposed(linear: nn.Module) -> bool:
    return isinstance(linear, Conv1D)


def _in_features(linear: nn.Module | nn.Parameter, stacked_axis: int) -> int:
    if isinstance(linear, nn.Parameter):
        return linear.shape[stacked_axis]
    if hasattr(linear, "in_features"):
        return linear.in_features
    return linear.weight.shape[0 if _is_transposed(linear) else -1]


def _fold(
    linear: nn.Module | nn.Parameter,
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
