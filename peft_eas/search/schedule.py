"""When things happen in a search, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The phases of a training with `total` optimizer steps: warm-up, search, settled.

    Attributes:
        warmup: Steps, from the first on, before attentions are tried.
        settle: The step after which the set is chosen; from `warmup` to here candidates are scored.
        interval: Steps from one round of candidates to the next.
    """

    warmup: int
    settle: int
    interval: int

    @classmethod
    def of(cls, warmup_steps: float, search_steps: float, interval: int, total: int) -> Schedule:
        """Counts (`int`, or 1 and above) or fractions of `total` (below 1), as in `TrainingArguments.warmup_steps`.

        A search given as a fraction has at least one step.
        """
        warmup = _steps(warmup_steps, total)
        search = _steps(search_steps, total)
        return cls(warmup, warmup + max(1, search), interval)

    def phase(self, step: int) -> str:
        """Phase after `step` optimizer steps: `"warm-up"`, `"search"` or `"settled"`."""
        if step >= self.settle:
            return "settled"
        return "warm-up" if step < self.warmup else "search"

    def rate(self, step: int) -> float:
        """By what the learning rate is multiplied in the optimizer step that follows `step` others.

        Once attentions are skipped it rises from nothing again, over as many steps as the warm-up had.
        """
        done = step - self.warmup
        return (done + 1) / (self.warmup + 1) if 0 <= done < self.warmup else 1.0

    def scores_after(self, step: int) -> bool:
        """Whether candidates are scored after `step` optimizer steps: every `interval`, and last where it settles."""
        return self.warmup < step <= self.settle and (self.settle - step) % self.interval == 0


def _steps(given: float, total: int) -> int:
    return round(given * total) if given < 1 else int(given)
