"""What a search leaves behind: `report.json`, and a picture of it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

REPORT = "report.json"
PICTURE = "search.png"


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and, if matplotlib is installed, `search.png`; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{REPORT}.part"
    scratch.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, folder / REPORT)
    try:
        figure = plot_search(report)
    except ImportError:
        logger.info("There is no picture of the search, as matplotlib is not installed.")
        return
    figure.savefig(folder / PICTURE, dpi=150)


def plot_search(report: dict[str, Any] | str | os.PathLike, path: str | os.PathLike | None = None) -> Figure:
    """Draw a search: preferences by layer over the steps, with the chosen set marked, and the candidates' losses.

    Args:
        report: The content of `report.json`, the file, or the folder that it is in.
        path: Where to save the picture, if anywhere.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not isinstance(report, dict):
        file = Path(report)
        report = json.loads((file / REPORT if file.is_dir() else file).read_text(encoding="utf-8"))
    layers, rounds, chosen = report["layers"], report["rounds"], set(report["skip_layers"])
    start = report["initial_preferences"]
    times = [report["warmup"], *(entry["step"] for entry in rounds)]
    columns = [start, *(entry["preferences"] for entry in rounds)]
    edges = [*times, times[-1] + max(1, times[-1] - times[0]) / max(1, len(rounds))]
    height = max(3.5, 0.11 * len(layers) + 0.8)
    curve = report["budget"].get("losses")
    panels = 2 + bool(curve)
    figure = Figure(figsize=(9, height + 2 * (panels - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, height_ratios=[height, *[1.8] * (panels - 1)])

    heat = axes[0]
    rows = [[column[arm] for column in columns] for arm in range(len(layers))]
    # beyond 4, an attention is as good as always or never drawn
    largest = min(max((abs(value) for row in rows for value in row), default=0) or 1, 4)
    image = heat.pcolormesh(
        edges, range(len(layers) + 1), rows, cmap="Greys", vmin=-largest, vmax=largest, edgecolors="face", linewidth=0.1
    )
    figure.colorbar(image, ax=heat, label="preference for skipping", pad=0.01, extend="both")
    marked = [arm for arm, layer in enumerate(layers) if layer in chosen]
    for arm in marked:  # outlined, so that they are found without colour and at any size
        heat.plot([edges[0], edges[-1]], [arm, arm], color="tab:red", linewidth=0.7)
        heat.plot([edges[0], edges[-1]], [arm + 1, arm + 1], color="tab:red", linewidth=0.7)
    heat.plot(
        [1.012] * len(marked),
        [arm + 0.5 for arm in marked],
        marker="<",
        markersize=5,
        color="black",
        linestyle="none",
        clip_on=False,
        transform=heat.get_yaxis_transform(),
    )
    every = max(1, len(layers) // 40)
    heat.set_yticks([arm + 0.5 for arm in range(0, len(layers), every)], [str(i) for i in layers[::every]], fontsize=7)
    heat.set_ylim(0, len(layers))
    heat.set_xlim(edges[0], edges[-1])
    heat.set_ylabel("layer")
    state = "chosen" if report["is_settled"] else "best so far"
    heat.set_title(f"{len(chosen)} of {len(layers)} attentions skipped ({state}: arrows and outlines)", fontsize=10)
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))

    losses = axes[1]
    points = [(entry["step"], loss) for entry in rounds for loss in entry["losses"] if loss is not None]
    means = [
        (entry["step"], sum(kept) / len(kept))
        for entry in rounds
        if (kept := [loss for loss in entry["losses"] if loss is not None])
    ]
    if points:
        losses.plot(*zip(*points, strict=True), marker="o", markersize=3, color="0.55", linestyle="none")
        losses.plot(*zip(*means, strict=True), color="black", linewidth=1.2)
    losses.set_xlim(edges[0], edges[-1])
    losses.set_ylabel("candidates'\nheld-out loss")
    losses.set_xlabel("optimizer step")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))

    if curve:
        kept = [(k, loss) for k, loss in enumerate(curve) if loss is not None]
        axes[2].plot(*zip(*kept, strict=True), marker="o", markersize=3, color="black", linewidth=1)
        limit = curve[0] + report["budget"]["max_loss_increase"]
        axes[2].axhline(limit, color="0.4", linestyle="--", linewidth=1)
        axes[2].axvline(len(chosen), color="0.4", linestyle=":", linewidth=1)
        axes[2].set_ylabel("held-out loss")
        axes[2].set_xlabel("attentions skipped (dashed: the loss allowed; dotted: chosen)")
        axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
