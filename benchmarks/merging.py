"""What merging a large model takes, from files to files and in memory: time, and the most memory that the process had.

    python benchmarks/merging.py                   # 8 GB of made weights; 25 GB of disk and 16 GB of memory
    python benchmarks/merging.py --layers 2        # 1.4 GB
    python benchmarks/merging.py --layers 80 --hidden 8192 --ways files

The weights are Llama's in shape, in bfloat16 and in files of 2 GB. Each way runs in a process of its own, and all have
to write the same bytes. The table goes to `benchmarks/results/merging.md`. On Linux.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, table
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_eas import EASConfig, merge_checkpoint

WAYS = {"files": "`merge_checkpoint`", "memory": "`merge_and_unload().save_pretrained()`"}
SHARD = 2 * 10**9
RESULT = Path(__file__).parent / "results" / "merging.md"


def make(folder: Path, layers: int, hidden: int) -> None:
    """A base model and an adapter that skips every fourth attention, a file at a time."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: list[list[str]] = [[]]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in shapes:
        if sum(2 * shapes[other].numel() for other in (*files[-1], name)) > SHARD:
            files.append([])
        files[-1].append(name)
    where = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        weights = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(weights, folder / "base" / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    adapted = get_peft_model(base, EASConfig(skip_layers=list(range(1, layers, 4)), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "eas_" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(folder / "adapter")


def merge(folder: Path, way: str) -> None:
    """Merge in this process, and say what it took."""
    start = time.perf_counter()
    base, adapter, out = folder / "base", folder / "adapter", folder / way
    if way == "files":
        merge_checkpoint(base, adapter, out)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
        model.merge_and_unload(safe_merge=True).save_pretrained(out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    status = Path("/proc/self/status").read_text()  # `getrusage` knows the process that this one came from, too
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
    print(f"{size / 1e9:.2f} {time.perf_counter() - start:.0f} {peak / 1e9:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        merge(Path(args.one[0]), args.one[1])
        return
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        make(folder, args.layers, args.hidden)
        for way in args.ways:
            command = [sys.executable, __file__, "--one", scratch, way]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            rows.append(
                dict(zip(("way", "GB written", "seconds", "GB of memory"), (WAYS[way], *told.split()), strict=True))
            )
            print(rows[-1])
        names = sorted(file.name for file in (folder / args.ways[0]).iterdir())
        for way in args.ways[1:]:
            _, wrong, missing = filecmp.cmpfiles(folder / args.ways[0], folder / way, names, shallow=False)
            assert not wrong + missing, f"{wrong + missing} differ"
    made = f"A made Llama of {args.layers} layers of width {args.hidden}, every fourth attention skipped, in bfloat16."
    said = f"- {time.strftime('%Y-%m-%d')}, `{' '.join(['python benchmarks/merging.py', *sys.argv[1:]])}`"
    where = "- " + "; ".join(f"{key}: {value}" for key, value in machine().items())
    text = ["# Merging", table(list(rows[0]), rows), made, f"{said}\n{where}"]
    RESULT.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
