"""The command line: `peft-eas score`, `train`, `merge`, `export`, `inspect` and `inspect-family`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import transformers
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto import modeling_auto

from .card import TAGS, layer_picture, read_card, write_card
from .checks import one_line, shown
from .config import EASConfig, EASType
from .export import FORMATS, export
from .families import FAMILIES
from .folders import new_folder
from .runtime.eas_files import verify
from .runtime.eas_record import Record
from .search import EASCallback, score_attentions
from .search.callback import WARM_STARTS
from .search.report import REPORT, read_report
from .search.scores import METHODS
from .trace import TraceError, as_source, check_family, propose_family

if TYPE_CHECKING:
    from datasets import Dataset

DATA_HELP = (
    "data: a .jsonl, .json, .csv or .parquet file, a folder, or a dataset of the hub, with the columns `prompt` and "
    "`completion`, or `text`"
)


class UsageError(Exception):
    """Something that the user can put right; shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it worked, 1 if not (the reason is on standard error), 2 for wrong arguments.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.run is _train:
        args.training = rest
    try:
        args.run(args)
    except (UsageError, ValueError, OSError) as error:
        _say(f"peft-eas {args.command}: error: {error}", file=sys.stderr)
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

    def add(name: str, run: Callable, help: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `train` hands what it does not know to TrainingArguments
        )
        command.set_defaults(run=run)
        return command

    score = add(
        "score", _score, "score the attentions of a model, the most redundant first",
        "  peft-eas score HuggingFaceTB/SmolLM2-135M reviews.jsonl\n"
        "  peft-eas score ./my-model reviews.jsonl --method loss --json > scores.json",
    )  # fmt: skip
    score.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model")
    score.add_argument("data", metavar="DATA", help=DATA_HELP)
    score.add_argument("--method", choices=list(METHODS), default="kl", help="default: kl")
    score.add_argument("--examples", type=_positive, default=64, help="how many examples to look at (default: 64)")
    score.add_argument("--batch-size", type=_positive, default=8, help="default: 8")
    score.add_argument("--max-length", type=_positive, default=512, help="longest example, in tokens (default: 512)")
    score.add_argument("--json", action="store_true", help="print {layer: score} as JSON")

    train = add(
        "train", _train, "fine-tune a model with EAS: search, train, and save the adapter",
        "  peft-eas train HuggingFaceTB/SmolLM2-135M reviews.jsonl --output_dir out --num-skip 8\n"
        "  peft-eas train ./my-model reviews.jsonl --output_dir out --num-skip auto --max-loss-increase 0.02 \\\n"
        "      --learning_rate 5e-4 --num_train_epochs 2 --per_device_train_batch_size 16 --report_to tensorboard\n"
        "  peft-eas train ./my-model reviews.jsonl --output_dir out --skip-layers 6 7 8 12\n\n"
        "All options of transformers.TrainingArguments are taken, too. Learning rate: 1e-3 unless given.",
    )  # fmt: skip
    train.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model")
    train.add_argument("data", metavar="DATA", help=DATA_HELP)
    train.add_argument("--search-data", metavar="DATA", help="examples to score candidates with; not trained on")
    train.add_argument("--eval-data", metavar="DATA", help="examples for the Trainer's evaluation")
    train.add_argument("--num-skip", type=_num_skip, help="a count, a fraction, or auto (default: a quarter)")
    train.add_argument("--max-loss-increase", type=float, help="with --num-skip auto: what skipping may cost")
    train.add_argument("--target-speedup", type=float, help="instead of --num-skip: speed of a forward, such as 1.1")
    train.add_argument(
        "--skip-layers", type=_layer, nargs="+", metavar="LAYER", help="skip just these, by index or name; no search"
    )
    train.add_argument(
        "--r", type=_positive, default=16, help="rank of the adapters in front of attentions (default: 16)"
    )
    train.add_argument("--r-pia", type=_positive, default=32, help="rank of those in front of FFNs (default: 32)")
    train.add_argument("--propagation", choices=["none", "mean"], default="none", help="default: none")
    train.add_argument("--router", choices=["none", "static"], default="none", help="default: none")
    train.add_argument("--stand-in", choices=["mean", "zero"], default="mean", help="default: mean")
    train.add_argument("--search-steps", type=float, help="length of the search: optimizer steps, or a fraction")
    train.add_argument("--warm-start", choices=[*WARM_STARTS, "none"], help="what the first set goes by")
    train.add_argument("--max-length", type=_positive, default=512, help="longest example, in tokens (default: 512)")

    merge = add(
        "merge", _merge, "fold an adapter into its base model, and save the merged model and its tokenizer",
        "  peft-eas merge out merged\n  peft-eas merge out merged --base ./my-model --dtype bfloat16\n"
        "  peft-eas merge out merged --freeze-context reviews.jsonl",
    )  # fmt: skip
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of a trained adapter")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder for the merged model; must be new or empty")
    merge.add_argument("--base", metavar="MODEL", help="the base model, if not where the adapter says it is")
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the base model")
    merge.add_argument(
        "--freeze-context", metavar="DATA",
        help="with `--propagation mean`: replace what skipped attentions say of other tokens by its mean over this "
        "data: gives plain weights, which other engines run",
    )  # fmt: skip

    family = add(
        "inspect-family", _inspect_family, "propose a row for a model family that is not known yet, and try it",
        "  peft-eas inspect-family openai-community/gpt2",
    )  # fmt: skip
    family.add_argument("model", metavar="MODEL", help="hub name or folder of a causal language model, for its config")
    family.add_argument("--layers", type=_positive, default=4, help="how many layers to build (default: 4)")
    family.add_argument("--trust-remote-code", action="store_true", help="run modelling code that comes with the model")

    exporting = add(
        "export", _export, "write a merged model for vLLM, SGLang and TensorRT-LLM, for llama.cpp, or as ONNX",
        "  peft-eas export merged merged-vllm --format nemotron-nas\n"
        "  peft-eas export merged merged-gguf --format gguf --dtype q8_0\n"
        "  peft-eas export merged merged-onnx --format onnx",
    )  # fmt: skip
    exporting.add_argument("dir", metavar="DIR", help="folder or hub name of a merged model")
    exporting.add_argument("out", metavar="OUT", type=Path, help="folder for what is written; must be new or empty")
    exporting.add_argument("--format", choices=list(FORMATS), required=True)
    exporting.add_argument("--dtype", help="float32, bfloat16, float16, or for gguf q8_0 (default: that of the model)")
    exporting.add_argument("--pre-tokenizer", metavar="NAME", help="for gguf: llama.cpp's name, if it isn't recognised")

    inspect = add(
        "inspect", _inspect, "say what an adapter or a merged model skips, and how large it is",
        "  peft-eas inspect out\n  peft-eas inspect merged --json\n  peft-eas inspect merged --verify",
    )  # fmt: skip
    inspect.add_argument("dir", metavar="DIR", type=Path, help="folder of an adapter, a checkpoint or a merged model")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.add_argument(
        "--verify", action="store_true", help="compare a merged model's weights with the checksums saved with them"
    )
    return parser


