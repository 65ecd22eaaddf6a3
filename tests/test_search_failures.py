"""What fails in a search leaves the model and the training as they were."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from searches import SEARCH, STEPS, Watch, attentions, fresh
from transformers import Trainer
from zoo.training import collate, dataset, trainer

from peft_eas import EASCallback
from peft_eas.layer import EASLayer


@pytest.mark.parametrize("when", ["collating", "forward"])
def test_an_exception_while_scoring_leaves_the_model_as_it_was(tmp_path, when):
    model, is_wrong = fresh(), [True]

    class Failing:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if when == "collating" and made.state.global_step and is_wrong:
                raise OSError("disk")
            return dataset(8)[i]

    def fail(module, args, output):
        if when == "forward" and is_wrong and [a.gates["default"] for a in attentions(model)] == [False] * 5 + [True]:
            raise OSError("device")  # while the fifth is tried

    model.register_forward_hook(fail)
    search = EASCallback(**SEARCH | dict(search_dataset=Failing()))
    made = trainer(tmp_path, model, callbacks=[search], max_steps=STEPS, save_strategy="no")
    with pytest.raises(OSError, match="disk" if when == "collating" else "device"):
        made.train()
    assert made.state.global_step == 6
    assert all(m.training for m in model.modules() if isinstance(m, EASLayer))
    assert [a.gates["default"] for a in attentions(model)] == [False] * 4 + [True] * 2
    assert torch.equal(
        torch.stack([a.eas_skip["default"] for a in attentions(model)]), torch.tensor([False] * 4 + [True] * 2)
    )
    # training forwards go by the set, whatever it is
    watch = Watch(model)
    model.set_skip_layers([1])
    model(**collate(list(dataset(4))))
    assert watch.skipped(training=True) == [1]
    model.set_skip_layers([4, 5])
    model.peft_config["default"].skip_layers = None
    # and a new training of the same Trainer begins from there, without what the first one left on the model
    is_wrong.clear()
    search.search_dataset = None
    made.train()
    assert search.report["is_settled"]
    assert not model._forward_pre_hooks


class Recorded(EASCallback):
    """Writes down what was before an event in which it scores, and when it does."""

    scores = False

    def watched(self, event, *args, **kwargs):
        self.before, self.scores = noticed(kwargs["model"]), True
        event(*args, **kwargs)
        self.scores = False

    def on_train_begin(self, *args, **kwargs):
        self.watched(lambda *a, **k: EASCallback.on_train_begin(self, *a, **k), *args, **kwargs)

    def on_step_end(self, *args, **kwargs):
        self.watched(super().on_step_end, *args, **kwargs)


def noticed(model):
    """What a scoring, even one that fails, must leave as it was."""
    return (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(dict(a.gates), {k: bool(v) for k, v in a.eas_skip.items()}, a.disable_adapters) for a in attentions(model)],
    )  # fmt: skip


MOMENTS = {
    "dataset": {1: 0, 5: 3, 13: 6},
    "collator": {1: 0, 5: 0, 6: 3, 12: 3, 14: 6},
    "loss": {1: 0, 2: 0, 3: 3, 9: 3, 16: 6},
    "forward": {1: 0, 2: 0, 3: 3, 9: 3, 16: 6},
}
"""Which calls try a batch, try the start (with the training set), measure stand-ins (with that, too), score the start,
and are in a round (those of a model: in a try); and after which step."""


@pytest.mark.parametrize(("where", "at"), [(where, at) for where, moments in MOMENTS.items() for at in moments])
def test_what_fails_while_scoring_leaves_no_trace(tmp_path, where, at):
    model, rows, calls = fresh().train(), dataset(8), Counter()
    error = KeyboardInterrupt if where in ("dataset", "loss") else OSError

    def fail(place):
        calls[place] += search.scores
        if search.scores and place == where and calls[place] == at:
            raise error("here")

    class Rows:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            fail("dataset")
            return rows[i]

    def collator(examples):
        fail("collator")
        return collate(examples)

    def compute_loss(*args, **kwargs):
        fail("loss")
        return Trainer.compute_loss(made, *args, **kwargs)

    with torch.no_grad():
        for stand_in in model.stand_ins("default").values():
            stand_in.constant.zero_()  # so that they are measured
    model.base_model.model.model.layers[3].mlp.register_forward_hook(lambda *args: fail("forward"))
    search = Recorded(Rows(), **SEARCH | dict(warm_start="deviation"))
    made = trainer(tmp_path, model, callbacks=[search], max_steps=STEPS, save_strategy="no")
    made.data_collator, made.compute_loss = collator, compute_loss
    with pytest.raises(error, match="here"):
        made.train()
    assert made.state.global_step == MOMENTS[where][at]
    assert noticed(model) == search.before
    assert model.training
    assert model.skip_layers == ([] if made.state.global_step < 6 else search.report["skip_layers"])
    # a plain step of a training goes by the set, whatever it is
    search.scores = False
    watch = Watch(model)
    model.set_skip_layers([1])
    model(**collate(list(dataset(4)))).loss.backward()
    assert watch.skipped(training=True) == [1]
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_what_fails_while_training_leaves_nothing_on_the_model(tmp_path):
    """A data loader, which fails between two steps."""
    model, rows = fresh(), dataset(24)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            if made.state.global_step == 7:
                raise OSError("disk")
            return rows[i]

    made = trainer(tmp_path, model, callbacks=[EASCallback(**SEARCH)], max_steps=STEPS, save_strategy="no")
    made.train_dataset = Rows()
    with pytest.raises(OSError, match="disk"):
        made.train()
    assert not model._forward_pre_hooks


def test_what_fails_where_the_rate_rises_gives_the_rate_back(tmp_path):
    """A forward of a step, with an optimizer of the user's, which goes on in the next training."""
    model, is_wrong = fresh(), [True]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    def fail(module, args, output):
        if is_wrong and module.training and made.state.global_step == 4:
            raise OSError("device")

    model.register_forward_hook(fail)
    made = trainer(
        tmp_path, model, callbacks=[EASCallback(**SEARCH)], max_steps=STEPS, save_strategy="no",
        optimizers=(optimizer, constant),
    )  # fmt: skip
    with pytest.raises(OSError, match="device"):
        made.train()
    is_wrong.clear()
    made.train()
    assert optimizer.param_groups[0]["lr"] == 1e-3
