"""`peft-eas score`."""

from __future__ import annotations

import argparse
import json

from ..search import score_attentions
from ..search.scores import METHODS
from .data import DATA_HELP, read_batches
from .shared import device, load_model, load_tokenizer, positive

HELP = "score the attentions of a model, the most redundant first"
EXAMPLES = """\
  peft-eas score HuggingFaceTB/SmolLM2-135M reviews.jsonl
  peft-eas score ./my-model reviews.jsonl --method loss --json > scores.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model")
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--method", choices=list(METHODS), default="growth", help="default: growth")
    parser.add_argument("--examples", type=positive, default=64, help="how many examples to look at (default: 64)")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: 8")
    parser.add_argument("--max-length", type=positive, default=512, help="longest example, in tokens (default: 512)")
    parser.add_argument("--json", action="store_true", help="print {layer: score} as JSON")


def run(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model)
    batches = read_batches(args.data, tokenizer, args.max_length, args.examples, args.batch_size)
    scores = score_attentions(load_model(args.model).to(device()), batches, method=args.method)
    ranked = sorted(scores, key=scores.__getitem__)
    if args.json:
        print(json.dumps({index: scores[index] for index in ranked}))
        return
    count = sum(len(batch["input_ids"]) for batch in batches)
    print(f"{'layer':>5}  {args.method}  ({count} examples; the most redundant first)")
    largest = max(max(scores.values()), 1e-12)
    for index in ranked:
        print(f"{index:>5}  {scores[index]:.5f}  {'#' * round(40 * max(0.0, scores[index]) / largest)}")
