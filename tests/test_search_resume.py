"""Searches that are interrupted, stopped or killed, and go on."""

import json
import logging
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from searches import STEPS, attentions, charge, fresh, run
from transformers import EarlyStoppingCallback, TrainerCallback
from zoo import tiny
from zoo.training import parameters, trainer

from peft_eas.runtime.eas_record import Record

PHASES = {"warm-up": 2, "search": 7, "settled": 15}


@pytest.fixture(scope="module")
def exact_resume(tmp_path_factory):
    """Not every version of the Trainer, with or without a search, resumes exactly within an epoch."""
    path = tmp_path_factory.mktemp("plain")
    whole = trainer(path, fresh(skip_layers=[1], num_skip=None), max_steps=9, save_steps=8)
    whole.train()
    resumed = trainer(path / "again", fresh(skip_layers=[1], num_skip=None), max_steps=9, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-8"))
    expected, actual = parameters(whole.model), parameters(resumed.model)
    if not all(torch.equal(actual[name], expected[name]) for name in expected):
        pytest.skip("these versions of transformers and accelerate don't resume exactly within an epoch")


def same_run(actual, expected, actual_search, expected_search):
    assert actual_search.report == expected_search.report
    a, b = parameters(actual.model), parameters(expected.model)
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("settings", [dict(), dict(warm_start="growth")], ids=str)
def test_a_resumed_run_draws_scores_and_chooses_like_one_that_was_not_interrupted(
    tmp_path, settings, restore, exact_resume
):
    """Also stand-ins that the warm-up has yet to end for."""

    def made(seed=0):
        model = fresh(seed=seed)
        for stand_in in model.stand_ins("default").values() if settings else ():
            stand_in.constant.data.zero_()
        return model

    whole, whole_search = run(tmp_path, made(), settings)
    for step in (*PHASES.values(), 3, 12, 13):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed, search = run(
            tmp_path / "again", made(seed=11), settings, resume=checkpoint, save_strategy="no",
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        same_run(resumed, whole, search, whole_search)


def test_a_checkpoint_of_any_phase_loads_with_the_best_set_so_far(tmp_path):
    _, search = run(tmp_path, fresh())
    rounds = search.report["rounds"]
    inputs = tiny.inputs("llama")
    for step, expected in ((2, []), (3, [4, 5]), (7, rounds[0]["skip_layers"]), (15, search.report["skip_layers"])):
        loaded = PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path / f"checkpoint-{step}"))
        assert loaded.skip_layers == expected
        logits = loaded(**inputs).logits
        merged = loaded.merge_and_unload()
        assert Record.read(merged.config.eas).skipped == expected
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_a_search_can_not_be_gone_on_from(tmp_path):
    plain = trainer(tmp_path, fresh(num_skip=2), max_steps=3, save_steps=3)
    plain.train()
    with pytest.raises(ValueError, match="without an `EASCallback`"):
        run(tmp_path, fresh(), resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_whose_search_was_changed_is_refused(tmp_path):
    run(tmp_path, fresh(), max_steps=7, save_strategy="steps", save_steps=7)
    (file,) = tmp_path.glob("checkpoint-7/trainer_state.json")
    state = json.loads(file.read_text())
    saved = state["stateful_callbacks"]["eas_search"]
    changes = [
        ("new", 1),
        ("order", [0, 0, 1, 2, 3, 4]),
        ("count", 7),
        ("interval", 0),
        ("rounds", [{}]),
        ("rounds", 3),
    ]
    changes += [("settled", [9]), ("layers", None), ("warmup", "1")]
    for wrong in (5, [], {"a": 1}, *(saved | {key: value} for key, value in changes)):
        state["stateful_callbacks"]["eas_search"] = wrong
        file.write_text(json.dumps(state))
        model = fresh()
        with pytest.raises(ValueError, match=r"`trainer_state.json` has a search"):
            run(tmp_path, model, resume=str(file.parent))
        assert not model._forward_pre_hooks


def test_training_that_ends_before_the_search_settles_with_a_warning(tmp_path, caplog):
    model = fresh()
    with caplog.at_level(logging.WARNING):
        _, search = run(tmp_path, model, max_steps=7, save_strategy="no")
    assert "Training ended at step 7, before the search did (step 12)" in caplog.text
    assert model.skip_layers == search.report["skip_layers"] == search.report["rounds"][0]["skip_layers"]
    assert search.report["is_settled"]
    assert not any(n.has_adapter("default") for n in attentions(model) if n.gates["default"])


def test_training_that_ends_in_the_warm_up_still_chooses(tmp_path, caplog):
    model = fresh()
    with caplog.at_level(logging.WARNING):
        _, search = run(tmp_path, model, max_steps=2, save_strategy="no")
    assert "Training ended at step 2, before the search did" in caplog.text
    assert model.skip_layers == search.report["skip_layers"] == [4, 5]  # the deepest


def test_the_best_checkpoint_keeps_the_set_that_made_it_the_best(tmp_path, caplog):
    model = fresh()
    charge(model, 0.5, (0, 1, 4, 5))
    with caplog.at_level(logging.WARNING):
        made, search = run(
            tmp_path, model, others=[EarlyStoppingCallback(early_stopping_patience=20)], eval_strategy="steps",
            eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True,  # so that the best one is early
        )  # fmt: skip
    best = PeftModel.from_pretrained(tiny.model("llama"), made.state.best_model_checkpoint)
    assert int(made.state.best_model_checkpoint.rsplit("-", 1)[1]) < 12
    assert best.skip_layers == model.skip_layers == search.report["skip_layers"]
    inputs = tiny.inputs("llama")
    torch.testing.assert_close(model.eval()(**inputs).logits, best.eval()(**inputs).logits)
    chosen = search.report["rounds"][-1]["skip_layers"]
    assert chosen != model.skip_layers
    assert json.loads((tmp_path / "report.json").read_text()) == search.report  # written again
    assert "was saved before the search ended" in caplog.text


class WorseAndWorse(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def test_early_stopping_settles_on_the_set_of_the_best_checkpoint(tmp_path, caplog):
    model = fresh()
    charge(model, 0.5, (0, 1, 4, 5))
    with caplog.at_level(logging.WARNING):
        made, search = run(
            tmp_path, model, others=[WorseAndWorse(), EarlyStoppingCallback(early_stopping_patience=1)],
            eval_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True,
            metric_for_best_model="loss",
        )  # fmt: skip
    assert made.state.global_step == 8
    assert "Training ended at step 8, before the search did" in caplog.text
    assert search.report["rounds"][0]["skip_layers"] != [4, 5]
    assert model.skip_layers == search.report["skip_layers"] == model.peft_config["default"].skip_layers == [4, 5]


KILLED = """
import os, signal, sys
import searches
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

searches.run(sys.argv[1], searches.fresh(), others=[Kill()], save_steps=2)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    return run(tmp_path_factory.mktemp("whole"), fresh(), save_strategy="no")


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, phase, exact_resume, whole):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(PHASES[phase] + 1)]
    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed" / f"checkpoint-{STEPS}").exists()
    resumed, search = run(tmp_path / "killed", fresh(seed=4), resume=True, save_steps=2)
    same_run(resumed, whole[0], search, whole[1])
