"""The plain recipe for a causal language model: all tokens are labels, and the stock Trainer searches."""

import pytest
import reference
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from zoo import tiny

from peft_eas import EASCallback, EASConfig

PROPAGATIONS = ("none", "mean")


def texts(rows, seed):
    """Of different lengths; words come in pairs, which can be learned."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (rows,), generator=generator).tolist()
    drawn = [torch.randint(0, 8, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(f"w{2 * i} w{2 * i + 1}" for i in words) for words in drawn]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_all_tokens_are_labels(tmp_path, propagation):
    tokenizer = tiny.tokenizer()
    train, held_out = (Dataset.from_list([tokenizer(text) for text in texts(rows, rows)]) for rows in (32, 8))
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2, propagation=propagation, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    given = dict(args=arguments, eval_dataset=held_out, data_collator=collator)
    trainer = Trainer(model, train_dataset=train, callbacks=[EASCallback(held_out, interval=2)], **given)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before
    assert len(model.skip_layers) == 2
    # each text alone, all of its tokens but the first
    losses = []
    for row in held_out:
        ids = torch.tensor([row["input_ids"]])
        settings = model.peft_config["default"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = reference.logits(tiny.model("llama"), reference.adapters(model), settings, inputs)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
    assert after == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert Trainer(model.merge_and_unload(), **given).evaluate()["eval_loss"] == pytest.approx(after, rel=1e-4)
