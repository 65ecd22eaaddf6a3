"""The command line: `peft-eas score`, `skip`, `train`, `merge`, `export`, `inspect` and `inspect-family`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import export, inspect, inspect_family, merge, score, skip, train
from .shared import UsageError, say

COMMANDS = {
    "score": score,
    "skip": skip,
    "train": train,
    "merge": merge,
    "export": export,
    "inspect": inspect,
    "inspect-family": inspect_family,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it worked, 1 if not (the reason is on standard error), 2 for wrong arguments.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        COMMANDS[args.command].run(args)
    except (UsageError, ValueError, OSError) as error:
        say(f"peft-eas {args.command}: error: {error}", file=sys.stderr)
        if os.environ.get("PEFT_EAS_TRACEBACK"):
            raise
        return 1
    except KeyboardInterrupt:
        print(f"peft-eas {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-eas",
        description="Effective Attention Skipping: find attentions that a task does not need, train without, merge.",
        allow_abbrev=False,
        epilog="Set PEFT_EAS_TRACEBACK=1 to see where an error comes from.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `train` hands what it does not know to TrainingArguments
        )
        command.add_arguments(added)
    return parser
