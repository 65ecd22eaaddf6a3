"""Does the search find attentions that a task does not need? Sets by a search, by one-shot scores, and by chance.

    python benchmarks/search.py                 # everything that has no result yet, most important first
    python benchmarks/search.py --only k8       # runs whose name contains this
    python benchmarks/search.py --summary       # just the table and the picture, from the results there are

Every run fine-tunes SmolLM2-135M on the same movie reviews for as many steps, and is judged by the same held-out ones.
The result of a run is written when it is done, and a run that has one is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bandit
import matplotlib

matplotlib.use("agg")
import torch
import transformers
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from peft_eas import EASCallback, EASConfig, score_attentions
from peft_eas.search.run import Search

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from real_data import collator, load_model, load_tokenizer, movie_reviews, tokenise
from sentiment import accuracy_and_loss, next_token_logits

RESULTS = Path(__file__).resolve().parent / "results"
TRAIN, TEST, SEARCH = 1120, 600, 128
LORA_LEARNING_RATE, EAS_LEARNING_RATE = 5e-4, 1e-3
BATCH_SIZE = 8
MAX_LENGTH = 80  # of a review, in characters
COUNTS = (8, 12, 4)
NUM_LAYERS = 30

SEARCHES = ("search", "search by the paper's bandit")


class Bandit(Search):
    """The paper's search (section 3.2), as a reference: each step skips a drawn set, each round scores drawn sets, and
    the set with the highest preferences is chosen."""

    LEARNING_RATE, CANDIDATES = 2.0, 3

    def begin(self, step: int) -> None:
        super().begin(step)
        self.preferences = bandit.preferences_from_scores(self.state.scores, self.state.count)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.state.start and self.state.settled is None:
            arms = bandit.draw(self.preferences, self.state.count, random.Random(f"{self.args.seed} step {step}"))
            self.gates.set(self.state.to_layers(arms))

    def after_step(self, step: int) -> None:
        if self.state.start and self.state.settled is None:
            self.gates.set(self.state.best())
        super().after_step(step)

    def round(self, step: int) -> None:
        state, rng = self.state, random.Random(f"{self.args.seed} round {step}")
        subsets = bandit.draw_distinct(self.preferences, state.count, self.CANDIDATES, rng)
        with self.scorer.aside(step):
            batches, losses = self.held_out.batches(len(state.rounds)), []
            for arms in subsets:
                with self.gates.skipping(state.to_layers(arms)):
                    losses.append(self.scorer.mean(batches))
        self.preferences = bandit.update(self.preferences, subsets, losses, self.LEARNING_RATE)
        chosen = bandit.choose(self.preferences, state.count)
        state.order = [*chosen, *(arm for arm in range(len(state.layers)) if arm not in chosen)]
        self.gates.set(state.best())
        nothing: dict = {"tried": [], "costs": [], "exchanged": []}
        state.rounds.append({"step": step, "losses": losses, "skip_layers": state.best(), **nothing})


class BanditCallback(EASCallback):
    """`EASCallback`, by the paper's bandit."""

    search_class = Bandit


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        group: `"sets"`.
        method: How the set is found.
        count: Attentions skipped.
        seed: Seed of the training.
        draw: Number of the random set.
    """

    group: str
    method: str
    count: int
    seed: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        parts = [self.group, f"k{self.count}", self.method, f"seed {self.seed}"]
        return ", ".join(parts + [f"draw {self.draw}"] * (self.method == "random"))


def all_runs() -> list[Run]:
    """Most important first."""
    runs = [Run("sets", "LoRA", 0)]
    for count in COUNTS:
        methods = (*SEARCHES, "growth", "deviation", "kl", "similarity", "deepest", "loss")
        runs += [Run("sets", method, count) for method in methods]
        runs += [Run("sets", "random", count, draw=draw) for draw in range(3)]
    for seed in (1, 2):
        runs += [Run("sets", method, 8, seed) for method in (*SEARCHES, "growth", "deviation", "kl", "deepest")]
        runs.append(Run("sets", "LoRA", 0, seed))
    return runs


class Task:
    """The reviews, as every run has them."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer()
        rest, self.test = movie_reviews(TRAIN + SEARCH, TEST, MAX_LENGTH)
        self.test.sort(key=lambda review: len(review.text))
        self.train = tokenise(rest[:TRAIN], self.tokenizer)
        self.search = tokenise(rest[TRAIN:], self.tokenizer)
        self.collate = collator(self.tokenizer)
        self.scores: dict[str, dict[int, float]] = {}

    def one_shot(self, method: str) -> dict[int, float]:
        """Scores of the pretrained model, by the search set."""
        if method not in self.scores:
            batches = [self.collate(self.search[i : i + 16]) for i in range(0, 64, 16)]
            self.scores[method] = score_attentions(load_model(), batches, method=method)
        return self.scores[method]


