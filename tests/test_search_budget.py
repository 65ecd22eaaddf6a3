"""How many attentions a search skips: counts, fractions, losses and speed-ups."""

import copy
import math

import pytest
import torch
from searches import fresh, run
from transformers import TrainerCallback
from zoo.training import collate, dataset

from peft_eas.search import exchange


@pytest.mark.parametrize(("num_skip", "count"), [(3, 3), (0.5, 3), (None, 2), (0, 0)])
def test_counts_and_fractions(tmp_path, num_skip, count):
    model = fresh(num_skip=num_skip)
    run(tmp_path, model, save_strategy="no")
    assert len(model.skip_layers) == count


@pytest.mark.parametrize("allowed", [0.0, 0.4, 100.0])
def test_auto_skips_the_most_that_the_held_out_loss_allows(tmp_path, allowed):
    model = fresh(num_skip="auto", max_loss_increase=allowed)
    kept = {}

    class Keep(TrainerCallback):  # as the model is when the set is chosen
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kept["step"] = state.global_step

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 11:
                kept["model"] = copy.deepcopy(model)

    held_out = dataset(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CLEAR", math.inf)
        _, search = run(tmp_path, model, dict(search_dataset=held_out), others=[Keep()], save_strategy="no")
    report = search.report
    copied, losses = kept["model"].eval(), []
    tries = [try_ for e in report["rounds"] for try_ in zip(e["tried"], e["costs"], strict=True)]
    order = exchange.ranked([5, 4, 3, 2, 1, 0], 2, exchange.costs(tries))
    for count in range(6):
        copied.set_skip_layers(sorted(order[:count]))
        with torch.no_grad():
            losses.append(copied(**collate(list(held_out))).loss.item())
    assert report["budget"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert report["order"] == order or report["comparison"]["kept"] == "start"
    expected = max(k for k in range(6) if k == 0 or losses[k] <= losses[0] + allowed)
    assert len(model.skip_layers) == report["count"] == expected
    assert allowed < 100 or expected == 5
    assert report["budget"]["predicted_loss"] == pytest.approx(losses[expected], rel=1e-4)
    with torch.no_grad():  # what it is when the training has ended
        ended = model.eval()(**collate(list(held_out))).loss.item()
    assert report["budget"]["measured_loss"] == pytest.approx(ended, rel=1e-4)


def test_a_target_speedup_is_predicted_from_operations_and_checked_by_measurement(tmp_path, caplog):
    """The operations of a tiny Llama, counted by hand."""
    model, rows = fresh(num_skip=None, target_speedup=1.2), [dataset(1)[0]] * 4
    _, search = run(tmp_path, model, dict(search_dataset=rows), save_strategy="no")
    tokens, length = 4 * len(rows[0]["input_ids"]), len(rows[0]["input_ids"])
    attention = 2 * tokens * 32 * (32 + 16 + 16 + 32) + 2 * 2 * tokens * length * 32
    total = 6 * (attention + 2 * tokens * 3 * 32 * 48) + 2 * tokens * 32 * 99
    count = next(k for k in range(6) if total / (total - k * attention) >= 1.2)
    budget = search.report["budget"]
    assert len(model.skip_layers) == count
    assert budget["predicted_speedup"] == pytest.approx(total / (total - count * attention), rel=0.01)
    assert budget["measured_speedup"] > 0
    assert (budget["measured_speedup"] < 1.2) == ("the target is 1.20" in caplog.text)
    with pytest.raises(ValueError, match=r"`target_speedup`=9 can't be had"):
        run(tmp_path, fresh(num_skip=None, target_speedup=9), save_strategy="no")
