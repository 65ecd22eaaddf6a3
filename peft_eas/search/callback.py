"""`EASCallback`: the search inside of a stock Trainer's training."""

from __future__ import annotations

import inspect
import logging
import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..batches import evaluating, inputs_of
from ..families import find_layers
from ..model import EASModel
from ..stand_in import are_zero, eas_model, initialize_eas_weights
from . import bandit, budget
from .held_out import HeldOut, fingerprints, loss_sum, means_over_processes
from .report import write_report
from .schedule import Schedule
from .scores import score_attentions

logger = logging.getLogger(__name__)

STATE_KEY = "eas_search"
"""Where a checkpoint's `trainer_state.json` has the search, among `stateful_callbacks`."""

WARM_STARTS = ("deviation", "kl", "similarity", "loss", "depth")

SAMPLE = 32
"""At least how many examples, over all processes, decide on what is decided once: a warm start, a budget."""


@dataclass
class SearchState:
    """All that a search knows; JSON, so that it travels with checkpoints.

    Attributes:
        layers: Layer index of each arm.
        count: How many attentions a drawn set skips.
        warmup, settle, interval: The `Schedule`.
        initial_preferences: One for each arm, as the search began.
        preferences: The same, now.
        scores: Score of each arm that preferences start from, if they do; `None` for a loss that was not finite.
        rounds: One entry a round: `step`, `subsets` (layer indices), `losses` (`None` for NaN and infinities),
            `preferences` after it, `skip_layers` (the best set then).
        ignored: Candidates whose loss was not finite.
        settled: The chosen set, once it is chosen.
        budget: What the budget was, and what came out.
    """

    layers: list[int]
    count: int
    warmup: int
    settle: int
    interval: int
    initial_preferences: list[float]
    preferences: list[float]
    scores: list[float | None] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ignored: int = 0
    settled: list[int] | None = None
    budget: dict[str, Any] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup, self.settle, self.interval)

    def best(self, count: int | None = None) -> list[int]:
        """The layers to skip by what is known so far."""
        return self.to_layers(bandit.choose(self.preferences, self.count if count is None else count))

    def to_layers(self, arms: Sequence[int]) -> list[int]:
        return [self.layers[arm] for arm in arms]


