"""A pretrained model without some of its attentions, for whatever trains it then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from ..batches import batches_of
from ..config import EASConfig
from ..families import find_layers
from ..prove import learn_family
from ..runtime.eas_record import Record
from ..stand_in import initialize_eas_weights
from ..targets import Targets
from .scores import score_attentions


def skip_attentions(
    model: PreTrainedModel,
    dataloader: Iterable[dict[str, torch.Tensor]],
    num_skip: int | float | None = None,
    skip_layers: list[int | str] | None = None,
    stand_in: str = "linear",
    r_pia: int = 32,
) -> PreTrainedModel:
    """Take attentions out of a pretrained model, stand-ins in their place, before it is fine-tuned by any method.

    `get_peft_model(skip_attentions(model, batches, num_skip=8), LoraConfig(target_modules="all-linear"))` trains LoRA's
    matrices on what is left: a transformers model, as `merge_and_unload()` gives one. Save it, as the adapter needs it
    to be loaded onto, and quantise it then, if at all: a quantised model comes back dequantised. Its stand-ins are
    parameters that other tuners leave as they are.

    Args:
        model: A transformers model of a known family, without adapters; use what is returned in its place.
        dataloader: Batches `{input_ids, attention_mask, ...}` of the task, small ones: several thousand tokens in all.
        num_skip: How many, a count or a fraction: those that `score_attentions` has lowest. By default a quarter.
        skip_layers: Which, instead, by index or name as in `EASConfig`.
        stand_in: What is left of them: `"linear"`, `"mean"` or `"zero"`.
        r_pia: The rank of linear ones.

    Returns:
        The model without these attentions; its parameters are as trainable as before, and stand-ins are.

    Raises:
        ValueError: for what `EASConfig`, `score_attentions` and `initialize_eas_weights` refuse, and for
            `num_skip="auto"`, which needs a search; the model is left as it was.
    """
    if num_skip == "auto":
        raise ValueError(
            "`num_skip='auto'` needs a search, by an `EASCallback` while training: say here how many to skip."
        )
    config = EASConfig(r=1, r_pia=r_pia, num_skip=num_skip, skip_layers=skip_layers, stand_in=stand_in, use_bias=False)
    learn_family(model)
    targets = Targets(find_layers(model))
    targets.fit(config, model)
    batches = [dict(batch) for batch in batches_of(dataloader)]
    if config.skip_layers is None:
        skippable = targets.skippable(config)
        count = config.count_to_skip(len(skippable))
        scores = score_attentions(model, batches, num_skip=count)
        config.settle(sorted(skippable, key=scores.__getitem__)[:count])
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, config)
    try:
        if config.skip_layers and config.stand_in != "zero":
            initialize_eas_weights(adapted, batches)
        model = adapted.merge_and_unload()
        _say_how(model, config)
    except BaseException:
        adapted.unload()
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, True))
    return model


def _say_how(model: PreTrainedModel, config: EASConfig) -> None:
    """Record that nothing was trained, where `merge_and_unload` has recorded an adapter."""
    if not hasattr(model.config, "eas"):  # nothing is skipped
        return
    called = {key: value for key, value in config.record().items() if key in ("base_model", "stand_in", "r_pia")}
    record = dataclasses.replace(Record.read(model.config.eas), config={"skipped": "first"} | called)
    model.config.eas = record.written()
