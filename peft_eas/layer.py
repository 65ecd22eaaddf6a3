"""The tuner layers: an attention with its adapter and skip gate, and a FFN with its PIA."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import pia
from .config import EASConfig
from .families import Family
from .modeling_eas import (
    InputShift,
    PromptContext,
    by_row,
    cache_of,
    cache_state,
    change_input,
    current_context,
    enter_layer,
    mask_of,
    prompt_mean,
    prompt_slot,
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
        family: How its model is built.
        index: Index of its layer.

    Raises:
        ValueError: if it has none of the linears that the family names.
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

    def __init__(self, base_layer: nn.Module, family: Family, index: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.adds_residual = family.adds_residual
        self.stacked_axis = family.stacked_axis
        named = family.ffn_inputs if self.is_pia else family.attention_inputs
        # families name all that some of their layers have
        self.inputs = tuple(name for name in named if _get(base_layer, name) is not None)
        if not self.inputs:
            raise ValueError(
                f"{type(base_layer).__name__} of layer {index} has none of {', '.join(named)}, which the row of "
                f"{family.model_type!r} names as what reads its input."
            )
        self.hidden_size = _in_features(_get(base_layer, self.inputs[0]), self.stacked_axis)
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes of its attentions
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # Adapters ---------------------------------------------------------------------------------------------------------

    def create_adapter(self, adapter_name: str, config: EASConfig, dtype: torch.dtype | None = None) -> None:
        """Create the parameters of an adapter, an identity if `config.init_weights`; of the base's dtype by default."""
        d, groups, is_pia = self.hidden_size, config.groups, self.is_pia
        rank = config.r_pia if is_pia else config.r
        parameters = {"C" if is_pia else "A": _kaiming(rank, d)}
        if is_pia and config.propagation == "prompt":
            parameters["A"] = _kaiming(rank, d)
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

    def delta(self, z: torch.Tensor, adapter_name: str, context: PromptContext) -> torch.Tensor:
        """What the adapter adds to the input `z (B, T, d)`: equations (1) and (2) without their first term."""
        config, adapter = self.eas_config[adapter_name], self.adapter(adapter_name)
        wide = self.eas_dropout[adapter_name](self._cast_input_dtype(z, adapter.down.dtype))
        router, temperature = self.eas_router[adapter_name], config.temperature
        if config.router == "static":
            alpha = torch.softmax(router, dim=-1)
        else:
            bias = self.eas_router_bias[adapter_name]
            alpha = context.once(
                "alpha",
                lambda mask: torch.softmax(F.linear(prompt_mean(wide, mask), router, bias) / temperature, dim=-1),
            )
        hidden = F.linear(wide, adapter.down, adapter.down_bias)
        if adapter.prompt_down is not None:
            hidden = hidden + context.once(
                "p", lambda mask: F.linear(prompt_mean(wide, mask), adapter.prompt_down, adapter.prompt_down_bias)
            )
        return pia.up_project(hidden, adapter.up, adapter.up_bias, alpha).to(z.dtype)

    def adapted(self, adapter_name: str, z: torch.Tensor, context: PromptContext) -> torch.Tensor:
        """`z (B, T, d)` as the adapter gives it to the attention or FFN: equations (1) and (2)."""
        return z + self.delta(z, adapter_name, context)

    def parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters of an adapter."""
        by_name = (getattr(self, name) for name in self.adapter_layer_names)
        return [parameters[adapter_name] for parameters in by_name if adapter_name in parameters]

    def drop_adapter(self, adapter_name: str) -> None:
        """Delete the parameters of an adapter that is idle here; its gate stays."""
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters:
                del parameters[adapter_name]
        if adapter_name in self.eas_dropout:
            del self.eas_dropout[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)

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
        if not (self.touch_idle and self.training and self.has_adapter(adapter_name)):
            return hidden_states
        zero = 0.0 * sum(parameter.sum() for parameter in self.parameters_of(adapter_name))
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
        if not self.has_adapter(adapter_name):
            return
        tensors = [t for t in self.adapter(adapter_name) if t is not None]
        if self.is_folded_by(adapter_name):
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
        if self.is_pia and self.eas_config[adapter_name].propagation == "prompt":
            return True
        return self.eas_config[adapter_name].use_bias and not all(
            isinstance(linear, nn.Module) and "bias" in linear._parameters
            for linear in (_get(self.base_layer, name) for name in self.inputs)
        )

    def without_bias(self) -> list[str]:
        """Names of the linears that read the input and had no bias before anything was folded."""
        linears = {name: _get(self.base_layer, name) for name in self.inputs} | self._unfolded
        return [name for name, linear in linears.items() if linear.bias is None]

    @torch.no_grad()
    def input_shift(self, adapter_name: str) -> InputShift:
        """What a folded adapter leaves to be added to the input, equation (10)."""
        adapter = self.mixed(adapter_name)
        biases = [bias for bias in (adapter.down_bias, adapter.prompt_down_bias) if bias is not None]
        up, constant = pia.input_shift(adapter.down, sum(biases) if biases else None, adapter.up, adapter.up_bias)
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        rank = 0 if adapter.prompt_down is None else len(adapter.down)
        shift = InputShift(self.hidden_size, rank, constant is not None, device=device, dtype=dtype)
        if rank:
            shift.down.weight.copy_(adapter.prompt_down)
            shift.up.weight.copy_(up)
        if constant is not None:
            shift.bias.copy_(constant)
        return shift.requires_grad_(False)

    def mixed(self, adapter_name: str) -> Adapter:
        """The parameters of an adapter with `router="static"`, branches added up: `up (d, r)`, `up_bias (d,)`."""
        adapter = self.adapter(adapter_name)
        alpha = torch.softmax(self.eas_router[adapter_name], dim=-1)
        up_bias = None if adapter.up_bias is None else pia.mix(adapter.up_bias, alpha)
        return adapter._replace(up=pia.mix(adapter.up, alpha), up_bias=up_bias)

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
    """An attention that its layer keeps, with an adapter in front (1), or that is skipped and gives zero.

    The gate is saved with the adapter, as the buffer `eas_skip`, so that it survives a resume.
    """

    is_pia = False
    other_param_names = (*EASLayer.other_param_names, "eas_skip", "drawn")

    def __init__(self, base_layer: nn.Module, family: Family, index: int) -> None:
        super().__init__(base_layer, family, index)
        self.eas_skip = BufferDict(persistent=True)
        # What training forwards go by instead of the gates while a search draws sets.
        self.drawn: dict[str, bool] = {}
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

    def needs_prompt(self) -> bool:
        """Whether this layer, as it stands, depends on the prompt."""
        name = self.acting_adapter()
        if name is None:
            return False
        config = self.eas_config[name]
        return config.router == "prompt" or (self.skips(name) and config.propagation == "prompt")

    def is_folded_by(self, adapter_name: str) -> bool:
        return not self.gates[adapter_name] and self.eas_config[adapter_name].router == "static"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = mask_of(kwargs)
        name = self.acting_adapter()
        cache = cache_of(kwargs)
        if name is not None and self.skips(name):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            state = {} if cache is None else prompt_slot(cache, self.index).prompt_state
            enter_layer(PromptContext(mask, state))
            return self._touched(args[1] if self.adds_residual else torch.zeros_like(hidden_states), name), None
        enter_layer(None)
        if name is not None:
            is_folded = self.merged and self.is_folded_by(name)
            routed = self.eas_config[name].router == "prompt"
            context = PromptContext(mask, cache_state(cache, self.index) if routed else {})
            if not is_folded:
                args, kwargs = change_input(args, kwargs, lambda z: self.adapted(name, z, context))
            elif self.is_shifted(name):
                args, kwargs = change_input(args, kwargs, lambda z: self.input_shift(name)(z, context))
        return self.base_layer(*args, **kwargs)


class EASFeedForward(EASLayer):
    """A FFN, with a PIA (2) in front while its layer's attention is skipped."""

    is_pia = True

    def is_folded_by(self, adapter_name: str) -> bool:
        return self.gates.get(adapter_name, False) and self.eas_config[adapter_name].router == "static"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, name = current_context(), self.acting_adapter()
        if name is not None and context is None:
            args, kwargs = change_input(args, kwargs, lambda z: self._touched(z, name))
        elif name is not None and not (self.merged and self.is_folded_by(name)):
            args, kwargs = change_input(
                args, kwargs, lambda z: by_row(functools.partial(self.adapted, name), z, context)
            )
        elif name is not None and self.is_shifted(name):
            args, kwargs = change_input(args, kwargs, lambda z: by_row(self.input_shift(name), z, context))
        output = self.base_layer(*args, **kwargs)
        enter_layer(None)  # lets go of the tensors
        return output


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
