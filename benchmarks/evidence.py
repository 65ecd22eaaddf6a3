"""What does skipping attentions cost in accuracy? EAS, LoRA, and LoRA on what is left: nine tasks, several seeds.

    python benchmarks/evidence.py                          # everything that has no row yet, most important first
    python benchmarks/evidence.py --only MiniLM --only EAS # runs whose name contains all of these
    python benchmarks/evidence.py --list                   # names of runs, and which have a row
    python benchmarks/evidence.py --summary                # just the tables and pictures, from the rows there are

Every run of a task trains with the same batches in the same order for its seed, for as many steps, and is tested with
the same examples. The learning rate of each kind of adapter is chosen on validation data first: from three, and further
ones as long as the lowest or the highest is the best. A row is written when its run is done, and a run that has one is
not repeated; several processes share the work.

Rows of an older version of the package are made with it: PYTHONPATH=FOLDER python benchmarks/evidence.py --only 0.1.0
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import transformers
from matplotlib import pyplot as plt
from tasks import GIVEN, TASKS, Source, Task
from trainings import MAIN, METHODS, SETS, Rows, Run, current, key_of, rate_losses, rate_rows, wanted_runs, work

RESULTS = Path(__file__).resolve().parent / "results"
DRAWN = {"evidence": [method for method in MAIN if method != "LoRA"], "choices": ["EAS", *SETS]}
"""The pictures, and the methods that each shows."""


class Estimate(NamedTuple):
    """A mean over seeds, and its standard error, NaN with one seed."""

    mean: float
    error: float
    count: int

    def text(self, digits: int = 3, sign: str = "") -> str:
        spread = f" ± {self.error:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:{sign}.{digits}f}{spread}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """`None` without values."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def values(rows: Iterable[dict], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def paired(rows: Iterable[dict], reference: Iterable[dict], key: str = "loss") -> Estimate | None:
    """By how much the rows are above those of the same seeds in `reference`."""
    by_seed = {row["seed"]: row[key] for row in reference}
    pairs = [(row[key], by_seed.get(row["seed"])) for row in rows]
    return estimate([own - other for own, other in pairs if own is not None and other is not None])


