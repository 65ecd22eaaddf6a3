"""`peft-eas skip`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..folders import new_folder
from ..runtime.eas_record import Record
from ..search import skip_attentions
from .data import DATA_HELP, read_batches
from .shared import device, layer, load_model, load_tokenizer, num_skip, positive, save_tokenizer, summary

HELP = "take attentions out of a model before it is trained, and save what is left, for LoRA or any other training"
EXAMPLES = """\
  peft-eas skip HuggingFaceTB/SmolLM2-135M reviews.jsonl smaller --num-skip 8
  peft-eas skip ./my-model reviews.jsonl smaller --skip-layers 6 7 8 12 --stand-in mean"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model")
    parser.add_argument("data", metavar="DATA", help=f"{DATA_HELP}; of the task, several thousand tokens")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for what is left; must be new or empty")
    parser.add_argument(
        "--num-skip", type=num_skip, help="how many, a count or a fraction: those of the lowest scores (default: 0.25)"
    )
    parser.add_argument("--skip-layers", nargs="+", type=layer, metavar="LAYER", help="which, instead")
    parser.add_argument(
        "--stand-in",
        choices=["linear", "mean", "zero"],
        default="linear",
        help="what they leave (default: linear)",
    )
    parser.add_argument("--r-pia", type=positive, default=32, help="rank of linear stand-ins (default: 32)")
    parser.add_argument("--examples", type=positive, default=256, help="how many examples to look at (default: 256)")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: 8")
    parser.add_argument("--max-length", type=positive, default=512, help="longest example, in tokens (default: 512)")


def run(args: argparse.Namespace) -> None:
    with new_folder(args.out) as folder:
        tokenizer = load_tokenizer(args.model)
        batches = read_batches(args.data, tokenizer, args.max_length, args.examples, args.batch_size)
        model = skip_attentions(
            load_model(args.model).to(device()),
            batches,
            num_skip=args.num_skip,
            skip_layers=args.skip_layers,
            stand_in=args.stand_in,
            r_pia=args.r_pia,
        )
        model.save_pretrained(folder)
        save_tokenizer([args.model], folder)
    eas = getattr(model.config, "eas", None)
    print(summary(args.out, model, Record.read(eas).skipped if eas else []))
