"""Does a longer training make up for attentions that are skipped? SmolLM2-135M on Python source, 8 of 30 skipped.

    python benchmarks/longer.py            # the runs that have no row yet, and the picture
    python benchmarks/longer.py --summary  # just the picture, from the rows there are

As in `evidence.py`, whose rows are those of 60 steps, with one seed, and with the rate that was chosen there or half of
it, as validation prefers. Both methods that skip have the same set from the first step, grown before the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import transformers
from matplotlib import pyplot as plt
from tasks import GIVEN, TASKS, Task
from trainings import Rows, Run, best_rate, work

RESULTS = Path(__file__).resolve().parent / "results"
TASK = next(task for task in TASKS if task.title == "SmolLM2, Python source")
STEPS = (240,)
METHODS = {"LoRA": 0, GIVEN: 8, "skip, LoRA": 8}  # and how many are skipped


def longer(steps: int) -> Task:
    return replace(TASK, steps=steps, name=f"{TASK.name}, {steps} steps")


def wanted_runs(short: Sequence[dict]) -> list[Run]:
    """Those of more than 60 steps; `short` are the rows of `evidence.py`."""
    rates = {method: best_rate(Run(TASK, method, count), short) for method, count in METHODS.items()}
    return [
        Run(longer(steps), method, count, 0, rates[method] / part)
        for steps in STEPS
        for part in (1, 2)
        for method, count in METHODS.items()
    ]


def losses(method: str, rows: Iterable[dict]) -> dict[int, float]:
    """Test losses of a method, by the number of steps; the rows may be of other runs, too."""
    keys = ("model", "task", "kind", "method", "skipped", "seed")
    about = {TASK.steps: (TASK.name, "run")} | {steps: (longer(steps).name, "rate") for steps in STEPS}
    found = {}
    for steps, which in about.items():
        wanted = (TASK.model, *which, method, METHODS[method], 0)
        tried = [row for row in rows if tuple(row[key] for key in keys) == wanted and row["loss"] is not None]
        if tried:
            found[steps] = min(tried, key=lambda row: row["validation_loss"])["loss"]
    return found


def draw(rows: Sequence[dict], path: Path) -> None:
    """Losses, and how far they are above LoRA's with nothing skipped, by the number of steps."""
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
    above.margins(y=0.1)
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
    short = Rows(RESULTS / "evidence.json").read()
    failed = [] if args.summary else work(wanted_runs(short), rows)
    draw([*short, *rows.read()], RESULTS / "longer.png")
    if failed:
        raise SystemExit("error: these runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
