"""How a family that is no decoder is tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from transformers import PreTrainedConfig


@dataclasses.dataclass(frozen=True)
class Example:
    """How a family that is no decoder is tried.

    Attributes:
        section: Of the page.
        model: The class of a model with a task, or the auto class.
        config: Makes its configuration.
        inputs: Makes inputs.
        labels: What else a training step takes; `None` for a model without a loss, which then is the mean square of
            the output.
        output: What of the model's output is compared.
        task: PEFT's type of the task.
        unused: Parameters that this task has no use for, and no gradients (a regular expression).
        checkpoints: Whether adapters can be trained with gradient checkpointing; BLIP and UDOP change their embeddings
            in place, which then is an error in transformers with LoRA, too.
    """

    section: str
    model: type
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[], dict]
    labels: dict | None
    output: str = "logits"
    task: str | None = None
    unused: str = ""
    checkpoints: bool = True
