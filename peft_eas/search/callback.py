"""`EASCallback`: the search inside of a stock Trainer's training."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import checks
from ..stand_in import are_zero, eas_model
from .held_out import MEASURED, HeldOut
from .run import Search
from .start import WARM_STARTS, measure_stand_ins
from .trainer import Scorer, check_shards, trainer_of

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

STATE_KEY = "eas_search"
"""Where a checkpoint's `trainer_state.json` has the search, among `stateful_callbacks`."""

MOST_STEPS = 10**9
"""No training has more."""


class EASCallback(TrainerCallback):
    """Searches, in the first part of a training, which attentions to skip; the rest of it trains what is left.

    The warm-up skips nothing: which attentions a task needs shows once the model has begun to learn it. When it ends,
    the stand-ins of all attentions are measured in the model as it is then, and the first set is chosen with them. From
    then on all optimizer steps skip the best set so far, so that what is learned serves it; over as many steps as the
    warm-up had, the learning rate rises once more, from nothing to what the scheduler says. Every `interval` steps some
    attentions are tried on held-out batches: how does the Trainer's own loss change if this one is skipped, too, or is
    not? One that costs clearly less than one in the set takes its place (see `peft_eas.search.exchange`). At the end of
    the search what was found and the start are compared on all of the held-out examples; the better one is skipped for
    good, and what it doesn't need is dropped after training.

    Where `skip_layers` are given there is nothing to search, and it measures the stand-ins before the first step
    (`peft_eas.initialize_eas_weights`).

    In the Trainer's `output_dir` it leaves `report.json` and, if matplotlib is installed, `search.png`.

    Args:
        search_dataset: Examples to score with, as the Trainer's collator takes them; a few hundred that are not trained
            on. By default examples of the training set that are not in the batch just trained on.
        warmup_steps: Optimizer steps, or fraction of all of them, in which nothing is skipped; in as many that follow,
            the learning rate rises again.
        search_steps: Optimizer steps, or fraction of all of them, from the end of the warm-up to the choice.
        interval: Optimizer steps from one round to the next.
        num_candidates: Attentions that are tried in a round.
        warm_start: What the first set goes by: `"growth"`, the default for language models, or `"deviation"`, that for
            others (see `score_attentions`), in the model as it is after the warm-up. There, `"growth"` looks at the
            loss as well, and `"deviation"` is that from the stand-in. `"depth"`: the deeper the better; or scores by
            layer index, low for redundant.

    Raises:
        ValueError: for a wrong value; when training begins, for a model without an EAS adapter, a dataset that can't be
            used, a Trainer that has no loss for held-out batches (GRPO), or a checkpoint that was written without an
            `EASCallback`.
    """

    search_class = Search

    def __init__(
        self,
        search_dataset: Any = None,
        *,
        warmup_steps: float = 0.1,
        search_steps: float = 0.3,
        interval: int = 20,
        num_candidates: int = 4,
        warm_start: str | Mapping[int | str, float] | None = None,
    ) -> None:
        steps = f"a number of steps from 0 to {MOST_STEPS}, or a fraction below 1"
        warmup_steps, search_steps = (
            checks.number(name, value, lambda v: 0 <= v <= MOST_STEPS, steps)
            for name, value in (("warmup_steps", warmup_steps), ("search_steps", search_steps))
        )
        if isinstance(warm_start, Mapping):
            warm_start = {
                key: checks.number(f"warm_start[{checks.shown(key)}]", value, math.isfinite, "a finite number")
                for key, value in warm_start.items()
            }
        elif warm_start is not None:
            warm_start = checks.choice("warm_start", warm_start, WARM_STARTS)
        self.search_dataset = search_dataset
        self.warmup_steps = warmup_steps
        self.search_steps = search_steps
        self.interval = checks.integer("interval", interval, 1, MOST_STEPS)
        self.num_candidates = checks.integer("num_candidates", num_candidates, 1)
        self.warm_start = warm_start
        self._search: Search | None = None
        self._last_report: dict[str, Any] | None = None

    @property
    def report(self) -> dict[str, Any] | None:
        """The content of `report.json`: the search under way, or that of the last training."""
        return self._last_report if self._search is None else self._search.report()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        eas_model(model)
        check_shards(trainer_of(self, inspect.currentframe()))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        trainer = trainer_of(self, inspect.currentframe())
        check_shards(trainer)  # for callbacks that are added to a Trainer later
        _log_before_others(self, trainer)
        if self._search is not None:  # of a training that did not end
            self._search.release()
            self._search = None
        tuner = eas_model(model)
        (adapter_name,) = tuner.active_adapters
        saved = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        is_given = tuner.peft_config[adapter_name].skip_layers is not None and saved is None
        if state.global_step and saved is None and not is_given:
            raise ValueError(
                f"The checkpoint of step {state.global_step} was written without an `EASCallback`, so the search can't "
                "go on from it: start anew, or name the set with `EASConfig(skip_layers=...)`."
            )
        if is_given:
            logger.info("`skip_layers` is set already: there is nothing to search.")
        stand_ins = tuner.stand_ins(adapter_name)
        if is_given and (state.global_step or not stand_ins or not are_zero(stand_ins.values())):
            return
        scorer = Scorer(trainer, model, _held_out(self.search_dataset, train_dataloader, args))
        examples = _to_measure(scorer.held_out, train_dataloader, args)
        if is_given:
            measure_stand_ins(tuner, adapter_name, scorer, examples.many(MEASURED))
            return
        scorer.check()
        self._search = self.search_class(self, args, scorer, tuner, examples, state.max_steps, saved)
        # the very dictionary, so that the Trainer's next checkpoint has the search as it is then
        state.stateful_callbacks[STATE_KEY] = vars(self._search.state)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if self._search is not None:
            self._search.before_step(state.global_step, optimizer)

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
            self._search.restore_rate()
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
    # half as many examples a round as an optimizer step, so that scoring costs the same share at every size
    return HeldOut(
        dataset,
        train_dataloader.collate_fn,
        args.per_device_train_batch_size,
        math.ceil(args.per_device_train_batch_size * args.gradient_accumulation_steps / 2),
        args.seed,
        args.process_index,
        args.world_size,
    )


def _to_measure(held_out: HeldOut, train_dataloader: Any, args: TrainingArguments) -> HeldOut:
    """The training set, which is larger, and which stand-ins are trained with anyway; unless it is streamed."""
    try:
        return _held_out(None, train_dataloader, args)
    except ValueError:
        return held_out


def _log_before_others(callback: EASCallback, trainer: Trainer) -> None:
    """Move `callback` to the front of the Trainer's callbacks: TensorBoard's and the like stand before all callbacks of
    the user, see logs first, and would miss these metrics."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)
