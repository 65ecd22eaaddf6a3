"""Searches in the stock Trainer, and what they do."""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from peft import get_peft_model
from transformers import TrainerCallback
from zoo import tiny
from zoo.training import trainer

from peft_eas import EASCallback, EASConfig
from peft_eas.layer import EASAttention

STEPS = 20
SEARCH = dict(warmup_steps=3, search_steps=9, interval=3, warm_start="depth")  # rounds after steps 6, 9 and 12


def fresh(family="llama", seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(tiny.model(family), EASConfig(**dict(num_skip=2) | settings))
    tiny.shake(model, scale=0.05)
    return model


def attentions(model):
    return [m for m in model.modules() if isinstance(m, EASAttention)]


class Watch(TrainerCallback):
    """Writes down, for each optimizer step and each evaluation, which attentions its forwards skipped."""

    def __init__(self, model):
        self.entered, self.ran = Counter(), Counter()
        self.steps, self.evaluated = [], []
        for module in attentions(model):
            module.register_forward_pre_hook(self.enter)
            module.base_layer.register_forward_pre_hook(self.run)

    def enter(self, module, args):
        self.entered[module.layer_idx, module.training] += 1

    def run(self, module, args):
        self.ran[module.layer_idx, module.training] += 1

    def skipped(self, training):
        entered, ran = ([count[i, training] for i in range(6)] for count in (self.entered, self.ran))
        # every forward of the step, those that are repeated in a backward included, did the same
        assert all(entered)
        assert all(ran[i] in (0, entered[i]) for i in range(6))
        self.entered.clear()
        self.ran.clear()
        return [i for i in range(6) if not ran[i]]

    def on_step_begin(self, args, state, control, **kwargs):
        self.entered.clear()
        self.ran.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.forwards = self.entered[0, True]
        self.steps.append(self.skipped(training=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(self.skipped(training=False))


@contextmanager
def unrendered():
    """Inside, pictures are drawn but not rendered, which takes as long as a search of a tiny model."""
    with mock.patch("matplotlib.figure.Figure.savefig", lambda self, file, **kwargs: Path(file).write_bytes(b"drawn")):
        yield


def run(path, model, settings=None, others=(), resume=None, **kwargs):
    search = EASCallback(**SEARCH | (settings or {}))
    made = trainer(path, model, callbacks=[search, *others], **dict(max_steps=STEPS, save_steps=1) | kwargs)
    with unrendered():
        made.train(resume_from_checkpoint=resume)
    return made, search


def charge(model, price, layers):
    """Let the held-out loss be this much higher for each of these attentions that is skipped."""

    def add(module, args, output):
        if not module.training and output.loss is not None:
            output.loss = output.loss * 0.01 + price * sum(attentions(model)[i].gates["default"] for i in layers)

    model.register_forward_hook(add)
