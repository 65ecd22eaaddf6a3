"""Does the search find attentions that a model does without? Planted ones, of which the answer is known.

    python benchmarks/planted.py             # all kinds, ten seeds, 100 and 200 steps; writes results/planted.md
    python benchmarks/planted.py --seeds 2   # fewer

A small random Llama of six layers says what the labels are (they are drawn from its predictions). Then two of its
attentions, which added nothing until now, are made to add nothing still, a constant, or noise: what another random
attention would add. Every attention that is not planted matters to the labels. A search with the default settings,
fine-tuning on these labels, is to skip just the planted two.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft_eas import EASCallback, EASConfig

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("nothing", "a constant", "noise")
LAYERS, PLANTED, WORDS, TOKENS = 6, 2, 64, 16
TRAIN, SEARCH = 256, 64


def plant(kind: str, seed: int) -> tuple[LlamaForCausalLM, list[int], list[dict]]:
    """A model, the attentions that were planted in it, and examples to train on and to search with."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS, max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    # not in the first layer: what is added to a stream that is that small changes all that follows
    where = sorted(random.Random(seed).sample(range(1, LAYERS), PLANTED))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "lm_head" in name else 4.0 if "embed" in name else 6.0)
        for layer in where:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
        teacher = copy.deepcopy(model)
        for layer in where:
            projection = model.model.layers[layer].self_attn.o_proj
            if kind == "a constant":
                projection.bias.normal_(std=0.5)
            if kind == "noise":
                projection.weight.normal_(std=0.07)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(WORDS, (TRAIN + SEARCH, TOKENS), generator=generator)
        chances = teacher(ids).logits.softmax(dim=-1).flatten(0, 1)
    drawn = torch.multinomial(chances, 1, generator=generator).view(-1, TOKENS)
    labels = torch.cat([torch.full((len(ids), 1), -100), drawn[:, :-1]], dim=1)
    mask = torch.ones(TOKENS, dtype=torch.long)
    rows = [{"input_ids": i, "attention_mask": mask, "labels": w} for i, w in zip(ids, labels, strict=True)]
    return model, where, rows


def search(kind: str, steps: int, seed: int) -> dict:
    """One search with the default settings."""
    model, where, rows = plant(kind, seed)
    set_seed(seed)
    adapted = get_peft_model(model, EASConfig(num_skip=PLANTED, task_type="CAUSAL_LM"))
    callback = EASCallback(rows[TRAIN:])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3, report_to=[], seed=seed,
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(adapted, args, train_dataset=rows[:TRAIN], callbacks=[callback]).train()
    report = callback.report
    start = sorted(report["start"][:PLANTED])
    return {"kind": kind, "steps": steps, "seed": seed, "planted": where, "start": start, "found": adapted.skip_layers}


def summarise(rows: list[dict]) -> str:
    lines = [
        "Two attentions of six were planted; a search with the default settings found just them (in brackets: the",
        "start alone, which is grown when the warm-up ends):",
        "",
        "| planted attentions add | 100 steps | 200 steps |",
        "|---|---|---|",
    ]
    for kind in KINDS:
        cells = []
        for steps in (100, 200):
            runs = [row for row in rows if (row["kind"], row["steps"]) == (kind, steps)]
            found, start = (sum(row[which] == row["planted"] for row in runs) for which in ("found", "start"))
            cells.append(f"{found} of {len(runs)} ({start})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    path = RESULTS / "planted.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for seed in range(args.seeds):
        for kind in KINDS:
            for steps in (100, 200):
                if not any((row["kind"], row["steps"], row["seed"]) == (kind, steps, seed) for row in rows):
                    rows.append(search(kind, steps, seed))
                    print(rows[-1], flush=True)
                    path.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "planted.md").write_text(summarise(rows))
    print(summarise(rows))


if __name__ == "__main__":
    main()
