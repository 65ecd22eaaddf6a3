"""A search in TRL's trainers: scored by their own losses, or refused before anything is trained."""

import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from searches import SEARCH, STEPS, Watch, fresh
from transformers import AutoModelForSequenceClassification
from zoo import tiny

from peft_eas import EASCallback, EASConfig
from peft_eas.runtime.eas_record import Record
from peft_eas.search import exchange

trl = pytest.importorskip("trl")

COMMON = dict(
    max_steps=9, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    seed=7, bf16=False, gradient_checkpointing=False, logging_steps=1,
)  # fmt: skip
PAIRS = [
    {"prompt": f"w{i} w{2 * i} w{3 * i}", "chosen": f" w{i + 1} w5", "rejected": f" w{i + 2}"} for i in range(4, 28)
]
LABELLED = [{"prompt": f"w{i} w{2 * i}", "completion": f" w{i + 1} w5", "label": i % 2 == 0} for i in range(4, 28)]


def classifier():
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.15)
    return get_peft_model(model, EASConfig(num_skip=2, task_type="SEQ_CLS"))


TRAINERS = {
    "DPO": ("DPOTrainer", fresh, PAIRS, {}),
    "DPO with the reference's log-probabilities": ("DPOTrainer", fresh, PAIRS, {"precompute_ref_log_probs": True}),
    "KTO": ("KTOTrainer", fresh, LABELLED, {}),
    "Reward": ("RewardTrainer", classifier, PAIRS, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_scores_are_the_trainer_s_own_losses_and_its_metrics_are_those_of_training(tmp_path, name, monkeypatch):
    kind, model_of, rows, settings = TRAINERS[name]
    if not hasattr(trl, kind):
        pytest.skip(f"this version of TRL has no {kind}")
    monkeypatch.setattr(exchange, "CLEAR", math.inf)
    config = getattr(trl, kind.replace("Trainer", "Config"))
    model, kept = model_of(), []
    made = getattr(trl, kind)(
        model, args=config(output_dir=str(tmp_path), **COMMON | settings), processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list(rows[:16]), eval_dataset=Dataset.from_list(rows[16:]),
    )  # fmt: skip
    search = EASCallback(made.eval_dataset, **SEARCH | dict(search_steps=3))
    made.add_callback(search)
    compute_loss = made.compute_loss

    def watched(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        if not model.training and made.state.global_step == 6:
            kept.append(loss.item())
        return loss

    made.compute_loss = watched
    made.train()
    (entry,) = search.report["rounds"]
    assert entry["losses"] == pytest.approx(kept[: len(entry["losses"])])
    assert len(kept) == 5 * len(entry["losses"])  # the set, and four tries
    assert all(math.isfinite(x) for cost in entry["costs"] for x in cost)
    assert any(abs(x) > 1e-6 for cost in entry["costs"] for x in cost)
    assert model.skip_layers == [4, 5]
    # stand-ins were measured with its batches
    stand_ins = [m.eas_stand_in["default"] for m in model.modules() if "default" in getattr(m, "eas_stand_in", ())]
    assert len(stand_ins) == 2
    assert all(stand_in.constant.any() for stand_in in stand_ins)
    # its metrics know of nothing but training
    assert not made._metrics["eval"]
    assert all("eval" not in key for logs in made.state.log_history for key in logs)


def test_a_trainer_without_a_loss_of_held_out_batches_is_refused_before_anything_is_trained(tmp_path):
    model, rewarded = fresh(), []

    def reward(completions, **kwargs):
        rewarded.append(len(completions))
        return [float(len(c)) for c in completions]

    prompts = Dataset.from_list([{"prompt": f"w{i} w{2 * i}"} for i in range(4, 28)])
    for kind in ("GRPO", "RLOO"):
        settings = COMMON | dict(num_generations=2, max_completion_length=4)
        made = getattr(trl, f"{kind}Trainer")(
            model, args=getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), **settings), reward_funcs=reward,
            processing_class=tiny.tokenizer(), train_dataset=prompts, callbacks=[EASCallback()],
        )  # fmt: skip
        with pytest.raises(ValueError, match=rf"{kind}Trainer has none.*SFTTrainer.*skip_layers"):
            made.train()
        assert made.state.global_step == 0
    assert not rewarded


def test_trl_s_sft_trainer(tmp_path):
    rows = [{"prompt": f"w{i} w{2 * i} w{3 * i}", "completion": f" w{10 + i % 2}"} for i in range(4, 28)]
    model = fresh()
    watch = Watch(model)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=7, bf16=False, gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    made = trl.SFTTrainer(
        model, args=arguments, processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list(rows[:16]),
        eval_dataset=Dataset.from_list(rows[16:]), callbacks=[watch],
    )  # fmt: skip
    search = EASCallback(made.eval_dataset, **SEARCH)
    made.add_callback(search)
    made.train()
    entries = search.report["rounds"]
    assert [entry["step"] for entry in entries] == [6, 9, 12]
    assert all(math.isfinite(loss) for entry in entries for loss in entry["losses"])
    assert watch.steps[-1] == model.skip_layers == search.report["skip_layers"]
    assert any("eas/skipped" in logs for logs in made.state.log_history)
    merged = model.merge_and_unload()
    assert Record.read(merged.config.eas).skipped == search.report["skip_layers"]
    # a dataset that is not prepared is refused
    refused = trl.SFTTrainer(
        fresh(), args=arguments, processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list(rows[:16]),
        callbacks=[EASCallback(Dataset.from_list(rows[16:]), **SEARCH)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="after a TRL trainer has been made"):
        refused.train()
