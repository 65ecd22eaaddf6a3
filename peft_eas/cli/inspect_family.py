"""`peft-eas inspect-family`."""

from __future__ import annotations

import argparse

from transformers import AutoConfig

from ..families import FAMILIES
from ..trace import TraceError, as_source, check_family, few_layers, propose_family
from .shared import UsageError, positive, reading

HELP = "propose a row for a model family that is not known yet, and try it"
EXAMPLES = "  peft-eas inspect-family openai-community/gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model, for its config")
    parser.add_argument("--layers", type=positive, default=4, help="how many layers to build (default: 4)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with the model")


def run(args: argparse.Namespace) -> None:
    trust = {"trust_remote_code": args.trust_remote_code}
    with reading(args.model):
        config = AutoConfig.from_pretrained(args.model, **trust)
    by_hand = "Look at the model's code, and write the row by hand: docs/usage.md says how."
    try:
        with reading(args.model):
            model = few_layers(config, args.layers, **trust)
        row = propose_family(model)
    except TraceError as reason:
        raise UsageError(f"{reason} {by_hand}") from None
    print(as_source(row))
    try:
        error = check_family(model, row)
    except Exception as reason:  # whatever happens in a layer that is built in another way
        raise UsageError(
            f"With this row the model fails ({reason}): a layer is built in another way. {by_hand}"
        ) from None
    if row.model_type in FAMILIES:
        print(f"There is a row already: {as_source(FAMILIES[row.model_type])}")
    if error < 1e-4:
        print(f"Merging with this row is exact ({error:.0e}). Look at it, then: peft_eas.register_family(...)")
    else:
        print(f"Merging with this row is not exact ({error:.0e}): something else reads the attention's or FFN's input.")
