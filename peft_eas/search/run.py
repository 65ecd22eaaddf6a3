"""The search of one training: what it does at each of the Trainer's events."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..families import find_layers
from ..model import EASModel
from ..processes import gather_object
from . import budget, exchange
from .held_out import COMPARED, MEASURED, HeldOut, fingerprints
from .report import write_report
from .schedule import Schedule
from .start import checked_start, measure_stand_ins, scores_of
from .state import SearchState
from .trainer import Scorer, kept_by

if TYPE_CHECKING:
    from .callback import EASCallback

logger = logging.getLogger(__name__)


class Search:
    """The search of one training: what an `EASCallback` does, with all its side effects.

    Args:
        settings: The callback.
        args: Arguments of the training.
        scorer: What gives losses.
        tuner: The EAS tuner in the model.
        examples: What stand-ins are measured with.
        max_steps: Optimizer steps of the training.
        saved: The state in the checkpoint that the training goes on from, if any.
    """

    def __init__(
        self,
        settings: EASCallback,
        args: TrainingArguments,
        scorer: Scorer,
        tuner: EASModel,
        examples: HeldOut,
        max_steps: int,
        saved: dict | None,
    ) -> None:
        self.settings, self.args, self.scorer, self.tuner, self.examples = settings, args, scorer, tuner, examples
        self.model, self.held_out = scorer.model, scorer.held_out
        self.is_fsdp, self.kept = scorer.trainer.is_fsdp_enabled, kept_by(scorer.trainer)
        self.kept_with: list[int | str] | None = None
        self.idle_before: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.gates = tuner.skip_gates()
        self.config = tuner.peft_config[self.gates.adapter_name]
        next(iter(self.gates.wrappers.values()))[0].searched.add(self.gates.adapter_name)
        if not self.gates.are_complete():
            raise ValueError(
                "A search needs both the adapter and the stand-in of every attention, and some have been dropped or "
                "never made: begin with a fresh adapter, `get_peft_model(model, EASConfig(num_skip=...))`."
            )
        batch = next(examples.many(args.per_device_train_batch_size))
        self.warm_start = checked_start(settings.warm_start, tuner, self.gates, scorer, batch)
        self.metrics: dict[str, float] = {}
        self.written: dict[str, Any] = {}  # the last report
        self.seen: set[int] = set()
        self.hook: RemovableHandle | None = None
        self.lowered: list[tuple[dict[str, Any], Any, Any]] = []  # groups of the optimizer, their rates, and lower ones
        if saved is None:
            count, about = self._count()
            schedule = Schedule.of(settings.warmup_steps, settings.search_steps, settings.interval, max_steps)
            self.state = SearchState(self.gates.layers, count, **asdict(schedule), budget=about)
            self._say(
                f"searching which {count} of {len(self.state.layers)} attentions to skip: none of them to step "
                f"{schedule.warmup}; then they are tried, to step {schedule.settle} of {max_steps}"
            )
        else:
            self.state = SearchState.read(saved)
            if self.state.layers != self.gates.layers:
                raise ValueError(
                    f"The checkpoint's search was over the attentions of layers {self.state.layers}, but this adapter "
                    f"has those of {self.gates.layers}."
                )
        self.gates.touch_idle(args.world_size > 1 and self.kept is None)
        if self.state.settled is None:
            self.gates.set(self.state.best())
            if self.state.warmup == 0 and saved is None:
                self.begin(0)
        else:
            self._settle_on(self.state.settled)

    # What the Trainer's events ask for -------------------------------------------------------------------------------

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Look, in this step alone, at what is trained on: between steps nothing is left on the model."""
        self.release()
        self.lower_rate(self.state.schedule.rate(step), optimizer)
        self.seen.clear()
        if self.settings.search_dataset is None and self.state.settled is None:
            self.hook = self.model.register_forward_pre_hook(self._remember, with_kwargs=True)
        if self.kept is not None and self.kept_with != self.gates.skipped:
            self.kept_with = self.gates.skipped
            self.kept.keep(self.gates.idle_parameters())

    def forget_idle_gradients(self, step: int) -> None:
        """Idle adapters must not move; a gradient of zero would let the optimizer's momentum and decay act on them."""
        if self.args.world_size == 1 or self.kept is not None:
            return  # they have none
        if self.is_fsdp and step == 0:  # see `rewind_idle_state`
            self.idle_before = [(parameter, parameter.detach().clone()) for parameter in self.gates.idle_parameters()]
            return
        for parameter in self.gates.idle_parameters():
            parameter.grad = None

    def rewind_idle_state(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint of FSDP needs the optimizer's state of every parameter: the first step makes it for idle ones,
        too, by gradients of zero, and must not count."""
        for parameter, before in self.idle_before:
            parameter.detach().copy_(before)  # weight decay has changed it
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"] * 0
        self.idle_before = []

    def lower_rate(self, factor: float, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the learning rate for one step; before it begins, as DeepSpeed's optimizer steps in the backward."""
        for group in optimizer.param_groups if factor < 1 else ():
            rate = group["lr"]
            group["lr"] = rate * factor
            self.lowered.append((group, rate, group["lr"]))

    def restore_rate(self) -> None:
        """Before the scheduler steps: some go by the rate they find. DeepSpeed's has stepped, and its rate stays."""
        for group, rate, lower in self.lowered:
            if group["lr"] is lower:
                group["lr"] = rate
        self.lowered = []

    def after_step(self, step: int) -> None:
        self.release()
        if self.state.settled is not None:
            return
        if step == self.state.warmup:
            self.begin(step)
        if self.state.schedule.scores_after(step):
            self.round(step)
        if self.state.schedule.phase(step) == "settled":
            self._settle(step)

    def finish(self, step: int) -> None:
        """After training: choose if that has not happened, and drop what nobody needs any more."""
        if self.state.settled is None:
            logger.warning(
                "Training ended at step %d, before the search did (step %d): the best set so far is skipped. Train for "
                "longer, or give `EASCallback` smaller `warmup_steps` and `search_steps`.",
                step,
                self.state.settle,
            )
            if not self.state.start:
                self.begin(step)
            self._settle(step)
        # `load_best_model_at_end` may have brought back an earlier checkpoint, which was good with the set that it had
        if self.gates.skipped != self.state.settled:
            logger.warning(
                "The best checkpoint was saved before the search ended: it skips %s and not %s, and stays as it is.",
                self.gates.skipped,
                self.state.settled,
            )
            self.state.settled = self.gates.skipped
            self._settle_on(self.state.settled)
        if "predicted_loss" in self.state.budget:
            with self.scorer.aside():
                loss = self.scorer.mean(self.scorer.sample())
            self.state.budget["measured_loss"] = loss if math.isfinite(loss) else None
        self.gates.touch_idle(False)
        if self.kept is not None:
            self.kept.release()
        if not self.is_fsdp and self.kept is None:  # which hold on to them
            self.gates.drop_idle()
        self._write_report()

    def release(self) -> None:
        """Let go of the model's training forwards and, after an exception in a step, of the learning rate."""
        self.restore_rate()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def new_metrics(self) -> dict[str, float]:
        """What the Trainer has not logged yet."""
        new, self.metrics = self.metrics, {}
        return new

    def report(self) -> dict[str, Any]:
        """See `report.py`; the state, and `costs`: mean and standard error for each attention, `None` if not tried."""
        settings = {k: v for k, v in vars(self.settings).items() if k != "search_dataset" and k[0] != "_"}
        settings["warm_start"] = "scores" if isinstance(self.warm_start, Mapping) else self.warm_start
        known = exchange.costs(self.state.tries())
        costs = [known.get(attention) for attention in range(len(self.state.layers))]
        state = asdict(self.state)
        skip_layers = state.pop("settled")
        return {
            "skip_layers": self.state.best() if skip_layers is None else skip_layers,
            "is_settled": skip_layers is not None,
            "seed": self.args.seed,
            "held_out": "training set" if self.settings.search_dataset is None else "search_dataset",
            "settings": settings,
            "costs": [cost and [cost.mean, cost.error if math.isfinite(cost.error) else None] for cost in costs],
            **state,
        }

    # Scoring ----------------------------------------------------------------------------------------------------------

    def round(self, step: int) -> None:
        """Try some attentions, and exchange what is clear."""
        state = self.state
        tries = state.tries()
        known = exchange.costs(tries)
        failed = {attention for attention, _ in tries if attention not in known}
        fits = state.count + 1 < len(find_layers(self.tuner.model))
        attentions = exchange.to_try(state.order, state.count, known, self.settings.num_candidates, failed, fits)
        if not attentions:
            return
        losses, costs = self._tried(attentions)
        ignored = sum(cost is None for cost in costs)
        state.ignored += ignored
        if ignored:
            logger.warning(
                "Step %d: the held-out loss of %d of %d candidates is not finite; they are ignored.",
                step,
                ignored,
                len(attentions),
            )
        entry: dict[str, Any] = {
            "step": step,
            "losses": losses,
            "tried": [state.layers[attention] for attention in attentions],
            "costs": costs,
        }
        state.rounds.append(entry)
        before = state.best()
        known = exchange.costs(state.tries())
        state.order, exchanged = exchange.exchange(state.order, state.count, known)
        best = state.best()
        entry["exchanged"] = [[state.layers[attention] for attention in pair] for pair in exchanged]
        entry["skip_layers"] = best
        self.gates.set(best)
        self.metrics |= {
            "eas/skipped": len(best),
            "eas/exchanges": sum(len(entry["exchanged"]) for entry in state.rounds),
            "eas/ignored_candidates": state.ignored,
        }
        if losses is not None:
            self.metrics["eas/loss"] = statistics.fmean(losses)
        means = [statistics.fmean(cost) for cost in costs if cost is not None]
        if means:
            self.metrics |= {"eas/cost_min": min(means), "eas/cost_max": max(means)}
        if best != before:
            self._log_set(best)

    def _tried(self, attentions: Sequence[int]) -> tuple[list[float] | None, list[list[float] | None]]:
        """Losses of the set on a round's batches, and what skipping each of these attentions costs on them."""
        state, rounds = self.state, len(self.state.rounds)
        best = state.best()
        with self.scorer.aside(rounds):
            batches = self.held_out.batches(rounds, self._trained_on())
            whole = self._losses(best, batches)
            costs: list[list[float] | None] = []
            for attention in attentions:
                layer = state.layers[attention]
                turned = [key for key in best if key != layer] if layer in best else [*best, layer]
                sign = -1 if layer in best else 1
                cost = [sign * (one - of_set) for one, of_set in zip(self._losses(turned, batches), whole, strict=True)]
                costs.append(cost if all(map(math.isfinite, cost)) else None)
        return (whole if all(map(math.isfinite, whole)) else None), costs

    def _losses(self, skip_layers: Sequence[int | str], batches: list[dict[str, Any]]) -> list[float]:
        with self.gates.skipping(skip_layers):
            return self.scorer.losses(batches)

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training:
            self.seen |= fingerprints(kwargs)

    def _trained_on(self) -> set[int]:
        """Fingerprints of the rows of the optimizer step just done, in all processes; none if there is a dataset."""
        return set(gather_object(list(self.seen))) if self.settings.search_dataset is None else set()

    # Choosing ---------------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Measure the stand-ins in the model as it is now, and choose the first set with them."""
        state, name = self.state, self.gates.adapter_name
        measure_stand_ins(self.tuner, name, self.scorer, self.examples.many(MEASURED), is_adapted=True)
        largest = len(state.layers) // 2 if self.config.max_loss_increase is not None else state.count
        scores = scores_of(self.warm_start, self.tuner, self.gates, self.scorer, largest)
        state.start = state.order = exchange.start(scores)
        state.scores = [score if math.isfinite(score) else None for score in scores]
        self.gates.set(state.best())
        self._log_set(state.best())
        self._say(f"step {step}: the search starts with the attentions of layers {state.best()} skipped")

    def _count(self) -> tuple[int, dict[str, Any]]:
        """How many attentions are skipped, and what there is to say of it."""
        available, target = len(self.gates.layers), self.config.target_speedup
        if target is None:
            return self.config.count_to_skip(available), {}
        with self.scorer.aside(), self.tuner.without_adapters():
            counted = budget.forward_operations(self._forward(), self.model, self._attentions(self.gates.layers))
        total, attention = (sum(numbers) for numbers in zip(*gather_object([counted]), strict=True))
        count = budget.count_for_speedup(total, attention, available, target)
        predicted = budget.predicted_speedup(total, attention, count)
        return count, {"target_speedup": target, "predicted_speedup": predicted}

    def _forward(self) -> Callable[[], Any]:
        """The forward that a target speedup is of."""
        return functools.partial(self.scorer.loss, self.held_out.batches(0)[0])

    def _attentions(self, skip_layers: Sequence[int | str]) -> list[str]:
        layers = find_layers(self.model)
        return [layers[key].attention for key in skip_layers]

    def _settle(self, step: int) -> None:
        state = self.state
        if self.gates.skipped == state.best():
            state.order = exchange.ranked(state.order, state.count, exchange.costs(state.tries()))
            if self.config.max_loss_increase is not None:
                self._fit_budget()
            self._keep_the_better()
            state.settled = state.best()
        else:  # `load_best_model_at_end` has brought back an earlier checkpoint, which was the best with its own set
            state.settled = self.gates.skipped
        if self.config.target_speedup is not None:
            self._check_speedup()
        self._settle_on(state.settled)
        self.metrics |= {"eas/skipped": len(state.settled)}
        self._say(f"step {step}: from now on the attentions of layers {state.settled} are skipped")
        self._write_report()

    def _fit_budget(self) -> None:
        """Let the count be the largest whose held-out loss is within the budget."""
        state = self.state
        with self.scorer.aside():
            batches = self.scorer.sample()
            losses = []
            for count in range(len(state.layers)):
                with self.gates.skipping(state.best(count)):
                    losses.append(self.scorer.mean(batches))
        state.count = budget.largest_within(losses, self.config.max_loss_increase)
        state.budget = {
            "max_loss_increase": self.config.max_loss_increase,
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "predicted_loss": losses[state.count] if math.isfinite(losses[state.count]) else None,
        }

    def _keep_the_better(self) -> None:
        """Compare what was found with the start, both with what was learned, and stay with the better one."""
        state = self.state
        found, start = state.best(), state.to_layers(state.start[: state.count])
        if found == start:
            return
        losses = []
        with self.scorer.aside():
            batches = self.held_out.first(COMPARED, self._trained_on())
            for skip_layers in (start, found):
                with self.gates.skipping(skip_layers):
                    losses.append(self.scorer.mean(batches))
        if not losses[1] < losses[0]:
            state.order = list(state.start)
        start_loss, found_loss = (loss if math.isfinite(loss) else None for loss in losses)
        state.comparison = {
            "start": {"skip_layers": start, "loss": start_loss},
            "found": {"skip_layers": found, "loss": found_loss},
            "kept": "found" if losses[1] < losses[0] else "start",
        }

    def _check_speedup(self) -> None:
        with self.scorer.aside(), self.tuner.without_adapters():
            measured = budget.measured_speedup(self._forward(), self.model, self._attentions(self.state.settled or []))
        self.state.budget["measured_speedup"] = measured
        if measured < self.config.target_speedup:
            logger.warning(
                "Skipping %s makes the base model %.2f times as fast on a held-out batch, measured here and now; the "
                "target is %.2f, and counted operations promise %.2f.",
                self.state.settled,
                measured,
                self.config.target_speedup,
                self.state.budget["predicted_speedup"],
            )

    def _settle_on(self, skip_layers: list[int | str]) -> None:
        # Idle adapters stay trainable until training is over: an optimizer that a resumed run makes has to have the
        # parameters that the saved one had.
        self.gates.set(skip_layers)
        self.config.settle(skip_layers)

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _log_set(self, skip_layers: list[int | str]) -> None:
        # curves are of numbers: an attention that goes by its name is given by its place among the candidates
        places = [key if isinstance(key, int) else self.state.layers.index(key) for key in skip_layers]
        self.metrics |= {f"eas/skip_layers/{m + 1}": place for m, place in enumerate(places)}

    def _say(self, line: str) -> None:
        if self.args.process_index == 0:
            tqdm.write(f"EAS: {line}")

    def _write_report(self) -> None:
        report = self.report()
        if self.args.process_index == 0 and report != self.written:  # drawing takes half a second
            write_report(report, Path(self.args.output_dir))
            self.written = report
