"""The batches that a search scores by."""

import pytest
import torch
from searches import fresh, run
from transformers import TrainerCallback, default_data_collator
from zoo import tiny
from zoo.training import dataset

from peft_eas.search.held_out import HeldOut, fingerprints
from peft_eas.search.run import Search


def test_rewards_from_the_training_set_never_see_the_batch_just_trained_on(tmp_path, monkeypatch):
    trained, scored, rounds = [], [], []
    original = Search.round

    def watched(self, step):
        inner = self.held_out.batches

        def batches(number, avoid=()):
            made = inner(number, avoid)
            scored.append({tuple(row[row > 0].tolist()) for batch in made for row in batch["input_ids"]})
            return made

        self.held_out.batches = batches
        original(self, step)
        self.held_out.batches = inner
        rounds.append(set().union(*trained))

    monkeypatch.setattr(Search, "round", watched)
    model = fresh()

    def remember(module, args, kwargs):
        if module.training:
            trained.append({tuple(row[row > 0].tolist()) for row in kwargs["input_ids"]})

    class Forget(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trained.clear()

    model.register_forward_pre_hook(remember, with_kwargs=True)
    run(
        tmp_path, model, dict(interval=1), others=[Forget()], gradient_accumulation_steps=3, save_strategy="no"
    )  # half of the 24 examples in each step
    assert len(scored) == 9
    for seen, used in zip(rounds, scored, strict=True):
        assert len(seen) == 12
        assert len(used) == 6
        assert not seen & used


def test_rows_with_the_same_question_about_other_images_are_others():
    batch = tiny.inputs("llava", rows=4, padding=None)
    batch["input_ids"] = batch["input_ids"][:1].repeat(4, 1)
    batch["pixel_values"][3] = batch["pixel_values"][0]
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]

    def made_without(trained):
        found = HeldOut(rows, default_data_collator, 1, 4, seed=0).batches(
            0, fingerprints(default_data_collator(trained))
        )
        return [b["pixel_values"][0] for b in found]

    left = made_without([rows[0], rows[1]])
    assert len(left) == 4  # as many as in other processes
    assert all(torch.equal(pixels, rows[2]["pixel_values"]) for pixels in left)
    with pytest.raises(ValueError, match="Every example is being trained on"):
        made_without(rows[:3])
    # the tokens count, too
    rows[3]["input_ids"] = rows[3]["input_ids"].flip(0)
    assert len(made_without(rows[:3])) == 4


def test_columns_that_the_collator_does_not_know_are_left_out(tmp_path):
    held_out = dataset(8).add_column("text", ["?"] * 8)
    _, search = run(tmp_path, fresh(), dict(search_dataset=held_out), save_strategy="no")
    assert len(search.report["rounds"]) == 3


@pytest.mark.parametrize("tokens", [1, 32, 40, 41, 50, 60, 999])
def test_fewer_examples_are_taken_if_they_have_tokens_enough(tokens):
    rows = [{"input_ids": [1] * (8 + i % 3 - 1)} for i in range(40)]  # of 7, 8 and 9 tokens

    def padded(examples):
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        mask = [torch.ones_like(row) for row in ids]
        return {
            key: torch.nn.utils.rnn.pad_sequence(value, batch_first=True)
            for key, value in (("input_ids", ids), ("attention_mask", mask))
        }

    held_out = HeldOut(rows, padded, 3, 4, 7)
    found, all_of_them = held_out.few(8, tokens), held_out.first(8)
    lengths = [int(length) for batch in all_of_them for length in batch["attention_mask"].sum(1)]
    enough = next((n for n in range(4, 8) if sum(lengths[:n]) >= tokens), 8)
    assert len(lengths) == 8
    assert [int(length) for batch in found for length in batch["attention_mask"].sum(1)] == lengths[:enough]
    without = HeldOut(rows, lambda examples: {"pixel_values": torch.zeros(len(examples), 3)}, 3, 4, 7)
    assert sum(len(batch["pixel_values"]) for batch in without.few(8, 1)) == 8