def _say(text: str, file: TextIO) -> None:
    """Print lines that may have something of a file in them, which is not to reach the terminal as a command."""
    print("\n".join(map(one_line, text.split("\n"))), file=file)


@contextlib.contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """Whatever libraries run into while they read files that hold something else than they should."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} holds a file that is no JSON: {error}.") from error
    except (UsageError, OSError, ValueError):  # which say what is wrong
        raise
    except Exception as error:
        raise UsageError(f"{name} can't be read ({type(error).__name__}: {error}): is a file damaged?") from error


# ----------------------------------------------------------------------------------------------------------------------
# The commands
# ----------------------------------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace) -> None:
    tokenizer = _load_tokenizer(args.model)
    examples = _examples(args.data, tokenizer, args.max_length, args.examples)
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = (collate(examples[i : i + args.batch_size]) for i in range(0, len(examples), args.batch_size))
    scores = score_attentions(_load_model(args.model).to(_device()), batches, method=args.method)
    ranked = sorted(scores, key=scores.__getitem__)
    if args.json:
        print(json.dumps({index: scores[index] for index in ranked}))
        return
    print(f"{'layer':>5}  {args.method}  ({len(examples)} examples; the most redundant first)")
    largest = max(max(scores.values()), 1e-12)
    for index in ranked:
        print(f"{index:>5}  {scores[index]:.5f}  {'#' * round(40 * max(0.0, scores[index]) / largest)}")


def _train(args: argparse.Namespace) -> None:
    settings = list(args.training)
    if not any(given.split("=")[0] == "--learning_rate" for given in settings):
        settings += ["--learning_rate", "1e-3"]
    try:
        (training,) = HfArgumentParser((TrainingArguments,), prog="peft-eas train").parse_args_into_dataclasses(
            settings
        )
    except SystemExit as error:
        if error.code == 0:
            raise
        raise UsageError("see the options of transformers.TrainingArguments") from None
    config = EASConfig(
        num_skip=args.num_skip,
        max_loss_increase=args.max_loss_increase,
        target_speedup=args.target_speedup,
        skip_layers=args.skip_layers,
        r=args.r,
        r_pia=args.r_pia,
        propagation=args.propagation,
        router=args.router,
        stand_in=args.stand_in,
        task_type="CAUSAL_LM",
    )
    for_search = [name for name in ("search_data", "search_steps", "warm_start") if getattr(args, name) is not None]
    if args.skip_layers and for_search:
        raise UsageError(f"`--skip-layers` names the set, but `--{for_search[0].replace('_', '-')}` is for a search.")
    tokenizer = _load_tokenizer(args.model)
    given = {name: getattr(args, name) for name in ("data", "search_data", "eval_data") if getattr(args, name)}
    data = {name: _examples(value, tokenizer, args.max_length) for name, value in given.items()}
    search = {}
    if args.search_steps is not None:
        search["search_steps"] = args.search_steps
    if args.warm_start is not None:
        search["warm_start"] = None if args.warm_start == "none" else args.warm_start
    set_seed(training.seed)
    base = _load_model(args.model)
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
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training.output_dir}: adapter that skips the attentions of layers {model.skip_layers}")
        print(f"Merge it with: peft-eas merge {training.output_dir} {training.output_dir}-merged")


def _merge(args: argparse.Namespace) -> None:
    with new_folder(args.out) as folder:
        config = _adapter_config(args.adapter)
        base = args.base or config.base_model_name_or_path
        if not base:
            raise UsageError(f"{args.adapter} does not say what its base model is: give --base.")
        base_model = _load_model(base, args.dtype, config)
        with _reading(args.adapter):
            model = PeftModel.from_pretrained(base_model, args.adapter, config=config)
        skipped = model.skip_layers
        if args.freeze_context:
            _freeze_context(model, args.freeze_context, (args.adapter, base))
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder)
        _save_tokenizer((args.adapter, base), folder)
        if hasattr(merged.config, "eas"):
            about = read_card(args.adapter)
            write_card(merged, folder, **{key: about.get(key) for key in ("datasets", "language", "eval_results")})
    size = sum(parameter.numel() for parameter in merged.parameters())
    print(f"{args.out}: {type(merged).__name__}, {size / 1e6:.1f} M parameters, without the attentions of {skipped}")


def _freeze_context(model: PeftModel, data: str, sources: Sequence[str]) -> None:
    tokenizer = next(_tokenizers(sources), None)
    if tokenizer is None:
        raise UsageError(f"--freeze-context needs a tokenizer, and there is none beside {' or '.join(sources)}.")
    examples = _examples(data, tokenizer, max_length=512, count=256)
    collate = DataCollatorForSeq2Seq(_with_padding(tokenizer, sources[-1]))
    model.to(_device()).freeze_context([collate(examples[i : i + 8]) for i in range(0, len(examples), 8)])


def _save_tokenizer(sources: Sequence[str], folder: Path) -> None:
    """Save the tokenizer of the first source that has one; or the processor, which has a tokenizer and more."""
    found = next(_processors(sources), None) or next(_tokenizers(sources), None)
    if found is None:
        _say(f"There is no tokenizer beside {' or '.join(sources)}; none was saved.", file=sys.stderr)
    else:
        found.save_pretrained(folder)


def _processors(sources: Sequence[str]) -> Iterator[ProcessorMixin]:
    for source in sources:
        with contextlib.suppress(OSError, ValueError), _reading(source):
            found = AutoProcessor.from_pretrained(source)
            if isinstance(found, ProcessorMixin):  # of a language model it is the tokenizer
                yield found


def _tokenizers(sources: Sequence[str]) -> Iterator[PreTrainedTokenizerBase]:
    for source in sources:
        with contextlib.suppress(OSError, ValueError), _reading(source):
            yield AutoTokenizer.from_pretrained(source)


def _export(args: argparse.Namespace) -> None:
    tokenizer = next(_tokenizers([args.dir]), None)
    if tokenizer is None:
        print(f"There is no tokenizer in {args.dir}.", file=sys.stderr)
    export(_load_model(args.dir), args.out, args.format, tokenizer, args.dtype, args.pre_tokenizer)
    files = sorted(args.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{args.out}: {', '.join(file.name for file in files)} ({size / 1e6:.1f} MB)")


def _inspect(args: argparse.Namespace) -> None:
    if not args.dir.is_dir():
        raise UsageError(f"There is no folder {args.dir}.")
    with _reading(args.dir):
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


def _inspect_family(args: argparse.Namespace) -> None:
    trust = {"trust_remote_code": args.trust_remote_code}
    with _reading(args.model):
        config = AutoConfig.from_pretrained(args.model, **trust)
    by_hand = "Look at the model's code, and write the row by hand: docs/usage.md says how."
    if config.is_encoder_decoder or not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UsageError(f"Rows are proposed for decoders, and {args.model} is a {config.model_type!r}. {by_hand}")
    whole = config.num_hidden_layers
    config.num_hidden_layers = count = min(whole, args.layers)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole:  # one entry a layer
            setattr(config, name, value[:count])
    try:
        with _reading(args.model):
            model = AutoModelForCausalLM.from_config(config, **trust)
    except ValueError:
        raise UsageError(
            f"Rows are proposed for decoders, and transformers has none of type {config.model_type!r}. {by_hand}"
        ) from None
    try:
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


def _about_adapter(folder: Path) -> dict[str, Any]:
    config = _adapter_config(str(folder))
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
        "settings": f"r={config.r} r_pia={config.r_pia} propagation={config.propagation} router={config.router}",
    }
    if (folder / REPORT).exists():
        try:
            report = read_report(folder)
        except (OSError, ValueError) as error:  # what is inspected is the adapter
            _say(f"The search is left out: {error}", file=sys.stderr)
            return about
        if report["skip_layers"] == about["skip_layers"]:  # and not of an earlier training into this folder
            about["search"] = (
                f"{len(report['rounds'])} rounds from step {report['warmup']} to {report['settle']}, "
                f"{report['ignored']} candidates ignored; see {REPORT} and search.png"
            )
    return about


def _adapter_config(name: str) -> EASConfig:
    """The configuration of an adapter, a folder or a name on the Hub."""
    with _reading(name):
        config = PeftConfig.from_pretrained(name)
    if config.peft_type != EASType.EAS:
        raise UsageError(f"{name} is an adapter of type {config.peft_type!s}, not an EAS adapter.")
    return config


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
        "propagation": _about_propagation(record.ranks),
    }
    if not record.by_name and first.causal:
        text, total = config.get_text_config(decoder=True), len(first.present)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        kept = (total - len(skip)) * values + sum(record.ranks)
        about["kv_cache"] = f"{kept} values a token, instead of {total * values}"
    return about


def _about_propagation(ranks: list[int]) -> str:
    if not ranks:
        return "skipped attentions say nothing of other tokens"
    return f"{len(ranks)} skipped attentions leave a mean of rank {ranks[0]} over other tokens"


# ----------------------------------------------------------------------------------------------------------------------
# Models and data
# ----------------------------------------------------------------------------------------------------------------------


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _load_model(name: str, dtype: str | None = None, adapter: PeftConfig | None = None) -> PreTrainedModel:
    """A model that generates text; or the one that `adapter` was trained with, if that says so."""
    own = None if adapter is None else _model_class(adapter.auto_mapping)
    if own is None and adapter is not None and adapter.task_type == TaskType.SEQ_2_SEQ_LM:
        own = AutoModelForSeq2SeqLM
    with _reading(name):
        if own is None:
            model_type = AutoConfig.from_pretrained(name).model_type
            reads_images = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            is_causal = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            own = AutoModelForImageTextToText if reads_images and not is_causal else AutoModelForCausalLM
        return own.from_pretrained(name, dtype=dtype or "auto")


def _model_class(auto_mapping: Any) -> type[PreTrainedModel] | None:
    """The class that an adapter was trained with; saved where there is no type of the task."""
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    own = getattr(transformers, name, None) if isinstance(name, str) else None
    if own is not None and not (isinstance(own, type) and issubclass(own, PreTrainedModel)):
        raise UsageError(f"adapter_config.json names {name!r} as its `base_model_class`, which is no class of models.")
    return own


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with _reading(name):
        return _with_padding(AutoTokenizer.from_pretrained(name), name)


def _with_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"The tokenizer of {name} has neither a padding token nor an end of sequence.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _examples(
    data: str, tokenizer: PreTrainedTokenizerBase, max_length: int, count: int | None = None
) -> list[dict[str, list[int]]]:
    """Tokenised examples, with labels that are -100 for the prompt; the longest are cut at the end."""
    with _reading(data):
        return _tokenised(data, _rows(data), tokenizer, max_length, count)


def _rows(data: str) -> Sequence[dict[str, Any]] | Dataset:
    """The rows of a file, a folder or a dataset of the Hub."""
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(data)
    if path.suffix in kinds and not path.exists():
        raise UsageError(f"There is no file {data}.")
    if path.is_file() and path.suffix not in kinds:
        raise UsageError(f"{data} is no {', '.join(kinds)} file.")
    if path.is_file() and not path.stat().st_size:
        raise UsageError(f"{data} can't be read: it is empty")
    if path.is_file() and kinds[path.suffix] == "json":
        return _json_rows(path)
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UsageError("reading data needs the package `datasets`: pip install 'peft_eas[cli]'.") from None
    if not path.is_file():
        return load_dataset(data, split="train")
    try:
        return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    except (DatasetsError, ValueError) as error:
        raise UsageError(f"{data} can't be read: {error.__cause__ or error}") from None


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line or in one list. (The parser that `datasets` uses ends the process if there is
    something else.)"""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_list = text.lstrip()[:1] == "["
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON, with an object in each line or a list of objects: {error}.") from None
    wrong = [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if wrong:
        raise UsageError(f"{path}: row {wrong[0]} is no object, but {shown(rows[wrong[0] - 1])}.")
    return rows


def _tokenised(
    data: str,
    rows: Sequence[dict[str, Any]] | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    count: int | None,
) -> list[dict[str, list[int]]]:
    if not len(rows):
        raise UsageError(f"{data} has no rows.")
    columns = {*rows[0]}
    if not ({"prompt", "completion"} <= columns or "text" in columns):
        raise UsageError(f"{data} has the columns {sorted(columns)}, but needs `prompt` and `completion`, or `text`.")
    names = ("prompt", "completion") if {"prompt", "completion"} <= columns else ("text",)
    examples = []
    for number, row in enumerate(itertools.islice(rows, count), start=1):
        for name in names:
            if not isinstance(row.get(name), str):
                raise UsageError(f"{data}: `{name}` of row {number} is no text, but {shown(row.get(name))}.")
        if len(names) == 2:
            prompt = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
        else:
            prompt, answer = [], tokenizer(row["text"]).input_ids
        answer = [*answer, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        ids = (prompt + answer)[:max_length]
        if len(prompt) < len(ids):
            examples.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:max_length]})
    if not examples:
        raise UsageError(f"No prompt in {data} leaves room for its completion within {max_length} tokens.")
    if len(examples) < number:
        print(
            f"{data}: {number - len(examples)} of {number} rows left out, whose prompts leave no room for a completion "
            f"within {max_length} tokens.",
            file=sys.stderr,
        )
    return examples


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


def _layer(given: str) -> int | str:
    return int(given) if given.isdigit() else given


def _layer_of(name: str) -> int:
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def _num_skip(text: str) -> int | float | str:
    if text == "auto":
        return text
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a count, a fraction, or auto, got {text}") from None


if __name__ == "__main__":
    sys.exit(main())