class EASCallback(TrainerCallback):
    """Searches, in the first part of a training, which attentions to skip; the rest of it trains what is left.

    In each optimizer step of the search, `num_skip` attentions are drawn and skipped. After a warm-up, every `interval`
    steps, different sets are scored by their loss on held-out batches and the bandit's preferences follow (see
    `peft_eas.search.bandit`). `evaluate()`, `predict()` and checkpoints in the meantime use the best set so far. At the
    end of the search the best set is skipped for good, and what its layers no longer need is dropped after training.

    Before the first step it measures the stand-ins of skipped attentions (`peft_eas.initialize_eas_weights`), also
    where `skip_layers` are given and there is nothing to search.

    In the Trainer's `output_dir` it leaves `report.json` and, if matplotlib is installed, `search.png`.

    Args:
        search_dataset: Examples to score candidates with, as the Trainer's collator takes them; a few hundred that are
            not trained on. By default examples of the training set that are not in the batch just trained on.
        warmup_steps: Optimizer steps, or fraction of all of them, before the first round.
        search_steps: Optimizer steps, or fraction of all of them, from the end of the warm-up to the choice.
        interval: Optimizer steps from one round to the next.
        num_candidates: Sets that are scored in a round.
        lr: Learning rate of the preferences.
        warm_start: What the preferences start from: scores of the base model (see `score_attentions`), `"deviation"`,
            `"kl"` or `"similarity"`; `"loss"`, measured after the warm-up, by how much the held-out loss grows when
            just this attention is skipped, its stand-in in place; `"depth"`, the deeper the better; or scores
            by layer index, low for redundant. `None`: all alike.

    Raises:
        ValueError: for a wrong value; when training begins, for a model without an EAS adapter, a dataset that can't be
            used, or a checkpoint that was written without an `EASCallback`.
    """

    def __init__(
        self,
        search_dataset: Any = None,
        *,
        warmup_steps: float = 0.1,
        search_steps: float = 0.3,
        interval: int = 20,
        num_candidates: int = 3,
        lr: float = 2.0,
        warm_start: str | Mapping[int, float] | None = "deviation",
    ) -> None:
        for name, value in (("warmup_steps", warmup_steps), ("search_steps", search_steps)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a number of steps, or a fraction below 1, got {value!r}.")
        for name, value, least in (("interval", interval, 1), ("num_candidates", num_candidates, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
            raise ValueError(f"`lr` must be a number above 0, got {lr!r}.")
        if not (warm_start is None or isinstance(warm_start, Mapping) or warm_start in WARM_STARTS):
            raise ValueError(
                f"`warm_start` must be {', '.join(map(repr, WARM_STARTS))}, scores by layer or None; got "
                f"{warm_start!r}."
            )
        self.search_dataset = search_dataset
        self.warmup_steps = warmup_steps
        self.search_steps = search_steps
        self.interval = interval
        self.num_candidates = num_candidates
        self.lr = lr
        self.warm_start = warm_start
        self._search: _Search | None = None
        self._last_report: dict[str, Any] | None = None

    @property
    def report(self) -> dict[str, Any] | None:
        """The content of `report.json`: the search under way, or that of the last training."""
        return self._last_report if self._search is None else self._search.report()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        eas_model(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        _log_before_others(self, inspect.currentframe())
        if self._search is not None:  # of a training that did not end
            self._search.release()
            self._search = None
        tuner = eas_model(model)
        saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        (adapter_name,) = tuner.active_adapters
        if not state.global_step:  # else they come from the checkpoint
            self._measure_stand_ins(args, model, tuner, train_dataloader)
        if tuner.peft_config[adapter_name].skip_layers is not None and saved is None:
            logger.info("`skip_layers` is set already: there is nothing to search.")
            return
        if state.global_step and saved is None:
            raise ValueError(
                f"The checkpoint of step {state.global_step} was written without an `EASCallback`, so the search can't "
                "go on from it: start anew, or name the set with `EASConfig(skip_layers=...)`."
            )
        self._search = _Search(self, args, model, tuner, train_dataloader, state.max_steps, saved)
        # the very dictionary, so that the Trainer's next checkpoint has the search as it is then
        state.stateful_callbacks[STATE_KEY] = vars(self._search.state)

    def _measure_stand_ins(
        self, args: TrainingArguments, model: nn.Module, tuner: EASModel, train_dataloader: Any
    ) -> None:
        """Start the stand-ins at their means, unless they were measured or trained before."""
        (adapter_name,) = tuner.active_adapters
        stand_ins = tuner.stand_ins(adapter_name)
        if not stand_ins or not are_zero(stand_ins.values()):
            return
        try:
            batches = _sample(_held_out(self.search_dataset, train_dataloader, args))
            initialize_eas_weights(model, batches, adapter_name)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The stand-ins of skipped attentions can't be measured with this Trainer's batches: {error} "
                "Call `peft_eas.initialize_eas_weights(model, dataloader)` before training, with batches of what the "
                "model takes; or give `EASCallback(search_dataset=...)` other examples."
            ) from error

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._search is not None:
            self._search.before_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._search is not None:
            self._search.forget_idle_gradients(state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if self._search is not None:
            self._search.rewind_idle_state(state.global_step, optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._search is not None:
            self._search.after_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._search is not None and logs is not None and "loss" in logs:
            metrics = self._search.new_metrics()
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._search is not None:
            self._search.finish(state.global_step)
            self._last_report, self._search = self._search.report(), None


class _Search:
    """The search of one training: what an `EASCallback` does, with all its side effects.

    Args:
        settings: The callback.
        args: Arguments of the training.
        model: The model that the Trainer trains.
        tuner: The EAS tuner in it.
        train_dataloader: The Trainer's.
        max_steps: Optimizer steps of the training.
        saved: The state in the checkpoint that the training goes on from, if any.
    """

    def __init__(
        self,
        settings: EASCallback,
        args: TrainingArguments,
        model: nn.Module,
        tuner: EASModel,
        train_dataloader: Any,
        max_steps: int,
        saved: dict | None,
    ) -> None:
        self.settings, self.args, self.model, self.tuner = settings, args, model, tuner
        self.gates = tuner.skip_gates()
        self.config = tuner.peft_config[self.gates.adapter_name]
        if not self.gates.are_complete():
            raise ValueError(
                "A search needs both the adapter and the stand-in of every attention, and some have been dropped or "
                "never made: begin with a fresh adapter, `get_peft_model(model, EASConfig(num_skip=...))`."
            )
        self.device = next(tuner.parameters()).device
        self.metrics: dict[str, float] = {}
        self.seen: set[int] = set()
        self.hook = None
        if isinstance(settings.warm_start, Mapping) and (
            missing := [i for i in self.gates.layers if i not in settings.warm_start]
        ):
            raise ValueError(f"`warm_start` has no scores of layers {missing}.")
        self.held_out = _held_out(settings.search_dataset, train_dataloader, args)
        if settings.search_dataset is None:
            self.hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)
        self.gates.draw(None)
        if saved is None:
            count, about = self._count()
            schedule = Schedule.of(settings.warmup_steps, settings.search_steps, settings.interval, max_steps)
            layers = self.gates.layers
            start = [0.0] * len(layers)
            self.state = SearchState(layers, count, **asdict(schedule), initial_preferences=start, preferences=start)
            self.state.budget = about
            self._say(
                f"searching which {count} of {len(layers)} attentions to skip: candidates are scored from step "
                f"{schedule.warmup + 1} to {schedule.settle} of {max_steps}"
            )
        else:
            self.state = SearchState(**saved)
            if self.state.layers != self.gates.layers:
                raise ValueError(
                    f"The checkpoint's search was over the attentions of layers {self.state.layers}, but this adapter "
                    f"has those of {self.gates.layers}."
                )
        self.gates.touch_idle(args.world_size > 1)
        if self.state.settled is not None:
            self._settle_on(self.state.settled)
            return
        if saved is None and (self.state.warmup == 0 or settings.warm_start != "loss"):
            self._warm_start()
        self.gates.set(self.state.best())

    # What the Trainer's events ask for -------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Draw what the optimizer step after `step` others skips: for all of its micro-batches, in all processes."""
        if self.state.settled is not None:
            return
        arms = bandit.draw(self.state.preferences, self.state.count, self._rng("step", step))
        self.gates.draw(self.state.to_layers(arms))
        self.seen.clear()
        if self.args.torch_compile:  # every set would be compiled anew
            torch.compiler.set_stance("force_eager")

    def forget_idle_gradients(self, step: int) -> None:
        """Idle adapters must not move; a gradient of zero would let the optimizer's momentum and decay act on them."""
        if self.args.world_size == 1:
            return  # they have none
        if self.args.fsdp and step == 0:
            return  # see `rewind_idle_state`
        for parameter in self.gates.idle_parameters():
            parameter.grad = None

    def rewind_idle_state(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint of FSDP needs the optimizer's state of every parameter: the first step makes it for idle ones,
        too, by gradients of zero, and must not count."""
        if self.args.fsdp and step == 0:
            for parameter in self.gates.idle_parameters():
                state = optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"] * 0

    def after_step(self, step: int) -> None:
        if self.state.settled is not None:
            return
        if self.args.torch_compile:
            torch.compiler.set_stance("default")
        if self.state.schedule.scores_after(step):
            self._score_candidates(step)
        elif step == self.state.warmup and self.settings.warm_start == "loss":
            self._warm_start()
            self.gates.set(self.state.best())
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
        self.gates.touch_idle(False)
        if not self.args.fsdp:  # which would bring them back
            self.gates.drop_idle()
        self._write_report()

    def release(self) -> None:
        """Let go of the model's training forwards."""
        self.gates.draw(None)
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def new_metrics(self) -> dict[str, float]:
        """What the Trainer has not logged yet."""
        new, self.metrics = self.metrics, {}
        return new

    def report(self) -> dict[str, Any]:
        """See `report.py`."""
        settings = {k: v for k, v in vars(self.settings).items() if k != "search_dataset" and k[0] != "_"}
        if isinstance(self.settings.warm_start, Mapping):
            settings["warm_start"] = "scores"
        state = asdict(self.state)
        skip_layers = state.pop("settled")
        return {
            "skip_layers": self.state.best() if skip_layers is None else skip_layers,
            "is_settled": skip_layers is not None,
            "seed": self.args.seed,
            "held_out": "training set" if self.settings.search_dataset is None else "search_dataset",
            "settings": settings,
            **state,
        }

    # Scoring ----------------------------------------------------------------------------------------------------------

    def _score_candidates(self, step: int) -> None:
        state = self.state
        subsets = bandit.draw_distinct(
            state.preferences, state.count, self.settings.num_candidates, self._rng("round", step)
        )
        batches = self.held_out.batches(len(state.rounds), self._trained_on())
        losses = self._losses([state.to_layers(arms) for arms in subsets], batches)
        state.preferences = bandit.update(state.preferences, subsets, losses, self.settings.lr)
        finite = [loss for loss in losses if math.isfinite(loss)]
        state.ignored += len(losses) - len(finite)
        if len(finite) < len(losses):
            logger.warning(
                "Step %d: the held-out loss of %d of %d candidates is not finite; they are ignored.",
                step,
                len(losses) - len(finite),
                len(losses),
            )
        before = state.rounds[-1]["skip_layers"] if state.rounds else None
        best = state.best()
        self.gates.set(best)
        state.rounds.append(
            {
                "step": step,
                "subsets": [state.to_layers(arms) for arms in subsets],
                "losses": [loss if math.isfinite(loss) else None for loss in losses],
                "preferences": [round(s, 6) for s in state.preferences],
                "skip_layers": best,
            }
        )
        self.metrics |= {
            "eas/skipped": len(best),
            "eas/preference_spread": statistics.pstdev(state.preferences),
            "eas/ignored_candidates": state.ignored,
        }
        if finite:
            self.metrics |= {
                "eas/candidate_loss": statistics.fmean(finite),
                "eas/candidate_loss_min": min(finite),
                "eas/candidate_loss_max": max(finite),
            }
        if best != before:
            # curves are of numbers: an attention that goes by its name is given by its place among the candidates
            places = [key if isinstance(key, int) else state.layers.index(key) for key in best]
            self.metrics |= {f"eas/skip_layers/{m + 1}": place for m, place in enumerate(places)}

    def _losses(self, sets: list[list[int]], batches: list[dict[str, Any]]) -> list[float]:
        """The held-out loss of each set, in eval mode; the model is as before afterwards, whatever happens."""
        sums = []
        with evaluating(self.model):
            for skip_layers in sets:
                with self.gates.skipping(skip_layers):
                    sums.append(loss_sum(self.model, batches, self.device))
        return means_over_processes(sums)

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and self.state.settled is None:
            self.seen |= fingerprints(kwargs)

    def _trained_on(self) -> set[int]:
        """Fingerprints of the rows of the optimizer step just done, in all processes; none if there is a dataset."""
        return set() if self.hook is None else set(gather_object(list(self.seen)))

    def _sample(self) -> list[dict[str, Any]]:
        """The batches for what is decided once, this process's part of them."""
        return _sample(self.held_out, self._trained_on())

    def _warm_start(self) -> None:
        """Let the preferences start from scores: of the base model at once, of losses with adapters after the warm-up,
        in which these learn something."""
        given, layers = self.settings.warm_start, self.state.layers
        if given is None:
            return
        if isinstance(given, Mapping):
            scores = [float(given[i]) for i in layers]
        elif given == "depth":
            found = find_layers(self.model)
            scores = [-found[key].depth for key in layers]
        elif given == "loss":
            whole, *single = self._losses([[], *([i] for i in layers)], self._sample())
            scores = [loss - whole if math.isfinite(loss) else math.inf for loss in single]
        else:
            with self.tuner.without_adapters():
                by_layer = score_attentions(self.model, self._sample(), method=given)
            scores = means_over_processes([(by_layer[i], 1) for i in layers])
        self.state.scores = [score if math.isfinite(score) else None for score in scores]
        self.state.initial_preferences = self.state.preferences = bandit.preferences_from_scores(
            scores, self.state.count
        )

    # Choosing ---------------------------------------------------------------------------------------------------------

    def _count(self) -> tuple[int, dict[str, Any]]:
        """How many attentions are drawn, and what there is to say of it."""
        available, target = len(self.gates.layers), self.config.target_speedup
        if target is None:
            return self.config.count_to_skip(available), {}
        batch = inputs_of(self.held_out.batches(0)[0], self.device)
        with self.tuner.without_adapters(), evaluating(self.model):
            counted = budget.forward_operations(self.model, self._attentions(self.gates.layers), batch)
        total, attention = (sum(numbers) for numbers in zip(*gather_object([counted]), strict=True))
        count = budget.count_for_speedup(total, attention, available, target)
        predicted = budget.predicted_speedup(total, attention, count)
        return count, {"target_speedup": target, "predicted_speedup": predicted}

    def _attentions(self, skip_layers: Sequence[int]) -> list[str]:
        layers = find_layers(self.model)
        return [layers[key].attention for key in skip_layers]

    def _settle(self, step: int) -> None:
        state = self.state
        if self.config.max_loss_increase is not None:
            sets = [state.best(count) for count in range(len(state.layers))]
            losses = self._losses(sets, self._sample())
            state.count = budget.largest_within(losses, self.config.max_loss_increase)
            state.budget = {
                "max_loss_increase": self.config.max_loss_increase,
                "losses": [loss if math.isfinite(loss) else None for loss in losses],
            }
            self.gates.set(state.best())
        state.settled = self.gates.skipped
        if self.config.target_speedup is not None:
            self._check_speedup()
        self._settle_on(state.settled)
        self.metrics |= {"eas/skipped": len(state.settled)}
        self._say(f"step {step}: from now on the attentions of layers {state.settled} are skipped")
        self._write_report()

    def _check_speedup(self) -> None:
        batch = inputs_of(self.held_out.batches(0)[0], self.device)
        with self.tuner.without_adapters(), evaluating(self.model):
            measured = budget.measured_speedup(self.model, self._attentions(self.state.settled), batch)
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

    def _settle_on(self, skip_layers: list[int]) -> None:
        # Idle adapters stay trainable until training is over: an optimizer that a resumed run makes has to have the
        # parameters that the saved one had.
        self.release()
        self.gates.set(skip_layers)
        self.config.settle(skip_layers)

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _rng(self, what: str, step: int) -> random.Random:
        # Nothing of a generator has to be saved, or sent to other processes.
        return random.Random(f"{self.args.seed} {what} {step}")

    def _say(self, line: str) -> None:
        if self.args.process_index == 0:
            tqdm.write(f"EAS: {line}")

    def _write_report(self) -> None:
        if self.args.process_index == 0:
            write_report(self.report(), Path(self.args.output_dir))


def _held_out(dataset: Any, train_dataloader: Any, args: TrainingArguments) -> HeldOut:
    """Held-out examples of `dataset`, or of the training set if it is `None`."""
    train_dataset = train_dataloader.dataset
    if dataset is None:
        dataset = train_dataset
    else:
        # the Trainer has dropped columns that the model does not know; the collator does not expect them
        known, given = (getattr(d, "column_names", None) for d in (train_dataset, dataset))
        if known and given and set(given) - set(known):
            if not set(given) & set(known):
                raise ValueError(
                    f"`search_dataset` has the columns {given}, but the Trainer's collator is given {known}: "
                    "prepare it like the training set (after a TRL trainer has been made, its `eval_dataset` is)."
                )
            dataset = dataset.select_columns([name for name in given if name in known])
    # as many examples a round as an optimizer step has, so that scoring costs the same share at every size
    return HeldOut(
        dataset,
        train_dataloader.collate_fn,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.seed,
        args.process_index,
        args.world_size,
    )


def _sample(held_out: HeldOut, avoid: Collection[int] = ()) -> list[dict[str, Any]]:
    """The batches for what is decided once, this process's part of them."""
    per_round = held_out.batch_size * held_out.num_batches * held_out.world_size
    return [batch for r in range(math.ceil(SAMPLE / per_round)) for batch in held_out.batches(r, avoid)]


def _log_before_others(callback: EASCallback, frame: Any) -> None:
    """Move `callback` to the front of the Trainer's callbacks.

    TensorBoard's and the like stand before all callbacks of the user, see logs first, and would miss these metrics. A
    callback is not given the list it is in; the handler that calls it has it.
    """
    handler = frame.f_back.f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
