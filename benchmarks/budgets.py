"""Do searches with a budget keep what they promise? Predicted and measured losses and speeds, on real data.

    python benchmarks/budgets.py                 # what has no row yet; writes results/budgets.json and budgets.md
    python benchmarks/budgets.py --only tweets   # runs whose name contains this
    python benchmarks/budgets.py --summary       # just the table

MiniLM learns the tasks of `benchmarks/evidence.py` at a rate of 1e-3, with `num_skip="auto"` and `target_speedup`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import trainings
from peft import get_peft_model
from tasks import TASKS, Task
from transformers import set_seed

from peft_eas import EASCallback, EASConfig

RESULTS = Path(__file__).resolve().parent / "results"
BUDGETS = (
    {"num_skip": "auto", "max_loss_increase": 0.02},
    {"num_skip": "auto", "max_loss_increase": 0.1},
    {"target_speedup": 1.1},
)
SEEDS = 3


def name_of(budget: dict) -> str:
    """As a user writes it."""
    return ", ".join(f"{key}={value!r}" for key, value in budget.items())


def execute(task: Task, budget: dict, seed: int) -> dict:
    """Fine-tune within a budget, and say what was promised and what was kept."""
    set_seed(seed)
    model = get_peft_model(task.load(), EASConfig(**budget, **task.adapted))
    callback = EASCallback(task.splits.search)
    trainings.train(trainings.Run(task, "EAS", 0, seed), model, [callback], 1e-3)
    losses, _ = task.losses(model.merge_and_unload().eval(), task.splits.test)
    promised = callback.report["budget"]
    return {
        "task": task.name,
        "budget": name_of(budget),
        "seed": seed,
        "skip_layers": callback.report["skip_layers"],
        "test_loss": round(losses.mean().item(), 4),
        "date": time.strftime("%Y-%m-%d"),
        **{key: round(promised[key], 4) for key in promised if key.startswith(("predicted", "measured"))},
        "whole_loss": round(promised["losses"][0], 4) if "losses" in promised else None,
    }


def summarise(rows: list[dict]) -> str:
    """A Markdown table of all runs."""
    lines = [
        "# What searches with a budget promise, and keep",
        "",
        "MiniLM, 150 steps of 16. When the set is chosen, after 60 steps: the held-out loss with nothing skipped and",
        "with the set, and how much faster a held-out batch is with it by its operations, and timed. In the end: the",
        "set's loss, of the same examples. Made by `benchmarks/budgets.py`.",
        "",
        "| task | budget | seed | skipped | loss with nothing skipped | promised | in the end "
        "| speed by operations | timed |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        numbers = [row.get(key) for key in ("whole_loss", "predicted_loss", "measured_loss")]
        speeds = [row.get(key) for key in ("predicted_speedup", "measured_speedup")]
        cells = [row["task"], f"`{row['budget']}`", row["seed"], len(row["skip_layers"])]
        cells += ["" if n is None else f"{n:.3f}" for n in numbers] + ["" if s is None else f"{s:.2f}" for s in speeds]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this")
    parser.add_argument("--summary", action="store_true", help="no runs, only the table")
    args = parser.parse_args()
    path = RESULTS / "budgets.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    tasks = [task for task in TASKS if task.model == "MiniLM"]
    for seed, task, budget in itertools.product(range(SEEDS), tasks, BUDGETS):
        key = (task.name, name_of(budget), seed)
        is_done = key in [(row["task"], row["budget"], row["seed"]) for row in rows]
        if args.summary or is_done or args.only not in f"{task.name}, {key[1]}, seed {seed}":
            continue
        rows.append(execute(task, budget, seed))
        print(json.dumps(rows[-1]), flush=True)
        scratch = path.with_suffix(".part")
        scratch.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        os.replace(scratch, path)
    (RESULTS / "budgets.md").write_text(summarise(rows))
    print(summarise(rows))


if __name__ == "__main__":
    main()
