"""What `EASCallback` refuses."""

import logging
import math
import warnings

import pytest
from searches import SEARCH, fresh, run
from zoo import tiny
from zoo.training import dataset, trainer

from peft_eas import EASCallback


@pytest.mark.parametrize(
    "wrong",
    [
        dict(warmup_steps=-1), dict(warmup_steps=True), dict(search_steps="many"), dict(search_steps=math.inf),
        dict(interval=0), dict(interval=2.5), dict(num_candidates=0), dict(warm_start="gradient"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        EASCallback(**wrong)


def test_what_can_not_be_searched(tmp_path, caplog):
    with pytest.raises(ValueError, match="with an EAS adapter"):
        trainer(tmp_path, tiny.model("llama"), callbacks=[EASCallback()])
    for wrong in (iter([1]), {"a": dataset(4)}, "reviews.jsonl"):
        with pytest.raises(ValueError, match=rf"with this {type(wrong).__name__}.*not streamed"):
            run(tmp_path, fresh(), dict(search_dataset=wrong))
    with pytest.raises(ValueError, match="prepare it like the training set"):
        run(tmp_path, fresh(), dict(search_dataset=dataset(4).rename_columns({"input_ids": "a", "labels": "b"})))
    with pytest.raises(ValueError, match=r"no scores of layers \[3, 4, 5\]"):
        run(tmp_path, fresh(), dict(warm_start={0: 1, 1: 2, 2: 3}))
    unlabelled = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    with caplog.at_level(logging.INFO):
        model = fresh(num_skip=None, skip_layers=[1])
        run(tmp_path, model, dict(search_dataset=unlabelled), save_strategy="no")
    assert "there is nothing to search" in caplog.text
    assert model.skip_layers == [1]
    model = fresh()
    model.set_skip_layers([1])
    model.peft_config["default"].skip_layers = None
    model.skip_gates().drop_idle()
    with pytest.raises(ValueError, match="both the adapter and the stand-in"):
        run(tmp_path, model)


def test_a_forgotten_callback_is_told_at_the_first_step(tmp_path):
    def said(callbacks=(), **settings):
        model = fresh(**settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, model, callbacks=list(callbacks), max_steps=3, save_strategy="no").train()
        return [str(w.message) for w in caught if "no search is running" in str(w.message)]

    (message,) = said()
    assert "EASCallback" in message
    assert "skip_layers" in message
    assert len(said(num_skip="auto", max_loss_increase=0.1)) == 1
    for settings in (dict(callbacks=[EASCallback(**SEARCH)]), dict(num_skip=0), dict(num_skip=None, skip_layers=[1])):
        assert not said(**settings)


def test_a_callback_that_no_trainer_calls_is_refused(tmp_path):
    made = trainer(tmp_path, fresh(), max_steps=1)
    with pytest.raises(ValueError, match=r"was called by something else.*`callbacks`"):
        EASCallback().on_train_begin(made.args, made.state, made.control, made.model)
