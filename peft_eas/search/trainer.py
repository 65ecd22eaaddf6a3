"""The Trainer's own loss of a batch, asked for aside: the Trainer, its metrics and the random numbers don't notice."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from ..batches import evaluating, label_count
from ..shards import Kept
from .held_out import SAMPLE, HeldOut, means_over_processes

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_of(callback: TrainerCallback, frame: FrameType | None) -> Trainer:
    """The Trainer that has just called an event of `callback`.

    Callbacks are not given it, so it is looked for among those who called.

    Args:
        callback: The callback.
        frame: Where it was called from, `inspect.currentframe()` in the event.

    Raises:
        ValueError: if no Trainer called.
    """
    from transformers import Trainer  # imports much, and whoever has a Trainer has done it

    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise ValueError(
        f"`{type(callback).__name__}` scores with the loss of the Trainer that it is a callback of, and was called by "
        "something else: give it to a `transformers.Trainer`, or a subclass of it, as one of its `callbacks`."
    )


def check_shards(trainer: Trainer) -> None:
    """Refuse ways to share out a training with which a search would go wrong.

    Raises:
        ValueError: says what to do instead.
    """
    deepspeed, fsdp = (getattr(trainer.accelerator.state, f"{kind}_plugin", None) for kind in ("deepspeed", "fsdp"))
    if deepspeed is not None and deepspeed.zero_stage != 3:
        raise ValueError(
            f"DeepSpeed is at ZeRO stage {deepspeed.zero_stage}, whose optimizer would undo what `EASCallback` does: "
            'take stage 3, `{"zero_optimization": {"stage": 3}}`, or train without DeepSpeed. What '
            "stages 1 and 2 share out are gradients and optimizer states, and small adapters have few of them."
        )
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP version 1 keeps parameters in flat tensors that `EASCallback` can't work with: take version 2, "
            '`fsdp_config={"version": 2}`, or `fsdp_version: 2` in a file of `accelerate`.'
        )
    if fsdp is not None and fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` hands out parameters alone, and gates of adapters are buffers: set it to "
            "false, in a file of `accelerate`, or `cpu_ram_efficient_loading` in `fsdp_config`."
        )


def kept_by(trainer: Trainer) -> Kept | None:
    """What keeps idle parameters as they are where the optimizer is that of ZeRO-3, and steps through all of them."""
    if not trainer.is_deepspeed_enabled:
        return None
    sharded: Any = trainer.optimizer.optimizer  # in accelerate's
    return Kept(sharded.optimizer)


@contextmanager
def aside(trainer: Trainer, model: nn.Module, seed: int) -> Iterator[None]:
    """Inside of the `with` `model` is in eval mode and without gradients, random numbers begin at `seed`, what the
    Trainer counts and collects (TRL's metrics) is a copy, and nothing is compiled. Afterwards all is as it was."""
    states = random.getstate(), np.random.get_state()
    names = set(vars(trainer))
    kept = {name: value for name, value in vars(trainer).items() if _is_plain(value)}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        try:
            vars(trainer).update(copy.deepcopy(kept))
            set_seed(seed)
            yield
        finally:
            vars(trainer).update(kept)
            for name in set(vars(trainer)) - names:
                delattr(trainer, name)
            random.setstate(states[0])
            np.random.set_state(states[1])


def batch_loss(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, float]:
    """`trainer.compute_loss` of a batch as the collator made it, and what it counts for in a mean: its labels.

    Raises:
        ValueError: if the Trainer gives no loss for it.
    """
    inputs = trainer._prepare_inputs(dict(batch))
    items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    weight = label_count(batch) if items is None else float(items)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"`compute_loss` of {type(trainer).__name__} returned {loss!r}, and no tensor.")
    return loss.detach().float().mean().item(), max(weight, 1e-9)


class Scorer:
    """Held-out losses of the sets that the gates are put to, by the Trainer's own `compute_loss`.

    Args:
        trainer: The Trainer.
        model: The model that it trains.
        held_out: The batches.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, held_out: HeldOut) -> None:
        self.trainer, self.model, self.held_out = trainer, model, held_out

    def loss(self, batch: dict[str, Any]) -> tuple[float, float]:
        """The loss of a batch and its weight, see `batch_loss`."""
        return batch_loss(self.trainer, self.model, batch)

    def losses(self, batches: Sequence[dict[str, Any]]) -> list[float]:
        """The loss of each batch, over all processes; `inf` for what is not finite. Inside of `aside`."""
        found = [self.loss(batch) for batch in batches]
        means = means_over_processes([(loss * weight, weight) for loss, weight in found])
        return [loss if math.isfinite(loss) else math.inf for loss in means]

    def mean(self, batches: Sequence[dict[str, Any]]) -> float:
        """The mean loss of all batches and processes, inside of `aside`."""
        found = [self.loss(batch) for batch in batches]
        total = sum(loss * weight for loss, weight in found), sum(weight for _, weight in found)
        (mean,) = means_over_processes([total])
        return mean if math.isfinite(mean) else math.inf

    def sample(self) -> list[dict[str, Any]]:
        """The batches for what is decided once, this process's part of them."""
        return self.held_out.first(SAMPLE)

    def aside(self, number: int = 0) -> AbstractContextManager[None]:
        """Where to ask for losses without a trace; random numbers are those of `number` and the Trainer's seed."""
        return aside(self.trainer, self.model, self.trainer.args.seed + number)

    def check(self) -> None:
        """Try one batch, so that what can't be scored is said before anything is trained.

        Raises:
            ValueError: if it fails.
        """
        try:
            with self.aside():
                self.loss(self.held_out.batches(0)[0])
        except Exception as error:
            if not isinstance(error, (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)):
                raise  # no memory, a disk
            raise ValueError(
                f"A search compares losses of held-out batches, and {type(self.trainer).__name__} has none for what "
                f"its collator makes: {error} Search with another Trainer first, such as TRL's `SFTTrainer` on the "
                "same prompts, and give this one what it found, `EASConfig(skip_layers=[...])`; or give "
                "`EASCallback(search_dataset=...)` examples that have a loss."
            ) from error


def _is_plain(value: Any, within: int = 0) -> bool:
    """Whether a value is a number, or a dict of numbers, of lists of them and of such dicts: what metrics are kept in.
    A list by itself may be a dataset."""
    if isinstance(value, dict):
        return within < 2 and all(_is_plain(item, within + 1) for item in value.values())
    if isinstance(value, list):
        return within > 0 and all(_is_plain(item, 2) for item in value) and not any(isinstance(i, list) for i in value)
    return value is None or isinstance(value, (bool, int, float, str))
