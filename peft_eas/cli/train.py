"""`peft-eas train`."""

from __future__ import annotations

import argparse
import re
import typing
from dataclasses import fields
from typing import Any

from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments, set_seed

from ..card import TAGS
from ..config import EASConfig
from ..search import EASCallback
from ..search.callback import WARM_STARTS
from .data import DATA_HELP, read_examples
from .shared import UsageError, layer, load_model, load_tokenizer, num_skip, positive

HELP = "fine-tune a model with EAS: search, train, and save the adapter"
EXAMPLES = """\
  peft-eas train HuggingFaceTB/SmolLM2-135M reviews.jsonl --output-dir out --num-skip 8
  peft-eas train ./my-model reviews.jsonl --output-dir out --num-skip auto --max-loss-increase 0.02 \\
      --learning-rate 2e-3 --num-train-epochs 2 --per-device-train-batch-size 16 --report-to tensorboard
  peft-eas train ./my-model reviews.jsonl --output-dir out --skip-layers 6 7 8 12

All options of transformers.TrainingArguments are taken, too. Learning rate: 1e-3 unless given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model")
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--search-data", metavar="DATA", help="examples to score candidates with; not trained on")
    parser.add_argument("--eval-data", metavar="DATA", help="examples for the Trainer's evaluation")
    parser.add_argument("--search-steps", type=float, help="length of the search: optimizer steps, or a fraction")
    parser.add_argument("--warm-start", choices=WARM_STARTS, help="what the first set goes by")
    parser.add_argument("--max-length", type=positive, default=512, help="longest example, in tokens (default: 512)")
    group = parser.add_argument_group("peft_eas.EASConfig")
    types = typing.get_type_hints(EASConfig)
    for setting in _SETTINGS:
        said = setting.metadata["help"]
        if setting.default is not None:
            said += f" Default: {setting.default}."
        name = f"--{setting.name.replace('_', '-')}"
        group.add_argument(name, default=argparse.SUPPRESS, help=said, **_OPTIONS[types[setting.name]])


def run(args: argparse.Namespace) -> None:
    parser = HfArgumentParser((TrainingArguments,), prog="peft-eas train")
    parser.set_defaults(learning_rate=1e-3)
    try:
        (training,) = parser.parse_args_into_dataclasses(args.rest)
    except SystemExit as error:
        if error.code == 0:
            raise
        raise UsageError("see the options of transformers.TrainingArguments") from None
    given = {setting.name: getattr(args, setting.name) for setting in _SETTINGS if hasattr(args, setting.name)}
    config = EASConfig(**given, task_type="CAUSAL_LM")
    for_search = [name for name in ("search_data", "search_steps", "warm_start") if getattr(args, name) is not None]
    if config.skip_layers and for_search:
        raise UsageError(f"`--skip-layers` names the set, but `--{for_search[0].replace('_', '-')}` is for a search.")
    tokenizer = load_tokenizer(args.model)
    files = {name: getattr(args, name) for name in ("data", "search_data", "eval_data") if getattr(args, name)}
    data = {name: read_examples(file, tokenizer, args.max_length) for name, file in files.items()}
    search = {}
    if args.search_steps is not None:
        search["search_steps"] = args.search_steps
    if args.warm_start is not None:
        search["warm_start"] = args.warm_start
    set_seed(training.seed)
    base = load_model(args.model)
    base.add_model_tags(TAGS)  # PEFT writes them into the adapter's card
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        training,
        train_dataset=data["data"],
        eval_dataset=data.get("eval_data"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[EASCallback(data.get("search_data"), **search)],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:  # whose other kind of files has no adapter in it
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training.output_dir}: adapter that skips the attentions of layers {model.skip_layers}")
        print(f"Merge it with: peft-eas merge {training.output_dir} {training.output_dir}-merged")


class _Modules(argparse.Action):
    """Names of modules, or one regular expression."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        is_pattern = len(values) == 1 and not re.fullmatch(r"[\w.-]+", values[0])
        setattr(namespace, self.dest, values[0] if is_pattern else values)


_SETTINGS = [setting for setting in fields(EASConfig) if setting.name in EASConfig.__annotations__]
"""The fields that are EAS's own, and not PEFT's."""

_OPTIONS: dict[Any, dict[str, Any]] = {
    int: {"type": int},
    float: {"type": float},
    str: {},
    bool: {"action": argparse.BooleanOptionalAction},
    float | None: {"type": float},
    int | float | str | None: {"type": num_skip},
    list[str] | None: {"nargs": "+", "metavar": "MODULE"},
    list[int] | int | None: {"nargs": "+", "metavar": "LAYER", "type": int},
    list[int | str] | None: {"nargs": "+", "metavar": "LAYER", "type": layer},
    list[str] | str | None: {"nargs": "+", "metavar": "MODULE", "action": _Modules},
}
"""How a field of a type is given as an option."""
