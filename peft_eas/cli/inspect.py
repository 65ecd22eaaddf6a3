"""`peft-eas inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..card import layer_picture
from ..checks import one_line
from ..runtime.eas_files import verify
from ..runtime.eas_record import Record
from ..search.report import REPORT, read_report
from .shared import UsageError, adapter_config, reading, say

HELP = "say what an adapter or a merged model skips, and how large it is"
EXAMPLES = """\
  peft-eas inspect out
  peft-eas inspect merged --json
  peft-eas inspect merged --verify"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of an adapter, a checkpoint or a merged model")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--verify", action="store_true", help="compare a merged model's weights with the checksums saved with them"
    )


def run(args: argparse.Namespace) -> None:
    if not args.dir.is_dir():
        raise UsageError(f"There is no folder {args.dir}.")
    with reading(args.dir):
        if (args.dir / "adapter_config.json").exists():
            about = _about_adapter(args.dir)
        elif (args.dir / "config.json").exists():
            about = _about_merged(args.dir)
        else:
            raise UsageError(f"{args.dir} holds no adapter (adapter_config.json) and no model (config.json).")
    if args.verify:
        if "base_model" in about:
            raise UsageError(
                f"{args.dir} is an adapter: checksums are saved with merged models, and adapters have none."
            )
        about["verified"] = ", ".join(verify(args.dir))
    if args.json:
        print(json.dumps(about))
        return
    skip, present = set(about["skip_layers"]), about["attentions"]
    for key, value in about.items():
        if key not in ("skip_layers", "attentions"):
            print(f"{key.replace('_', ' '):12} {one_line(value)}")
    print(f"{'skips':12} {len(skip)} of {len(present)} attentions: {about['skip_layers']}")
    if all(isinstance(key, int) for key in present):
        for line in layer_picture(skip, present):
            print(f"{'layers':12} {line}   # kept  . skipped{'  - no attention' * ('-' in line)}")


def _about_adapter(folder: Path) -> dict[str, Any]:
    config = adapter_config(str(folder))
    sizes, gates = _tensors(folder)
    indices = sorted(map(_layer_of, gates))
    by_name = len(set(indices)) < len(indices)
    skip = [name.removesuffix(".eas_skip") if by_name else _layer_of(name) for name, gate in gates.items() if gate]
    about = {
        "kind": "adapter" if config.skip_layers is not None else "adapter, set not chosen yet (the best so far)",
        "base_model": config.base_model_name_or_path,
        "skip_layers": sorted(skip) if config.skip_layers is None else config.skip_layers,
        "attentions": [name.removesuffix(".eas_skip") for name in gates] if by_name else indices,
        "parameters": sum(sizes.values()),
        "settings": " ".join(
            f"{name}={getattr(config, name)}" for name in ("r", "r_pia", "stand_in", "propagation", "router")
        ),
    }
    if (folder / REPORT).exists():
        try:
            report = read_report(folder)
        except (OSError, ValueError) as error:  # what is inspected is the adapter
            say(f"The search is left out: {error}", file=sys.stderr)
            return about
        if report["skip_layers"] == about["skip_layers"]:  # and not of an earlier training into this folder
            about["search"] = (
                f"{len(report['rounds'])} rounds from step {report['warmup']} to {report['settle']}, "
                f"{report['ignored']} candidates ignored; see {REPORT} and search.png"
            )
    return about


def _about_merged(folder: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder)
    eas = getattr(config, "eas", None)
    if eas is None:
        raise UsageError(f"{folder} is a {config.model_type} model that was not merged by peft_eas.")
    sizes, _ = _tensors(folder)
    record = Record.read(eas)
    skip, first = record.skipped, record.attentions[0]
    quantised = getattr(config, "quantization_config", None)
    about = {
        "kind": f"merged model ({config.model_type}, over {record.model_type})",
        "skip_layers": skip,
        "attentions": record.present,
        "parameters": f"quantised by {quantised['quant_method']}" if quantised else sum(sizes.values()),
        "biases": f"{sum(len(kind.biased) for kind in record.attentions)} linears have got a bias",
        "stand_ins": _about_stand_ins(record),
        "propagation": _about_propagation(record.ranks),
    }
    if not record.by_name and first.causal:
        text, total = config.get_text_config(decoder=True), len(first.present)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        kept = (total - len(skip)) * values + sum(record.ranks)
        about["kv_cache"] = f"{kept} values a token, instead of {total * values}"
    return about


def _about_stand_ins(record: Record) -> str:
    left = [each for kind in record.attentions for each in kind.stand_ins]
    maps = [each.rank for each in left if each.rank]
    if maps:
        return f"{len(maps)} skipped attentions leave a linear map of rank {max(maps)}"
    return f"{sum(each.constant for each in left)} skipped attentions leave a constant"


def _about_propagation(ranks: list[int]) -> str:
    if not ranks:
        return "skipped attentions say nothing of other tokens"
    return f"{len(ranks)} skipped attentions leave a mean of rank {ranks[0]} over other tokens"


def _tensors(folder: Path) -> tuple[dict[str, int], dict[str, bool]]:
    """Sizes of the parameters, and the gates, in the safetensors files of a folder."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no .safetensors file.")
    sizes, gates = {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name.endswith("eas_skip"):
                        gates[name] = bool(tensors.get_tensor(name))
                    else:
                        shape = tensors.get_slice(name).get_shape()
                        sizes[name] = torch.Size(shape).numel()
        except SafetensorError as error:
            raise UsageError(f"{file} is damaged: {error}") from None
    return sizes, gates


def _layer_of(name: str) -> int:
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())