class Table:
    """The rows of one task.

    Args:
        task: The task.
        rows: Of all tasks and kinds.
    """

    def __init__(self, task: Task, rows: Iterable[dict]) -> None:
        self.task = task
        self.rows = [r for r in rows if (r["model"], r["task"], r["kind"]) == (task.model, task.name, "run")]
        self.reference = self.of("LoRA", 0)

    def of(self, method: str, count: int) -> list[dict]:
        return [row for row in self.rows if (row["method"], row["skipped"]) == (method, count)]

    def markdown(self) -> str:
        percents = [round(100 * count / self.task.layers) for count in self.task.counts]
        titles = ["method"]
        for count, percent in zip(self.task.counts, percents, strict=True):
            titles += [f"{count} skipped ({percent} %): loss", "above LoRA", "accuracy"]
        titles += ["trainable", "time", "seeds"]
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for method in METHODS:
            counts = (0, 0) if method == "LoRA" else self.task.counts
            groups = [self.of(method, count) for count in counts]
            if not any(groups):
                continue
            cells = [method]
            for rows in groups:
                above = None if method == "LoRA" else paired(rows, self.reference)
                cells += [_text(estimate(values(rows, "loss"))), _text(above, sign="+")]
                cells.append(_text(estimate(values(rows, "accuracy"))))
            cells.append(" / ".join(_thousands(rows) for rows in groups if rows))
            cells.append(" / ".join(_ratio(rows, self.reference) for rows in groups if rows))
            cells.append(" / ".join(str(len(rows)) for rows in groups if rows))
            if method == "LoRA":  # the same whatever the others skip
                cells[4:7] = cells[1:4]
                cells[7:] = [cell.split(" / ")[0] for cell in cells[7:]]
            lines.append("| " + " | ".join(cells) + " |")
        errors = values(self.reference, "test_se")
        if errors:
            lines += ["", f"Standard error of a loss, by the choice of test examples: {statistics.fmean(errors):.4f}."]
        diverged = [row for row in self.rows if row["loss"] is None]
        if diverged:
            lines += ["", f"Left out, as their loss was not finite: {', '.join(map(key_of, diverged))}."]
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """Lines of the table that says whether the goals are met."""
        lines = []
        for (count, is_quarter), method in itertools.product(
            zip(self.task.counts, (True, False), strict=True), (GIVEN, "EAS")
        ):
            rows = self.of(method, count)
            above = paired(rows, self.reference)
            if above is None:
                continue
            points = paired(rows, self.reference, "accuracy")
            drops = [self.of(method, count) for method in ("drop, LoRA", "drop, means, LoRA")]
            ahead = [e for e in (paired(rows, drop) for drop in drops) if e is not None]
            closest = max(ahead, key=lambda e: e.mean, default=None)
            if above.count < 3:  # whose error says little
                verdict = f"{above.count} seed{'s' * (above.count > 1)}"
            elif is_quarter:
                verdict = "yes" if above.mean <= above.error else f"no, by {above.mean - above.error:.3f}"
            else:
                is_near = above.mean <= 0.02 or (points is not None and points.mean >= -0.01)
                is_ahead = len(ahead) == len(drops) and closest.mean < 0
                verdict = "yes" if is_near and is_ahead else "no: " + " and ".join(
                    ["not near LoRA"] * (not is_near) + ["not ahead of both"] * (not is_ahead)
                )  # fmt: skip
            cells = (
                self.task.title,
                method,
                f"{count} of {self.task.layers}",
                _text(above, sign="+"),
                "" if points is None else Estimate(*(100 * v for v in points[:2]), points.count).text(1, "+"),
                _text(closest, sign="+"),
                verdict,
            )
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    def error_by_examples(self, methods: Sequence[str]) -> float:
        """Standard error of a difference in mean test loss between two ways to choose, by the choice of test examples.

        The same models' validation losses differ by as much, in the mean: how far apart both differences are says it.
        By the median over ways and counts, as with sets that fail they are further apart.
        """
        tested, validated = 1 / self.task.test, 1 / self.task.validation
        apart = []
        for count, method in itertools.product(self.task.counts, methods):
            rows, search = self.of(method, count), self.of("EAS", count)
            above, validation = paired(rows, search), paired(rows, search, "validation_loss")
            if above is not None and validation is not None and above.mean:  # that of the same runs is 0
                apart.append(abs(above.mean - validation.mean) * math.sqrt(tested / (tested + validated)))
        # a normal distribution's standard deviation is that many times the median of its absolute values
        return statistics.median(apart) / statistics.NormalDist().inv_cdf(0.75) if apart else 0.0

    def choices(self, methods: Sequence[str]) -> list[str]:
        """Lines of the table of ways to choose; these are shown as what they are above the search."""
        lines, by_examples = [], self.error_by_examples(methods)
        for count in self.task.counts:
            rows = self.of("EAS", count)
            others = {method: paired(self.of(method, count), rows) for method in methods}
            known = {method: above for method, above in others.items() if above is not None and above.count > 2}
            if not known.keys() & SETS.keys():
                continue
            best = min(known, key=lambda method: known[method].mean)
            behind = -known[best].mean
            error = math.hypot(known[best].error, by_examples)
            verdict = "yes" if behind <= error else f"no: {behind:.3f} ± {error:.3f} behind {best}"
            cells = [self.task.title, f"{count} of {self.task.layers}", *(_text(e, sign="+") for e in others.values())]
            lines.append("| " + " | ".join([*cells, f"{by_examples:.3f}", verdict]) + " |")
        return lines


def _text(value: Estimate | None, digits: int = 3, sign: str = "") -> str:
    return "" if value is None else value.text(digits, sign)


