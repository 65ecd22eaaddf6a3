"""LLaVA-EAS, one of the paper's three systems: fine-tune LLaVA for ScienceQA without 12 of its 32 attentions.

What it does, with `python examples/llava_scienceqa.py --data FOLDER`, where ScienceQA has been unpacked:

1. fine-tunes EAS and the projector with the stock Trainer, while a search finds the attentions to skip;
2. merges it, and tests base, fine-tuned and merged model by ScienceQA's table: subjects, contexts, grades;
3. times the three side by side: an answer of 32 tokens to one question at a time;
4. saves the merged model with its processor, and lets a new process, without peft_eas, answer the questions again.

`--small` does it with what arrives in packages: the LLaVA that `examples/vqa.py` makes, and easy-VQA in ScienceQA's
format; in about 20 minutes of one CPU core. `--tiny` is for trying it: a random model and a few made questions.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import made
import paper
import torch
import transformers
import vqa
from paper import Problem
from peft import PeftConfig, PeftModel, get_peft_model
from real_data import DownloadError
from sentiment import step
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_eas import EASCallback, EASConfig

PROJECTOR = "multi_modal_projector"
SMALL = dict(examples=[1200, 128, 400], learning_rate=1e-3, epochs=1, batch_size=8, r=16, r_pia=32, timing_examples=4)
TINY = dict(num_skip=2, r=4, r_pia=4, epochs=2, batch_size=4, learning_rate=1e-3, timing_examples=1)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that LLaVA-EAS and LaVIN-EAS have in common."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("ScienceQA/data/scienceqa"), help="ScienceQA's folder")
    options.add_argument("--num-skip", type=int, default=12, help="how many attentions to skip")
    options.add_argument("--r", type=int, default=128, help="rank of the adapters in front of attentions")
    options.add_argument("--r-pia", type=int, default=256, help="rank of the adapters in front of FFNs")
    options.add_argument("--learning-rate", type=float, default=4e-4)
    options.add_argument("--epochs", type=float, default=20)
    options.add_argument("--batch-size", type=int, default=16, help="questions in a training step, on each device")
    options.add_argument(
        "--splits", nargs=3, default=["train", "minival", "test"], help="to train on, to search and to test with"
    )
    options.add_argument(
        "--examples", nargs=3, type=int, default=[None] * 3, help="how many questions of each split; default: all"
    )
    options.add_argument("--timing-examples", type=int, default=20, help="how many answers are timed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("outputs/scienceqa"), help="folder for the merged model")
    return options


def questions(args: argparse.Namespace) -> list[list[Problem]]:
    """To train on, to search and to test with."""
    if args.tiny:
        args.data = made.made_scienceqa(Path(tempfile.mkdtemp()))
    elif args.small:
        args.data = made.packaged_scienceqa(dict(zip(args.splits, args.examples, strict=True)), args.seed)
    found = [paper.read_scienceqa(args.data, split)[:n] for split, n in zip(args.splits, args.examples, strict=True)]
    print("{} questions to train on, {} to search with, {} to test with".format(*map(len, found)))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


def prompts(problems: Sequence[Problem], processor: ProcessorMixin, ending: Sequence[str]) -> BatchFeature:
    """Prompts and what follows them, padded on the left; an image stands in front of the question that has one."""
    texts = ["<image>\n" * (p.image is not None) + p.prompt + end for p, end in zip(problems, ending, strict=True)]
    images = [paper.load_image(p.image) for p in problems if p.image]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor(text=texts, images=images or None, **options)


def collate(problems: Sequence[Problem], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """A batch to train on, with labels that are -100 for the prompts' tokens."""
    responses = [problem.response + processor.tokenizer.eos_token for problem in problems]
    batch = prompts(problems, processor, responses)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (problem, response) in enumerate(zip(problems, responses, strict=True)):
        prompt, whole = processor.tokenizer([problem.prompt, problem.prompt + response]).input_ids
        length = len(whole) - len(prompt)
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def asking(problems: Sequence[Problem], processor: ProcessorMixin, batch_size: int) -> list[BatchFeature]:
    """Batches to be answered: prompts up to where the letter of the right choice comes."""
    chunks = (problems[start : start + batch_size] for start in range(0, len(problems), batch_size))
    return [prompts(chunk, processor, [paper.ANSWER] * len(chunk)) for chunk in chunks]


# ----------------------------------------------------------------------------------------------------------------------
# Training and testing
# ----------------------------------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel,
    config: PeftConfig,
    problems: Sequence[Problem],
    processor: ProcessorMixin,
    args: argparse.Namespace,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """The model with adapters, trained with the stock Trainer."""
    set_seed(args.seed)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    training_args = TrainingArguments(
        output_dir=str(args.output),
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        remove_unused_columns=False,  # the collator makes arguments of the questions
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=False,
        seed=args.seed,
    )
    collator = partial(collate, processor=processor)
    Trainer(model, training_args, collator, list(problems), callbacks=list(callbacks)).train()
    return model.eval()


