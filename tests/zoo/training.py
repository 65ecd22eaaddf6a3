"""Something to learn, and the stock Trainer that learns it."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from zoo import tiny


def batch(family="llama", seed=1, answer=4):
    inputs = tiny.inputs(family, seed=seed)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-answer] = -100
    return inputs | {"labels": labels}


def dataset(rows=24):
    generator = torch.Generator().manual_seed(3)
    examples = []
    for _ in range(rows):
        length = int(torch.randint(6, 12, (1,), generator=generator))
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        ids[-1] = 10 + ids[0] % 2  # something to learn
        examples.append({"input_ids": ids, "labels": [-100] * (length - 1) + ids[-1:]})
    return Dataset.from_list(examples)


def collate(examples):
    def padded(name, value):
        rows = [torch.tensor(e[name]) for e in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": padded("labels", -100)}


def trainer(path, model, callbacks=None, optimizers=(None, None), **kwargs):
    settings = dict(
        output_dir=str(path),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        num_train_epochs=2,
        logging_strategy="no",
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        seed=7,
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | kwargs),
        train_dataset=dataset(),
        eval_dataset=dataset(8),
        data_collator=collate,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "eas_" in n}
