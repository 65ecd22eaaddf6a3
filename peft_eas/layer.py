"""The tuner layers: an attention with its gate and its stand-in, and a FFN."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from .adapter import kaiming
from .config import EASConfig
from .families import Place
from .runtime.eas_attention import Skip, StandIn
from .runtime.eas_convention import change_input
from .runtime.eas_record import StandInShape
from .site import EASLayer


class EASAttention(EASLayer):
    """An attention that its layer keeps, with an adapter in front (1), or that is skipped and leaves its stand-in (2).

    The gate is saved with the adapter, as the buffer `eas_skip`, so that it survives a resume.

    Args:
        base_layer: The attention.
        place: Where it is in its model.
        stream_size: Size of the residual stream that it adds to; 0 for one that is never skipped.
        context_size: Size of the tokens that a cross-attention looks at.
        output_norms: The norms behind it, which what it leaves does not go through.
    """

    is_ffn = False
    adapter_layer_names = ("eas_adapter", "eas_stand_in")
    other_param_names = (*EASLayer.other_param_names, "gates", "eas_skip")

    def __init__(
        self,
        base_layer: nn.Module,
        place: Place,
        stream_size: int = 0,
        context_size: int | None = None,
        output_norms: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__(base_layer, place)
        self.eas_stand_in = nn.ModuleDict()
        self.stream_size = stream_size
        self.read_size = self.hidden_size or stream_size
        self.pooled_size = context_size or self.read_size
        self.skip = Skip(place.row, place.index, base_layer)
        self._hooks = [norm.register_forward_hook(self._passed) for norm in output_norms]
        if place.row.core:
            core = base_layer.get_submodule(place.row.core)
            self._hooks.append(core.register_forward_pre_hook(self._before_core, with_kwargs=True))
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

    def stand_in(self, adapter_name: str) -> StandIn:
        """What it leaves where it is skipped (2)."""
        return cast(StandIn, self.eas_stand_in[adapter_name])

    def skips(self, adapter_name: str) -> bool:
        return self.gates[adapter_name]

    def needed(self, is_skipped: bool) -> tuple[str, ...]:
        return ("eas_stand_in",) if is_skipped else ("eas_adapter",)

    def make(self, part: str, config: EASConfig, **factory: Any) -> nn.Module | None:
        if part == "eas_adapter":
            return super().make(part, config, **factory)
        if not self.stream_size:
            return None
        is_linear, has_mean = config.stand_in == "linear", config.propagation == "mean"
        shape = StandInShape(
            width=self.stream_size,
            constant=config.stand_in != "zero",
            read=self.read_size * is_linear,
            rank=config.r_pia * is_linear,
            pooled=self.pooled_size * has_mean,
            mean_rank=config.r_pia * has_mean,
        )
        stand_in = StandIn(shape, **factory)
        for down, up in ((stand_in.down, stand_in.up), (stand_in.mean_down, stand_in.mean_up)):
            if down is not None and up is not None:
                with torch.no_grad():
                    down.copy_(kaiming(*down.shape))
                    if not config.init_weights:
                        nn.init.normal_(up, std=0.02)
        return stand_in

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Refuse a gate that contradicts the set that the adapter has the parameters of; see `EASModel`, which follows
        it where it can."""
        for name, skip in self.gates.items():
            saved = state_dict.get(f"{prefix}eas_skip.{name}")
            if self.eas_config[name].skip_layers is not None and saved is not None and bool(saved) != skip:
                loaded, present = ("keeps", "skips") if skip else ("skips", "keeps")
                raise ValueError(
                    f"The state dict {loaded} the attention {self.place.name!r}, and adapter {name!r} {present} it: "
                    "make the adapter with the set that was saved, `EASConfig(skip_layers=[...])`, or load into the "
                    "PEFT model, and not into a part of it."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        if name is None:
            self.skip.remembered.retain(kwargs)
            return self.base_layer(*args, **kwargs)
        if self.training and self.eas_config[name].skip_layers is None:
            self._check_searched(name)
        if self.skips(name):
            if self.training and name not in self.measured:
                self._check_measured(name)
            output = self.skip(self.stand_in(name), self.base_layer, args, kwargs)
            if isinstance(output, tuple):
                return self.touched(name, output[0]), *output[1:]
            return self.touched(name, output)
        self.skip.remembered.retain(kwargs)
        if self.touch_idle:
            args, kwargs = change_input(args, kwargs, lambda z: self.touched(name, z))
        if self.has_adapter(name) and not self.place.row.core:
            args, kwargs = self.through_front(name, args, kwargs)
        return self.base_layer(*args, **kwargs)

    def _before_core(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the attention's core, where only that reads what the adapter gives."""
        name = self.acting_adapter()
        return self.through_front(name, args, kwargs) if name is not None and self.has_adapter(name) else (args, kwargs)

    def _passed(self, norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The output of a norm behind the attention: a stand-in is what is left after it."""
        name = self.acting_adapter()
        return args[0] if name is not None and self.skips(name) else output

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
        constant = self.stand_in(adapter_name).constant
        if constant is not None and constant.numel() and not constant.any():  # none: ZeRO-3 has it elsewhere
            warnings.warn(
                f"The stand-ins of adapter {adapter_name!r} start at zero: skipped attentions leave nothing at first. "
                "Call `peft_eas.initialize_eas_weights(model, dataloader)` before training, or give the Trainer an "
                "`EASCallback`, which does it; `stand_in='zero'` is for models that are to have none.",
                stacklevel=2,
            )

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
        place: The attention, or the first of those that it follows.
        name: Name of the FFN in the model.
    """

    is_ffn = True

    def __init__(self, base_layer: nn.Module, place: Place, name: str) -> None:
        super().__init__(base_layer, place)
        self.name = name

    def is_shifted(self, adapter_name: str) -> bool:
        if self.place.row.ffn_masks_input:
            return self.eas_config[adapter_name].use_bias
        return super().is_shifted(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.acting_adapter()
        if name is not None and self.has_adapter(name):
            if self.touch_idle:
                args, kwargs = change_input(args, kwargs, lambda z: self.touched(name, z))
            args, kwargs = self.through_front(name, args, kwargs)
        return self.base_layer(*args, **kwargs)


Wrappers = dict[int | str, tuple[EASAttention, list[EASFeedForward]]]
"""The attentions of a model, each wrapped (`None`: it has no adapter), with the wrapped FFNs behind it."""


def _read_gates(module: EASAttention, _incompatible_keys: Any) -> None:
    """After loading: the gate that a forward looks at is a Python bool, since reading a tensor would synchronise."""
    for name, gate in module.eas_skip.items():
        module.gates[name] = bool(gate)