def _thousands(rows: list[dict]) -> str:
    return f"{statistics.fmean(values(rows, 'trainable')) / 1000:,.0f} k"


def _ratio(rows: list[dict], reference: list[dict]) -> str:
    by_seed = {row["seed"]: row["seconds"] for row in reference}
    ratios = [row["seconds"] / by_seed[row["seed"]] for row in rows if by_seed.get(row["seed"])]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "?"


def summarise(rows: Sequence[dict]) -> str:
    """Markdown of everything."""
    tables = [Table(task, rows) for task in TASKS]
    tables = [table for table in tables if table.rows]
    lines = [
        "# What skipping attentions costs",
        "",
        "Means over seeds ± their standard errors, which don't include the choice of test examples: those are the same",
        "in all rows of a task. *Above LoRA*: loss minus that of LoRA with nothing skipped and the same seed, so with",
        "the same batches in the same order. *Trainable*: parameters when training ends. *Time*: of the processor",
        "while training, searches included, as a multiple of LoRA's. Two numbers in a cell are those of the two",
        "counts. Made by `benchmarks/evidence.py`, which says what each row is.",
    ]
    lines += ["", "![The losses of all methods, for each task](evidence.png)"]
    verdicts = [line for table in tables for line in table.verdicts()]
    if verdicts:
        lines += [
            "",
            "## EAS with its defaults, next to LoRA",
            "",
            "The goal with fewer skipped, about a quarter: within one standard error of LoRA's loss, or below. With",
            "more, about 40 %: a lower loss than LoRA has on what is left, zeros or means in place (*above drop*:",
            "the better of the two), and within 0.02 of LoRA's with nothing skipped, or one point of its accuracy.",
            "",
            "| model, task | method | skipped | loss above LoRA | points above LoRA | loss above drop | goal met |",
            "|---|---|---|---|---|---|---|",
            *verdicts,
        ]
    ways = [m for m in (GIVEN, *SETS) if any(table.of(m, count) for table in tables for count in table.task.counts)]
    choices = [line for table in tables for line in table.choices(ways)]
    if choices:
        titles = ["model, task", "skipped", *ways, "by examples", "search best"]
        lines += [
            "",
            "## Ways to choose the set",
            "",
            "Loss above that of EAS with its search, same seeds: where it is positive, the search is better. Goal: the",
            "search is the best, or within one standard error of the best, of what has three seeds or more. That error",
            "is over seeds and, *by examples*, over the choice of those to test with, as far as it moves differences:",
            "told by how far these are from the same models' on validation examples. A set that two ways choose is",
            "trained once.",
            "",
            "![The losses with sets that were chosen in other ways, for each task](choices.png)",
            "",
            "| " + " | ".join(titles) + " |",
            "|---" * len(titles) + "|",
            *choices,
        ]
    for table in tables:
        task = table.task
        lines += ["", f"## {task.title}", "", _sizes(task), "", table.markdown()]
    chosen = _rates(rows)
    several = " and ".join(task.title for task in TASKS if task.rate_seeds > 1)
    if chosen:
        lines += [
            "",
            "## Learning rates",
            "",
            "Validation loss with each, of the lower count; the lowest is taken, whatever count and seed. It is that",
            f"of one seed, or of three, where runs of one rate differ by more than rates do: {several}.",
        ]
        lines += ["", "| model, task | adapter | rate: loss |", "|---|---|---|", *chosen]
    return "\n".join(lines) + "\n"


def _sizes(task: Task) -> str:
    what = "windows" if isinstance(task, Source) else "examples"
    return f"{task.steps} steps of {task.batch_size}; tested with {task.test:,} {what}."