def set_of(run: Run, task: Task) -> list[int] | None:
    """The set to skip; `None` if it is searched for."""
    if run.method in SEARCHES:
        return None
    if run.method == "random":
        return sorted(random.Random(f"{run.count} {run.draw}").sample(range(NUM_LAYERS), run.count))
    if run.method == "deepest":
        return list(range(NUM_LAYERS - run.count, NUM_LAYERS))
    scores = task.one_shot(run.method)
    return sorted(sorted(scores, key=scores.get)[: run.count])


def arguments(folder: str, learning_rate: float, seed: int, max_steps: int = -1) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        num_train_epochs=1,
        max_steps=max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
    )


def where() -> dict:
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def train(run: Run, task: Task, folder: str) -> tuple[PeftModel, dict]:
    """Fine-tune, and say what came of it."""
    set_seed(run.seed)
    base, callbacks = load_model(), []
    if run.method == "LoRA":
        config, learning_rate = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), LORA_LEARNING_RATE
    else:
        skip_layers, learning_rate = set_of(run, task), EAS_LEARNING_RATE
        wanted = {"num_skip": run.count} if skip_layers is None else {"skip_layers": skip_layers}
        config = EASConfig(**wanted, task_type="CAUSAL_LM")
        callbacks.append((EASCallback if run.method != SEARCHES[1] else BanditCallback)(task.search))
    model = get_peft_model(base, config)
    start = time.perf_counter()
    Trainer(
        model,
        arguments(folder, learning_rate, run.seed),
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=callbacks,
    ).train()
    about = {"seconds": round(time.perf_counter() - start, 1)}
    if run.method != "LoRA":
        about["skip_layers"] = model.skip_layers
    if run.method in SEARCHES:
        about |= {"rounds": len(callbacks[0].report["rounds"]), "interval": callbacks[0].interval}
    return model.eval(), about


def execute(run: Run, task: Task) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model, about = train(run, task, folder)
    merged = model.merge_and_unload()
    accuracy, loss = accuracy_and_loss(next_token_logits(merged, task.tokenizer, task.test), task.tokenizer, task.test)
    return {
        "group": run.group,
        "method": run.method,
        "count": run.count,
        "seed": run.seed,
        "accuracy": round(accuracy, 4),
        "loss": round(loss, 4),
        **about,
        **where(),
    }


class Timed(EASCallback):
    """Knows how long it took."""

    spent = 0.0

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        start = time.perf_counter()
        super().on_step_end(*args, **kwargs)
        self.spent += time.perf_counter() - start


