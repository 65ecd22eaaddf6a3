"""The skip gates of one adapter, all layers together: what a search works with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from .layer import Wrappers
from .site import EASLayer


class SkipGates:
    """Which attentions an adapter skips, while all that any set needs exists in every layer.

    Made by `model.skip_gates()`. Nothing here creates, drops or freezes a parameter except `drop_idle`.

    Args:
        wrappers: Each wrapped attention that can be skipped and the FFNs behind it, by index of the layer or by name.
        adapter_name: The adapter.
    """

    def __init__(self, wrappers: Wrappers, adapter_name: str) -> None:
        self.wrappers = wrappers
        self.adapter_name = adapter_name

    @property
    def layers(self) -> list[int | str]:
        """The attentions that can be skipped."""
        return list(self.wrappers)

    @property
    def skipped(self) -> list[int | str]:
        """The attentions that are skipped, as a checkpoint would say."""
        return [i for i, (attention, _) in self.wrappers.items() if attention.gates[self.adapter_name]]

    def set(self, skip_layers: Collection[int | str]) -> None:
        """Skip just these."""
        for index, (attention, _) in self.wrappers.items():
            if attention.gates[self.adapter_name] != (index in skip_layers):
                attention.set_gate(self.adapter_name, index in skip_layers)

    @contextmanager
    def skipping(self, skip_layers: Collection[int | str]) -> Iterator[None]:
        """Skip just these inside of the `with`; then what was skipped before."""
        before = {index: attention.gates[self.adapter_name] for index, (attention, _) in self.wrappers.items()}
        try:
            for index, (attention, _) in self.wrappers.items():
                attention.gates[self.adapter_name] = index in skip_layers
            yield
        finally:
            for index, (attention, _) in self.wrappers.items():
                attention.gates[self.adapter_name] = before[index]

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a training forward would not use now."""
        for wrapper in self._all():
            yield from wrapper.parameters_of(self.adapter_name, wrapper.idle(self.adapter_name))

    def touch_idle(self, touch: bool) -> None:
        """Let idle parameters have gradients of zero instead of none, see `EASLayer.touch_idle`."""
        for wrapper in self._all():
            wrapper.touch_idle = touch

    def drop_idle(self) -> None:
        """Delete the parameters that the set which is skipped has no use for."""
        for wrapper in self._all():
            wrapper.drop_idle(self.adapter_name)

    def are_complete(self) -> bool:
        """Whether every attention has both its adapter and its stand-in, as far as it is to have them."""
        attentions = [attention for attention, _ in self.wrappers.values()]
        has_adapters = all(attention.has_adapter(self.adapter_name) for attention in attentions if attention.readers)
        return has_adapters and all(self.adapter_name in attention.eas_stand_in for attention in attentions)

    def _all(self) -> list[EASLayer]:
        return list(dict.fromkeys(w for attention, ffns in self.wrappers.values() for w in (attention, *ffns)))