@torch.no_grad()
def letter_logits(model: nn.Module, batches: Sequence[BatchFeature]) -> torch.Tensor:
    """What the model would say where the letter comes: `(questions, vocabulary)`."""
    return torch.cat([model(**b.to(model.device), logits_to_keep=1).logits[:, -1].float().cpu() for b in batches])


def right_answers(logits: torch.Tensor, problems: Sequence[Problem], processor: ProcessorMixin) -> torch.Tensor:
    """Whether the right choice's letter is the likeliest of those of all its choices: `(questions,)`, bool."""
    ids = torch.tensor(
        [
            tokens[-1]
            for tokens in processor.tokenizer([f"{paper.ANSWER} {letter}" for letter in paper.LETTERS]).input_ids
        ]
    )
    likeliest = [row[ids[: len(p.choices)]].argmax().item() for row, p in zip(logits, problems, strict=True)]
    return torch.tensor([choice == p.answer for choice, p in zip(likeliest, problems, strict=True)])


def compare(
    models: dict[str, nn.Module], problems: Sequence[Problem], processor: ProcessorMixin, args: argparse.Namespace
) -> torch.Tensor:
    """Print ScienceQA's table, and how long an answer of 32 tokens to one question takes; the last model's logits."""
    batches = asking(problems, processor, args.batch_size)
    logits = {name: letter_logits(model, batches) for name, model in models.items()}
    rows = {n: paper.by_category(right_answers(these, problems, processor), problems) for n, these in logits.items()}
    device = list(models.values())[-1].device
    single = [one.to(device) for one in asking(problems[: args.timing_examples], processor, batch_size=1)]
    options = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False)
    calls = {name: lambda m=model: [m.generate(**one, **options) for one in single] for name, model in models.items()}
    times = paper.timed(calls, len(single))
    paper.print_table({name: row | times[name] for name, row in rows.items()})
    *_, before, after = logits.values()
    print(f"Largest difference that merging makes to a logit of a test question: {(after - before).abs().max():.1e}")
    return after


def answered_elsewhere(folder: Path, batches: Sequence[BatchFeature]) -> torch.Tensor:
    """The logits of `letter_logits`, of the model in the folder, in a new process without peft_eas."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "batches.pt"
        torch.save([dict(batch.to("cpu")) for batch in batches], file)
        subprocess.run([sys.executable, Path(__file__).with_name("elsewhere.py"), folder, file], check=True)
        return torch.load(file)


def pretrained(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA, and its processor."""
    if args.tiny:
        torch.manual_seed(args.seed)
        tokenizer = made.tiny_tokenizer()
        return vqa.put_together(made.tiny_tower(), made.tiny_language_model(tokenizer), tokenizer)
    if args.small:
        start = argparse.Namespace(image_epochs=20, seed=args.seed, output=args.output)
        args.model = vqa.starting_point(vqa.visual_questions("train"), start)
    paper.check_type(args.model, "llava")
    return AutoModelForImageTextToText.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)


def main() -> None:
    options = parser("Fine-tune LLaVA for ScienceQA with EAS: without some of its attentions.")
    options.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="hub name or folder of a LLaVA")
    args = paper.parse(options, SMALL, TINY)
    transformers.logging.disable_progress_bar()  # those of loading; the Trainer's stays
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    with step("Loading model and questions"):
        train, search, test = questions(args)
        base, processor = pretrained(args)

    with step("Fine-tuning EAS and the projector, and searching"):
        settings = dict(num_skip=args.num_skip, r=args.r, r_pia=args.r_pia, scaling=1.0)
        config = EASConfig(**settings, modules_to_save=[PROJECTOR], task_type="CAUSAL_LM")
        # from the deepest, as the authors' sets are: before it has learned the task, the model says little of its needs
        finder = EASCallback(search, warm_start="depth")
        eas = fine_tune(copy.deepcopy(base), config, train, processor, args, [finder])
        print(f"EAS skips {eas.skip_layers}, out of {base.config.text_config.num_hidden_layers} attentions")

    with step("Merging, testing and timing"):
        merged = copy.deepcopy(eas).merge_and_unload()  # merging works in place
        models = {"base": base.to(merged.device).eval(), "EAS, not merged": eas, "EAS, merged": merged}
        logits = compare(models, test, processor, args)

    with step(f"Saving the merged model to {args.output}, and answering in a new process without peft_eas"):
        merged.save_pretrained(args.output)
        processor.save_pretrained(args.output)
        again = answered_elsewhere(args.output, asking(test, processor, args.batch_size))
        print(f"Largest difference that saving and loading makes to a logit: {(again - logits).abs().max():.1e}")


if __name__ == "__main__":
    try:
        main()
    except (paper.DataError, DownloadError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
