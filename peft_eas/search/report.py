"""What a search leaves behind: `report.json`, and a picture of it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import one_line
from ..folders import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

REPORT = "report.json"
PICTURE = "search.png"
ROUND = {"step", "tried", "costs", "losses", "exchanged", "skip_layers"}
"""What is written down of each round."""


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and, if matplotlib is installed, `search.png`; a reader never sees half a file."""
    with new_file(folder / REPORT) as file:
        file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    try:
        plot_search(report, folder / PICTURE)
    except ImportError:
        logger.info("There is no picture of the search, as matplotlib is not installed.")


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """The content of `report.json`, of the file or of the folder that it is in.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not the report of a search.
    """
    file = Path(path)
    file = file / REPORT if file.is_dir() else file
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        layers = report["layers"]
        is_right = (
            _are(layers, (int, str))
            and sorted(report["start"]) == list(range(len(layers)))
            and {*report["skip_layers"]} <= {*layers}
            and all(entry.keys() >= ROUND for entry in report["rounds"])
            and all(isinstance(report[name], int) for name in ("count", "warmup", "settle", "ignored"))
            and all(isinstance(report[name], dict) for name in ("settings", "comparison", "budget"))
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the report of a search ({type(error).__name__}: {one_line(error)}).") from None
    if not is_right:
        raise ValueError(f"{file} is not the report of a search, or was changed.")
    return report


def _are(items: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(items, list) and all(isinstance(item, kinds) for item in items)


def reasons(report: dict[str, Any]) -> list[str]:
    """Why each attention is skipped or retained, in the order of the report's `layers`."""
    layers, chosen = report["layers"], set(report["skip_layers"])
    place = {layers[i]: rank for rank, i in enumerate(report["start"], start=1)}
    by = report["settings"]["warm_start"]
    said = {layer: f"{place[layer]} of {len(layers)} by {by}" for layer in layers}
    for entry in report["rounds"]:
        for retained, skipped in entry["exchanged"]:
            said[retained] = f"dearer than {skipped}, step {entry['step']}"
            said[skipped] = f"cheaper than {retained}, step {entry['step']}"
    started = {layers[i] for i in report["start"][: report["count"]]}
    if report["comparison"].get("kept") == "start":
        exchanged = {layer for entry in report["rounds"] for pair in entry["exchanged"] for layer in pair}
        said |= dict.fromkeys(exchanged, "the start did better in the end")
    for layer in layers:  # a budget moved the edge of the set, or an earlier checkpoint was the best
        if said[layer].endswith(f"by {by}") and (layer in chosen) != (layer in started):
            said[layer] += ", then by cost"
    return [said[layer] for layer in layers]


def plot_search(report: dict[str, Any] | str | os.PathLike, path: str | os.PathLike | None = None) -> Figure:
    """Draw a search, a row for each attention: the score that it starts from, when it was skipped and tried, what
    skipping it costs, and why it is skipped or retained; below, the held-out losses, and the budget's if there is one.

    Args:
        report: The content of `report.json`, the file, or the folder that it is in.
        path: Where to save the picture, if anywhere.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not the report of a search.
        ImportError: without matplotlib.
    """
    if not isinstance(report, dict):
        report = read_report(report)
    try:
        figure = _drawn(report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is not the report of a search, or was changed ({type(error).__name__}: {one_line(error)})."
        ) from error
    if path is not None:
        with new_file(path) as file:
            figure.savefig(file, dpi=150)
    return figure


def _drawn(report: dict[str, Any]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, chosen = report["layers"], set(report["skip_layers"])
    places, colours = range(len(layers)), ["tab:red" if layer in chosen else "0.6" for layer in layers]
    curve = report["budget"].get("losses")
    below = 1 + bool(curve)
    rows = max(2.5, 0.17 * len(layers))
    figure = Figure(figsize=(11, rows + 2.1 * below + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + below, 3, height_ratios=[rows, *[1.7] * below], width_ratios=[1, 2.2, 1.5])
    scores, steps, costs = (figure.add_subplot(grid[0, column]) for column in range(3))

    scores.barh(places, [score or 0 for score in report["scores"]], height=0.7, color=colours)
    edge = abs(report["scores"][report["start"][report["count"] - 1]] or 0)  # scores have a long tail
    scores.set_xscale("symlog", linthresh=edge or 1.0)
    scores.set_xticks([tick for tick in scores.get_xticks() if abs(tick) >= (edge or 1.0)])
    scores.set_xlabel(f"start: {report['settings']['warm_start']}", fontsize=8)
    names = [f"{layer} ●" if layer in chosen else str(layer) for layer in layers]
    scores.set_ylabel("attention (●: skipped)", fontsize=8)

    at = {layer: place for place, layer in enumerate(layers)}
    first = (
        [layers[i] for i in report["start"][: len(report["rounds"][0]["skip_layers"])]] if report["rounds"] else chosen
    )
    sets = [first, *(entry["skip_layers"] for entry in report["rounds"])]
    times = [report["warmup"], *(entry["step"] for entry in report["rounds"])]
    end = max(report["settle"], times[-1])
    end += max(1, round(0.15 * end))
    for skipped, begin, until in zip(sets, times, [*times[1:], report["settle"]], strict=True):
        steps.barh([at[layer] for layer in skipped], max(0, until - begin), left=begin, height=0.96, color="0.75")
    if report["is_settled"]:
        steps.barh([at[x] for x in chosen], end - report["settle"], left=report["settle"], height=0.96, color="tab:red")
    tried = [(entry["step"], at[layer]) for entry in report["rounds"] for layer in entry["tried"]]
    if tried:
        steps.plot(*zip(*tried, strict=True), ".", color="black", markersize=3)
    swapped = [(entry["step"], at[x]) for entry in report["rounds"] for pair in entry["exchanged"] for x in pair]
    if swapped:
        steps.plot(*zip(*swapped, strict=True), "x", color="black", markersize=6)
    steps.set_xlim(0, end)
    steps.set_xlabel("step (bar: skipped, dot: tried, cross: exchanged)", fontsize=8)

    known = [(place, *cost) for place, cost in enumerate(report["costs"]) if cost is not None]
    for place, mean, error in known:
        costs.errorbar(
            mean, place, xerr=error or 0, fmt="o", markersize=3, color=colours[place], ecolor="0.4", linewidth=1
        )
    costs.axvline(0, color="0.4", linewidth=0.7)
    costs.set_xlabel("skipping it costs, in loss (± 1 s. e.)", fontsize=8)
    costs.xaxis.set_major_locator(MaxNLocator(4))
    costs.yaxis.tick_right()
    for axes in (scores, steps, costs):
        axes.set_ylim(-0.6, len(layers) - 0.4)
        axes.set_yticks(places, [])
        axes.tick_params(labelsize=7, length=2)
    scores.set_yticks(places, names)
    costs.set_yticks(places, reasons(report))
    state = "chosen" if report["is_settled"] else "best so far"
    figure.suptitle(f"{len(chosen)} of {len(layers)} attentions skipped ({state})", fontsize=10)

    losses = figure.add_subplot(grid[1, :])
    means = [(e["step"], sum(e["losses"]) / len(e["losses"])) for e in report["rounds"] if e["losses"]]
    if means:
        losses.plot(*zip(*means, strict=True), marker="o", markersize=3, color="black", label="of a round")
    for which, marker in (("start", "s"), ("found", "D")):
        compared = report["comparison"].get(which)
        if compared and compared["loss"] is not None:
            label = f"all held-out examples, {which}: {compared['loss']:.4g}"
            losses.plot([report["settle"]], [compared["loss"]], marker, color="tab:red", fillstyle="none", label=label)
    if losses.lines:
        losses.legend(fontsize=7)
    losses.set_xlim(0, end)
    losses.set_ylabel("held-out loss", fontsize=8)
    losses.set_xlabel("optimizer step", fontsize=8)
    losses.tick_params(labelsize=7)
    for axes in (steps, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    if curve:
        axes = figure.add_subplot(grid[2, :])
        kept = [(k, loss) for k, loss in enumerate(curve) if loss is not None]
        axes.plot(*zip(*kept, strict=True), marker="o", markersize=3, color="black", linewidth=1)
        axes.axhline(curve[0] + report["budget"]["max_loss_increase"], color="0.4", linestyle="--", linewidth=1)
        axes.axvline(len(chosen), color="0.4", linestyle=":", linewidth=1)
        axes.set_ylabel("held-out loss", fontsize=8)
        axes.set_xlabel("attentions skipped (dashed: the loss allowed; dotted: chosen)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
