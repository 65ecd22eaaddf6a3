"""The skip gates of one adapter, all layers together: what a search works with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from .layer import EASLayer, Wrappers


class SkipGates:
    """Which attentions an adapter skips, while both its adapters and its PIAs exist in every layer.

    Made by `model.skip_gates()`. Nothing here creates, drops or freezes a parameter except `drop_idle`.

    Args:
        wrappers: Each wrapped attention that can be skipped and what stands for it, by index of the layer or by name.
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
        """Skip just these, in evaluation and in checkpoints, and in training unless other ones are drawn."""
        for index, (attention, _) in self.wrappers.items():
            if attention.gates[self.adapter_name] != (index in skip_layers):
                attention.set_gate(self.adapter_name, index in skip_layers)

    def draw(self, skip_layers: Collection[int | str] | None) -> None:
        """Skip just these in training forwards, until the next draw; `None`: what is `set`."""
        for index, (attention, _) in self.wrappers.items():
            if skip_layers is None:
                attention.drawn.pop(self.adapter_name, None)
            else:
                attention.drawn[self.adapter_name] = index in skip_layers

    @contextmanager
    def skipping(self, skip_layers: Collection[int | str]) -> Iterator[None]:
        """Skip just these inside of the `with`, for models in eval mode; then what was skipped before."""
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
        for attention, pias in self.wrappers.values():
            skips = attention.drawn.get(self.adapter_name, attention.gates[self.adapter_name])
            for wrapper in (attention, *pias):
                yield from wrapper.parameters_of(self.adapter_name, wrapper.idle_names(skips))

    def touch_idle(self, touch: bool) -> None:
        """Let idle adapters have gradients of zero instead of none, see `EASLayer.touch_idle`."""
        for wrapper in self._all():
            wrapper.touch_idle = touch

    def drop_idle(self) -> None:
        """Delete the parameters that the set which is skipped has no use for."""
        for attention, pias in self.wrappers.values():
            for wrapper in (attention, *pias):
                wrapper.drop_parameters(self.adapter_name, wrapper.idle_names(attention.gates[self.adapter_name]))

    def are_complete(self) -> bool:
        """Whether every layer has both its adapter and its PIA, and a stand-in if it is to have one."""
        has_adapters = all(wrapper.has_adapter(self.adapter_name) for wrapper in self._all() if wrapper.inputs)
        stand_ins = [attention.eas_stand_in for attention, _ in self.wrappers.values()]
        counts = sum(self.adapter_name in stand_in for stand_in in stand_ins)
        return has_adapters and counts in (0, len(stand_ins))

    def _all(self) -> Iterator[EASLayer]:
        for attention, pias in self.wrappers.values():
            yield from (attention, *pias)
