"""`peft-eas merge`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from ..card import read_card, write_card
from ..checkpoint import CheckpointPlan, plan_checkpoint
from ..config import EASConfig
from ..folders import new_folder
from .data import read_batches
from .shared import (
    UsageError,
    adapter_config,
    device,
    load_model,
    reading,
    save_tokenizer,
    summary,
    tokenizers,
    with_padding,
)

HELP = "fold an adapter into its base model, a tensor at a time, and save the merged model and its tokenizer"
EXAMPLES = """\
  peft-eas merge out merged
  peft-eas merge out merged --base ./my-model --dtype bfloat16
  peft-eas merge out merged --dry-run
  peft-eas merge out merged --freeze-context reviews.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of a trained adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the merged model; must be new or empty")
    parser.add_argument("--base", metavar="MODEL", help="the base model, if not where the adapter says it is")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the base model")
    parser.add_argument(
        "--freeze-context",
        metavar="DATA",
        help="with `--propagation mean`: replace what skipped attentions say of other tokens by its mean over this "
        "data: gives plain weights, which other engines run; loads the whole model",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print which files there will be, how big, and the memory that it takes"
    )


def run(args: argparse.Namespace) -> None:
    config = adapter_config(args.adapter)
    base = args.base or config.base_model_name_or_path
    if not base:
        raise UsageError(f"{args.adapter} does not say what its base model is: give --base.")
    if args.freeze_context:
        merged, skipped = _merge_frozen(args, config, base)
    else:
        with reading(f"{base} or {args.adapter}"):
            plan = plan_checkpoint(base, args.adapter, dtype=args.dtype)
        if args.dry_run:
            print(_told(plan))
            return
        plan.write(args.out, lambda folder: _add_to(folder, plan.model, (args.adapter, base)))
        merged, skipped = plan.model, plan.skipped
    print(summary(args.out, merged, skipped))


def _told(plan: CheckpointPlan) -> str:
    """A plan as lines of text."""
    lines = [f"{shard.size:>17,} {shard.name}" for shard in plan.shards]
    lines.append(f"{plan.size:>17,} bytes of weights in all, a {type(plan.model).__name__}")
    lines.append(f"{plan.peak:>17,} bytes in memory at most, and what Python and its libraries take")
    if not plan.sources:
        lines.append(
            f"There are no weights in {plan.model.name_or_path}: these are the shapes that its config.json gives."
        )
    return "\n".join(lines)


def _merge_frozen(args: argparse.Namespace, config: EASConfig, base: str) -> tuple[PreTrainedModel, list[int | str]]:
    """Merge with the model in memory, which has to run for that."""
    if args.dry_run:
        raise UsageError("--freeze-context runs the model as a whole, so there is nothing for --dry-run to plan.")
    with new_folder(args.out) as folder:
        base_model = load_model(base, args.dtype, config)
        with reading(args.adapter):
            model = PeftModel.from_pretrained(base_model, args.adapter, config=config)
        skipped = model.skip_layers
        _freeze_context(model, args.freeze_context, (args.adapter, base))
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder)
        _add_to(folder, merged, (args.adapter, base))
    return merged, skipped


def _add_to(folder: Path, merged: PreTrainedModel, sources: Sequence[str]) -> None:
    """What there is beside a model: its tokenizer, and a card that knows what the adapter's says."""
    save_tokenizer(sources, folder)
    if hasattr(merged.config, "eas"):
        about = read_card(sources[0])
        write_card(merged, folder, **{key: about.get(key) for key in ("datasets", "language", "eval_results")})


def _freeze_context(model: PeftModel, data: str, sources: Sequence[str]) -> None:
    tokenizer = next(tokenizers(sources), None)
    if tokenizer is None:
        raise UsageError(f"--freeze-context needs a tokenizer, and there is none beside {' or '.join(sources)}.")
    tokenizer = with_padding(tokenizer, sources[-1])
    model.to(device()).freeze_context(read_batches(data, tokenizer, max_length=512, count=256, batch_size=8))
