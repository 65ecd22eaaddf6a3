"""How the time of each step from a base model to a merged one grows with the number of layers and with the width.

    python benchmarks/growth.py            # 8 to 128 layers of width 256; widths 256 to 4096 with 4 layers
    python benchmarks/growth.py --quick    # the small ones, to see that it runs

The models are Llamas in shape, with random weights in float32, and a quarter of the attentions is skipped. Times
are the process's own, with one thread; each is the least of several runs. In brackets is by which power of its size a
time grows from one row to the next. Linear in the weights is 1 for layers, and 2 for widths, since weights have their
square. The table goes to `benchmarks/results/growth.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, table
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_eas import EASConfig, initialize_eas_weights, score_attentions

STEPS = (
    "inject",
    "stand-ins",
    "score, one pass",
    "score, grown",
    "merge",
    "save",
    "load",
    "save adapter",
    "load adapter",
)
LAYERS, WIDTHS = (8, 16, 32, 64, 128), (256, 512, 1024, 2048, 4096)
FEW_LAYERS, SMALL_WIDTH = 4, 256
MOST_LAYERS, LARGEST_WIDTH = 32, 1024
"""Up to which sets are grown."""
TOKENS = 128
EXPLAINED = (
    "Growing a set, the default score, takes a forward for each attention at least, so it has the square of the "
    "layers. Stand-ins take a factor of a matrix of the width, so they have its third power. "
    "Loading maps files, and reads weights when they are used."
)


def make(layers: int, width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=width**-0.5)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are made when it is
    return model.eval()


def measure_all(layers: int, width: int, repeats: int) -> dict[str, float]:
    """Seconds of each step: of several runs the least."""
    runs = [measure_once(layers, width) for _ in range(repeats)]
    return {step: min(run[step] for run in runs) for step in STEPS}


def measure_once(layers: int, width: int) -> dict[str, float]:
    base, seconds = make(layers, width), {}
    ids = torch.randint(256, (1, TOKENS))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    config = EASConfig(skip_layers=list(range(1, layers, 4)), task_type="CAUSAL_LM")

    def timed(step: str, work: Callable):
        start = time.process_time()
        result = work()
        seconds[step] = time.process_time() - start
        return result

    timed("score, one pass", lambda: score_attentions(base, batches, method="similarity"))
    seconds["score, grown"] = math.nan
    if layers <= MOST_LAYERS and width <= LARGEST_WIDTH:
        timed("score, grown", lambda: score_attentions(base, batches))
    adapted = timed("inject", lambda: get_peft_model(base, config))
    timed("stand-ins", lambda: initialize_eas_weights(adapted, batches))
    with tempfile.TemporaryDirectory() as scratch:
        timed("save adapter", lambda: adapted.save_pretrained(f"{scratch}/adapter"))
        base = adapted.unload()
        again = timed("load adapter", lambda: PeftModel.from_pretrained(base, f"{scratch}/adapter"))
        merged = timed("merge", lambda: again.merge_and_unload(safe_merge=True))
        timed("save", lambda: merged.save_pretrained(f"{scratch}/merged"))
        timed("load", lambda: AutoModelForCausalLM.from_pretrained(f"{scratch}/merged"))
    return seconds


def with_powers(rows: list[dict], size: str) -> list[dict]:
    """The rows, each step's time with the power of the size by which it grew since the row before."""
    shown = []
    for before, row in zip([None, *rows], rows, strict=False):
        cells = {"layers": row["layers"], "width": row["width"]}
        for step in STEPS:
            power = ""
            if before is not None:
                grew = math.log(row[step] / before[step]) / math.log(row[size] / before[size])
                power = f" ({grew:.1f})"
            cells[step] = "-" if math.isnan(row[step]) else f"{row[step]:.3g}{power}"
        shown.append(cells)
    return shown


def draw(parts: dict[str, list[dict]], file: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(parts), figsize=(11, 5), sharey=True, layout="constrained")
    for ax, (size, rows), linear in zip(axes, parts.items(), (1, 2), strict=True):
        sizes = [row[size] for row in rows]
        for number, step in enumerate(STEPS):
            ax.loglog(sizes, [row[step] for row in rows], "o-", color=f"C{number}", ms=4, label=step)
        start = min(rows[0][step] for step in STEPS)
        ax.loglog(sizes, [start * (s / sizes[0]) ** linear for s in sizes], "k:", label="linear in the weights")
        ax.set_xticks(sizes, map(str, sizes))
        ax.minorticks_off()
        other = "width" if size == "layers" else "layers"
        ax.set_xlabel(f"{size} ({other}: {rows[0][other]})")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of CPU time, one thread")
    axes[1].legend(fontsize=8)
    fig.savefig(file, dpi=130)
    plt.close(fig)


def markdown(parts: dict[str, list[dict]]) -> str:
    tables = [table(["layers", "width", *STEPS], with_powers(rows, size)) for size, rows in parts.items()]
    about = "; ".join(f"{key}: {value}" for key, value in machine().items())
    note = (
        "Seconds of CPU time with one thread, and in brackets the power of the layers, or of the width, by which they "
        "grew since the row before: linear in the weights is 1 for layers, and 2 for widths. A quarter of the "
        f"attentions is skipped; one batch of {TOKENS} tokens; Llamas with random weights in float32. {EXPLAINED}"
    )
    said = f"- {time.strftime('%Y-%m-%d')}, `{command()}`\n- {about}\n"
    return "\n\n".join(["# Growth", *tables, note, said])


def command() -> str:
    return shlex.join(["python", "benchmarks/growth.py", *sys.argv[1:]])


def write(parts: dict[str, list[dict]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.md").write_text(markdown(parts))
    result = {"parts": parts, "command": command(), "machine": machine()}
    (folder / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
    if all(parts.values()):
        draw(parts, folder / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--repeats", type=int, default=2, help="of which the fastest counts; widths of 2048 and more: 1"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; --quick: none)")
    args = parser.parse_args()
    out = args.out or (None if args.quick else Path(__file__).parent / "results")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure_all(2, 64, 1)  # the first of everything takes longer
    many, wide = (LAYERS[:2], WIDTHS[:2]) if args.quick else (LAYERS, WIDTHS)
    parts: dict[str, list[dict]] = {"layers": [], "width": []}
    for size, layers, width in (*(("layers", n, SMALL_WIDTH) for n in many), *(("width", FEW_LAYERS, w) for w in wide)):
        seconds = measure_all(layers, width, 1 if width >= 2048 else args.repeats)
        parts[size].append({"layers": layers, "width": width, **seconds})
        print(parts[size][-1], flush=True)
        if out is not None:
            write(parts, out)
    print(markdown(parts))


if __name__ == "__main__":
    main()
