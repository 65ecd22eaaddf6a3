"""All that a search knows: a state that travels with checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import one_line
from . import exchange
from .report import ROUND
from .schedule import Schedule


@dataclass
class SearchState:
    """All that a search knows; JSON, so that it travels with checkpoints.

    Attributes:
        layers: Layer index, or name, of each attention.
        count: How many attentions are skipped.
        warmup, settle, interval: The `Schedule`.
        start: The order that the search began with: places in `layers`, the first `count` of which are skipped. Empty
            in the warm-up.
        order: The same, now.
        scores: What `start` goes by: a score of each attention, low for redundant, `None` if infinite; `None` in
            the warm-up.
        rounds: One entry a round: `step`; `tried` (attentions) and `costs` (what skipping each costs, one difference a
            batch; `None` if one was not finite); `losses` (of the set, batch by batch; `None` if not finite);
            `exchanged` (pairs: retained from now on, skipped instead) and `skip_layers`, the set after it.
        ignored: Tries whose loss was not finite.
        comparison: Sets and losses of the start and of what was found, when the search ended, if they differ.
        settled: The chosen set, once it is chosen.
        budget: What the budget was, and what came out.
    """

    layers: list[int | str]
    count: int
    warmup: int
    settle: int
    interval: int
    start: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    scores: list[float | None] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ignored: int = 0
    comparison: dict[str, Any] = field(default_factory=dict)
    settled: list[int | str] | None = None
    budget: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, saved: Any) -> SearchState:
        """The state that a checkpoint has.

        Raises:
            ValueError: if it is not that of a search.
        """
        try:
            state = cls(**saved)
            places, known = list(range(len(state.layers))), {*state.layers}
            is_right = (
                sorted(state.start) == sorted(state.order) == (places if state.scores is not None else [])
                and 0 <= state.count <= len(places)
                and 0 <= state.warmup < state.settle
                and state.interval > 0
                and all(entry.keys() >= ROUND and {*entry["skip_layers"]} <= known for entry in state.rounds)
                and (state.settled is None or {*state.settled} <= known)
                and isinstance(state.budget, dict)
            )
            exchange.costs(state.tries())
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                "The checkpoint's `trainer_state.json` has a search that can't be gone on with "
                f"({type(error).__name__}: {one_line(error)}): go on from an earlier checkpoint, or start anew."
            ) from error
        if not is_right:
            raise ValueError(
                "The checkpoint's `trainer_state.json` has a search that contradicts itself: go on from an earlier "
                "checkpoint, or start anew."
            )
        return state

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup, self.settle, self.interval)

    def best(self, count: int | None = None) -> list[int | str]:
        """The attentions to skip by what is known so far, in the model's order."""
        return self.to_layers(self.order[: self.count if count is None else count])

    def to_layers(self, attentions: Sequence[int]) -> list[int | str]:
        return [self.layers[attention] for attention in sorted(attentions)]

    def tries(self) -> list[tuple[int, list[float]]]:
        """Attention and differences of each try so far; no differences if the loss was not finite."""
        places = {layer: attention for attention, layer in enumerate(self.layers)}
        return [
            (places[layer], differences or [])
            for entry in self.rounds
            for layer, differences in zip(entry["tried"], entry["costs"], strict=True)
        ]