def overhead(task: Task) -> dict:
    """What three rounds at the default settings cost, as a share of the steps' own time."""
    callback = Timed(task.search, warmup_steps=1, search_steps=60)
    model = get_peft_model(load_model(), EASConfig(num_skip=8, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, arguments(folder, EAS_LEARNING_RATE, 0, max_steps=61), train_dataset=task.train,
            data_collator=task.collate, callbacks=[callback],
        )  # fmt: skip
        seconds = trainer.train().metrics["train_runtime"]
    return {
        "group": "overhead",
        "rounds": len(callback.report["rounds"]),
        "overhead": round(callback.spent / (seconds - callback.spent), 4),
        **where(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Table and picture
# ----------------------------------------------------------------------------------------------------------------------


def summarise(results: dict[str, dict]) -> str:
    """A Markdown table of all runs."""
    lines = [
        f"SmolLM2-135M, {TRAIN} movie reviews once (batch {BATCH_SIZE}), {TEST} others to test with: accuracies are",
        "known to about 1.4 points. Loss: cross-entropy of the right answer. ± is the standard deviation over runs.",
        "",
        "| skipped | set | accuracy | loss | runs | layers (first run) |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[tuple, list[dict]] = {}
    for result in results.values():
        if result["group"] == "sets":
            rows.setdefault((result["count"], result["method"]), []).append(result)
    for (count, method), runs in sorted(rows.items(), key=lambda item: (item[0][0], _mean(item[1], "loss"))):
        layers = " ".join(map(str, runs[0].get("skip_layers", [])))
        accuracy, loss = _spread(runs, "accuracy"), _spread(runs, "loss")
        lines.append(f"| {count} | {method} | {accuracy} | {loss} | {len(runs)} | {layers} |")
    if "overhead" in results:
        measured = results["overhead"]
        lines += [
            "",
            f"Scoring candidates at the default settings takes {100 * measured['overhead']:.1f} % of the time of the "
            f"search's steps ({measured['rounds']} rounds).",
        ]
    return "\n".join(lines) + "\n"


def _mean(runs: list[dict], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _spread(runs: list[dict], key: str) -> str:
    deviation = f" ± {statistics.stdev(run[key] for run in runs):.3f}" if len(runs) > 1 else ""
    return f"{_mean(runs, key):.3f}{deviation}"


def draw(results: dict[str, dict], path: Path) -> None:
    """Loss and accuracy by number skipped, one marker a run."""
    shown = [result for result in results.values() if result["group"] == "sets"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    methods = list(dict.fromkeys(result["method"] for result in shown if result["method"] != "LoRA"))
    for axes, key in zip(panels, ("loss", "accuracy"), strict=True):
        for m, (method, marker) in enumerate(zip(methods, itertools.cycle("ov*Ds^Px"), strict=False)):
            runs = [result for result in shown if result["method"] == method]
            if not runs:
                continue
            xs = [result["count"] + (m - 3) * 0.3 for result in runs]
            face = "none" if marker in "s^P" else None
            axes.scatter(xs, [r[key] for r in runs], marker=marker, facecolors=face, edgecolors=None if face is None
                         else f"C{m}", color=f"C{m}" if face is None else None, label=method)  # fmt: skip
        for result in (result for result in shown if result["method"] == "LoRA"):
            axes.axhline(result[key], color="0.4", linestyle="--", linewidth=1)
        axes.set_xlabel("attentions skipped, of 30 (dashed: LoRA, nothing skipped)")
        axes.set_ylabel(f"held-out {key}")
        axes.set_xticks(sorted(COUNTS))
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this")
    parser.add_argument("--summary", action="store_true", help="no runs, only the table and the picture")
    args = parser.parse_args()
    path = RESULTS / "search-0.2.json"
    task: Callable[[], Task] = functools.cache(Task)
    work = {"overhead": overhead} | {run.name: functools.partial(execute, run) for run in all_runs()}
    for name, execute_it in work.items():
        if args.summary or args.only not in name or name in read(path):
            continue
        print(f"== {name}", flush=True)
        result = execute_it(task())
        print(json.dumps(result), flush=True)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(read(path) | {name: result}, indent=1) + "\n")
        os.replace(scratch, path)
    results = read(path)
    (RESULTS / "search-0.2.md").write_text(summarise(results))
    draw(results, RESULTS / "search-0.2.png")
    print(summarise(results))


if __name__ == "__main__":
    main()