def _rates(rows: Sequence[dict]) -> list[str]:
    lines = []
    for task in TASKS:
        for kind in task.rates:
            run = Run(task, kind, 0 if kind == "LoRA" else task.counts[0])
            losses = rate_losses(rate_rows(run, rows))
            if not losses:
                continue
            best = min(losses, key=losses.__getitem__)
            cells = (
                f"{'**' * (rate == best)}{rate:g}{'**' * (rate == best)}: "
                + (f"{losses[rate]:.3f}" if math.isfinite(losses[rate]) else "not finite")
                for rate in sorted(losses)
            )
            lines.append(f"| {task.title} | {kind} | {', '.join(cells)} |")
    return lines


def draw(rows: Sequence[dict], methods: Iterable[str], path: Path) -> None:
    """One panel a task: the mean loss of each method, by how many are skipped; LoRA's is a line, and an arrow points to
    what is far worse."""
    tables = [Table(task, rows) for task in TASKS]
    # a panel of one method alone compares nothing
    tables = [t for t in tables if sum(any(t.of(m, count) for count in t.task.counts) for m in methods) > 1]
    if not tables:
        return
    shown = [method for method in methods if any(table.of(method, count) for table in tables
             for count in table.task.counts)]  # fmt: skip
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.6 * columns + 1.8, lines * (0.24 * len(shown) + 1.3)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, table in zip(panels.flat, tables, strict=False):
        lora = estimate(values(table.reference, "loss"))
        if lora is not None:
            axes.axvline(lora.mean, color="0.3", linestyle="--", linewidth=1)
            if lora.count > 1:
                axes.axvspan(lora.mean - lora.error, lora.mean + lora.error, color="0.3", alpha=0.15, linewidth=0)
        main = [values(rows, "loss") for method in MAIN for count in (0, *table.task.counts)
                if (rows := table.of(method, count))]  # fmt: skip
        means = [statistics.fmean(losses) for losses in main if losses]
        limit = 1.25 * max(means, default=math.inf) - 0.25 * min(
            means, default=0
        )  # beyond it are other ways that failed
        for count, color, shift in zip(table.task.counts, ("tab:blue", "tab:orange"), (-0.15, 0.15), strict=True):
            for y, method in enumerate(shown):
                loss = estimate(values(table.of(method, count), "loss"))
                if loss is None:
                    continue
                if loss.mean > limit:
                    axes.plot(limit, y + shift, ">", color=color, markersize=6)
                    continue
                error = loss.error if loss.count > 1 else 0
                axes.errorbar(loss.mean, y + shift, xerr=error, fmt="o", color=color, markersize=4, capsize=2)
        if math.isfinite(limit) and len(means) > 1:
            axes.set_xlim(right=limit + 0.03 * (limit - min(means)))
        few, many = table.task.counts
        axes.set_title(f"{table.task.title} ({few}, {many} of {table.task.layers})", fontsize=9)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[len(tables) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(range(len(shown)), shown)
    panels[0, 0].set_ylim(len(shown) - 0.4, -0.6)
    for color, text in (("tab:blue", "fewer skipped"), ("tab:orange", "more skipped")):
        panels[0, 0].plot([], [], "o", color=color, markersize=4, label=text)
    panels[0, 0].plot([], [], "--", color="0.3", linewidth=1, label="LoRA, nothing skipped")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    figure.supxlabel("test loss, mean over seeds and its standard error", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="runs whose name contains this; all of several"
    )
    parser.add_argument("--list", action="store_true", help="no runs, only their names")
    parser.add_argument("--summary", action="store_true", help="no runs, only the tables and pictures")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # each fresh head is reported otherwise
    rows = Rows(RESULTS / "evidence.json")
    runs = wanted_runs(args.only)
    if args.list:
        done = {key_of(row) for row in current(rows.read())}
        for run in runs:
            print("done   " if run.key in done else "missing", run.key)
        return
    failed = [] if args.summary else work(runs, rows)
    made = current(rows.read())
    (RESULTS / "evidence.md").write_text(summarise(made))
    for name, methods in DRAWN.items():
        draw(made, methods, RESULTS / f"{name}.png")
    if failed:
        raise SystemExit("error: these runs failed, or need one that did:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
