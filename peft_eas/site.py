"""A site: the place in front of an attention or a FFN, with the adapters that it has.

Unmerged, a site holds an adapter, which changes what the module reads (numbers are those of docs/method.md):

    adapt(z) = z + s sum_j alpha_j (z A^T B_j^T + b_j) = R z + u                        (1), an `Adapter`

Folded (`merge_adapter`) or merged (`merge_and_unload`), it holds what folding has left. That is nothing where the
linears `y = W z + w` that read the input have biases, and a shift where they have none:

    y = (W R) z + (w + W u),    or    y = (W R) (z + v) + w  with  v = R^-1 u          (10), a `Shift`

Where an attention is skipped, the same module adds the same to the residual stream in all three cases:

    x <- x + k + z E^T F^T + p D^T                                                      (2), a `StandIn`
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from . import pia
from .adapter import Adapter, Dense
from .config import EASConfig
from .families import Place
from .quantized import Dequantiser, Linear, check_foldable, is_quantised
from .readers import folded, folds_finitely, reader, readers_of, tensors_of
from .runtime.eas_attention import Shift
from .runtime.eas_convention import change_input


class EASLayer(nn.Module, BaseTunerLayer):
    """An attention or a FFN, and the site in front of it.

    Args:
        base_layer: The attention or the FFN.
        place: The attention, or the first of those that the FFN follows.

    Raises:
        ValueError: if it has none of the linears that the family's row names.
    """

    adapter_layer_names: tuple[str, ...] = ("eas_adapter",)
    other_param_names: tuple[str, ...] = ("eas_config",)
    is_ffn: bool
    touch_idle = False
    """Whether parameters that a training forward does not use take part all the same, by adding zero: for
    DistributedDataParallel, which expects a gradient for every parameter."""
    unquantised = Dequantiser(torch.float32)
    """What makes folded linears out of quantised ones; `EASModel` sets it before it merges."""

    def __init__(self, base_layer: nn.Module, place: Place) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.readers, self.hidden_size = readers_of(base_layer, place, self.is_ffn)
        self.eas_adapter = nn.ModuleDict()
        self.eas_config: dict[str, EASConfig] = {}
        self._disable_adapters = False
        self.frozen_peft_weight_names: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._unfolded: dict[str, nn.Module | nn.Parameter] = {}
        self._shift: tuple[Shift, ...] = ()  # in a tuple, so that it is none of this module's parameters

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # what forwards ask for, several times in each
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:  # model code reads attributes of its attentions
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # Its adapters -----------------------------------------------------------------------------------------------------

    def skips(self, adapter_name: str) -> bool:
        """Whether a forward skips this module."""
        return False

    def needed(self, is_skipped: bool) -> tuple[str, ...]:
        """Those of `adapter_layer_names` that a forward uses."""
        return ("eas_adapter",)

    def idle(self, adapter_name: str) -> list[str]:
        """Those that it does not use now."""
        needed = self.needed(self.skips(adapter_name))
        return [part for part in self.adapter_layer_names if part not in needed]

    def make(self, part: str, config: EASConfig, **factory: Any) -> nn.Module | None:
        """A fresh part of an adapter; no adapter (1) in front of a module whose weights are others', too."""
        rank = config.r_pia if self.is_ffn else config.r
        return Adapter(config, self.hidden_size, rank, **factory) if self.readers else None

    def create(
        self, adapter_name: str, config: EASConfig, parts: Iterable[str], dtype: torch.dtype | None = None
    ) -> None:
        """Create those of these parts that an adapter has and lacks; of the base's dtype by default."""
        device, base_dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        for part in self.adapter_layer_names:  # all draw their random numbers, so that these are the same for all sets
            made = self.make(part, config, device=device, dtype=dtype or base_dtype)
            if made is not None and part in parts and adapter_name not in getattr(self, part):
                getattr(self, part)[adapter_name] = made

    def parameters_of(self, adapter_name: str, parts: Iterable[str] | None = None) -> list[nn.Parameter]:
        """The parameters of an adapter, or those of these parts."""
        there = (getattr(self, part) for part in (self.adapter_layer_names if parts is None else parts))
        return [p for adapters in there if adapter_name in adapters for p in adapters[adapter_name].parameters()]

    def freeze_idle(self, adapter_name: str) -> None:
        """Train what the set that is skipped needs of an adapter, and nothing else."""
        self.frozen_peft_weight_names[adapter_name] = tuple(self.idle(adapter_name))
        self.set_adapter(self.active_adapters, inference_mode=self.eas_config[adapter_name].inference_mode)

    def drop_idle(self, adapter_name: str) -> None:
        """Delete what the set that is skipped does not need of an adapter."""
        for part in self.idle(adapter_name):
            if adapter_name in getattr(self, part):
                del getattr(self, part)[adapter_name]

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether there is an adapter (1) of this name here."""
        return adapter_name in self.eas_adapter

    def adapter(self, adapter_name: str) -> Adapter:
        """The adapter (1) of this name."""
        return cast(Adapter, self.eas_adapter[adapter_name])

    def acting_adapter(self) -> str | None:
        """The adapter that this forward goes through, if any."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        names = self.merged_adapters or self.active_adapters
        return names[0] if names and names[0] in self.eas_config else None

    def through_front(self, adapter_name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a module behind what the site holds: the adapter, or what folding it has left."""
        held: tuple[nn.Module, ...] = self._shift if self.merged else (self.adapter(adapter_name),)
        for module in held:
            args, kwargs = change_input(args, kwargs, module)
        return args, kwargs

    def touched(self, adapter_name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same tensor, see `touch_idle`."""
        if not (self.touch_idle and self.training):
            return hidden_states
        idle = self.parameters_of(adapter_name, self.idle(adapter_name))
        return hidden_states + sum((0.0 * parameter.sum() for parameter in idle), hidden_states.new_zeros(()))

    # Folding ----------------------------------------------------------------------------------------------------------

    def acts(self, adapter_name: str) -> bool:
        """Whether this adapter changes the input here."""
        return self.has_adapter(adapter_name) and not self.skips(adapter_name)

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
            self._shift = (Shift(self.shift(adapter_name)),) if self.is_shifted(adapter_name) else ()
            self._unfolded = self.fold(adapter_name)
        self.merged_adapters.append(adapter_name)

    @torch.no_grad()
    def fold(self, adapter_name: str) -> dict[str, nn.Module | nn.Parameter]:
        """Put folded linears in place, and return those that were there, by name."""
        before = {}
        for name, arguments in self._to_fold(adapter_name):
            before[name] = arguments[0]
            self._put(name, folded(*arguments))
        return before

    def _put(self, name: str, linear: Linear) -> None:
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(self.base_layer.get_submodule(parent), leaf, linear)
        else:
            self.base_layer = linear

    @torch.no_grad()
    def check_finite(self, adapter_name: str) -> None:
        """Refuse an adapter with NaN or infinite values, or one whose fold has some; changes nothing, nor folds where
        the sizes of the numbers tell.

        Raises:
            ValueError: in the words of PEFT's other tuners.
        """
        is_finite = all(bool(torch.isfinite(p).all()) for p in self.parameters_of(adapter_name))
        if is_finite and self.acts(adapter_name):
            is_finite = all(folds_finitely(*arguments) for _, arguments in self._to_fold(adapter_name))
        if not is_finite:
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")

    def _to_fold(self, adapter_name: str) -> Iterator[tuple[str, tuple[Linear, int, Dense, bool, Dequantiser]]]:
        """What reads this module's input, one by one, each with the arguments of `folded`."""
        adapter, has_bias = self.adapter(adapter_name).dense(), not self.is_shifted(adapter_name)
        for name in self.readers:
            linear = reader(self.base_layer, name)
            check_foldable(linear)
            yield name, (linear, self.place.row.stacked_axis, adapter, has_bias, self.unquantised)

    def check_foldable(self) -> None:
        """Refuse linears that nothing can be folded into, see `quantized.check_foldable`."""
        for name in self.readers:
            check_foldable(reader(self.base_layer, name))

    def is_shifted(self, adapter_name: str) -> bool:
        """Whether folding leaves something to be added to the input: a bias that there is no place for."""
        return self.eas_config[adapter_name].use_bias and not all(
            isinstance(linear, nn.Module) and "bias" in linear._parameters
            for linear in (reader(self.base_layer, name) for name in self.readers)
        )

    def without_bias(self) -> list[str]:
        """Names of the linears that read the input and had no bias before anything was folded."""
        linears = {name: reader(self.base_layer, name) for name in self.readers} | self._unfolded
        return [name for name, linear in linears.items() if linear.bias is None]

    @torch.no_grad()
    def shift(self, adapter_name: str) -> torch.Tensor:
        """What a folded adapter leaves to be added to the input, `(d,)`, equation (10)."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        down, up, bias = self.adapter(adapter_name).dense()
        return pia.input_shift(down, up, cast(torch.Tensor, bias)).to(device, dtype)  # what is shifted has one

    def unmerge(self) -> None:
        """Put the original linears back: the very tensors, so nothing is lost to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, linear in self._unfolded.items():
            device = tensors_of(reader(self.base_layer, name))[0].device
            if isinstance(linear, nn.Parameter):
                linear.data = linear.data.to(device)
            self._put(name, linear.to(device) if isinstance(linear, nn.Module) else linear)
        self._unfolded, self._shift = {}, ()
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


def check_single(adapter_names: list[str]) -> None:
    """EAS adapters don't add up: each skips attentions of its own."""
    if len(adapter_names) > 1:
        raise ValueError(
            f"EAS adapters can't be combined, since each skips attentions of its own: choose one of {adapter_names}."
        )
