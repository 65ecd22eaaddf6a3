"""Does a longer training make up for attentions that are skipped? SmolLM2-135M on Python source, 8 of 30 skipped.

    python benchmarks/longer.py            # the runs that have no row yet, and the picture
    python benchmarks/longer.py --summary  # just the picture, from the rows there are

As in `evidence.py`, whose rows are those of 60 steps, with one seed, and with each method's rate chosen from two by the
validation loss. All methods skip the same set from the first step, which was grown before the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import transformers
from matplotlib import pyplot as plt
from tasks import GIVEN, TASKS, Task
from trainings import Rows, Run, work

RESULTS = Path(__file__).resolve().parent / "results"
TASK = next(task for task in TASKS if task.title == "SmolLM2, Python source")
STEPS = (240,)
RATES = (2e-3, 4e-3)
METHODS = {"LoRA": 0, GIVEN: 8, "skip, LoRA": 8}  # and how many are skipped


def longer(steps: int) -> Task:
    return replace(TASK, steps=steps, name=f"{TASK.name}, {steps} steps")


def wanted_runs() -> list[Run]:
    tasks = map(longer, STEPS)
    return [Run(task, method, n, 0, rate) for task in tasks for rate in RATES for method, n in METHODS.items()]


def losses(method: str, rows: Iterable[dict]) -> dict[int, float]:
    """Test losses of a method, by the number of steps: with the rate that validation prefers.

    Args:
        method: A name of `METHODS`.
        rows: Of runs of `TASK`, and of longer ones.
    """
    steps_of = {TASK.name: TASK.steps} | {longer(steps).name: steps for steps in STEPS}
    about = (TASK.model, method, METHODS[method], 0)
    best: dict[int, dict] = {}
    for row in rows:
        steps = steps_of.get(row["task"])
        is_finite = row["loss"] is not None and row["validation_loss"] is not None
        if steps and is_finite and tuple(row[key] for key in ("model", "method", "skipped", "seed")) == about:
            best[steps] = min(best.get(steps, row), row, key=lambda each: each["validation_loss"])
    return {steps: best[steps]["loss"] for steps in sorted(best)}


def draw(rows: list[dict], path: Path) -> None:
    """Losses, and how far they are above LoRA's with nothing skipped, by the number of tokens trained on."""
    figure, (whole, above) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    reference = losses("LoRA", rows)
    for method, count in METHODS.items():
        found = losses(method, rows)
        line = whole.plot(list(found), list(found.values()), "o-", markersize=4)[0]
        line.set_label(f"{method}, {count} of {TASK.layers} skipped" if count else f"{method}, nothing skipped")
        differences = {steps: found[steps] - reference[steps] for steps in found.keys() & reference if count}
        steps = sorted(differences)
        above.plot(steps, [differences[n] for n in steps], "o-", markersize=4, color=line.get_color())
    whole.set_ylabel("test loss, nats a token")
    above.set_ylabel("above LoRA, nothing skipped")
    above.set_ylim(bottom=0)
    whole.legend(fontsize=8)
    for axes in (whole, above):
        axes.set_xlabel(f"steps of {TASK.batch_size * TASK.window} tokens")
        axes.set_xlim(left=0)
        axes.grid(color="0.92")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="no runs, only the picture")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    rows = Rows(RESULTS / "longer.json")
    failed = [] if args.summary else work(wanted_runs(), rows)
    draw([*Rows(RESULTS / "evidence.json").read(), *rows.read()], RESULTS / "longer.png")
    if failed:
        raise SystemExit("error: these runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
