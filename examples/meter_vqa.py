"""METER-EAS, and BridgeTower-EAS: skip attentions of a model that fuses images and texts, for VQA v2 or NLVR2.

What it does, with `python examples/meter_vqa.py --task vqa --model meter.ckpt --data FOLDER`:

1. reads the data set's own files, and loads METER from its authors' checkpoint, or BridgeTower from the hub;
2. tests it as it is (a published checkpoint of pretraining has no head for the task: it gets a new one, and guesses);
3. fine-tunes EAS: adapters, poolers, types of tokens and the head, while a search finds which of the 24 attentions of
   the fusion layers to skip;
4. tests it, merges it, and tests it again;
5. compares score, size and speed;
6. saves the merged model, loads it, and compares what the two say.

With `--small` all of that happens with a small METER and easy-VQA, which arrive in packages; as no pretrained fusion
does, its fusion layers are first trained on other questions. That takes some minutes of one CPU core. With `--tiny`,
weights are random and examples are drawn, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import meter_small
import torch
import transformers
from meter_data import SPLITS, Collator, easy_vqa, read, save_tiny_tokenizer, write_tiny_data
from meter_model import CheckpointError, load_model
from paper import DataError, ImageQuestion, frequent_answers, print_table, timed
from peft import PeftModel, get_peft_model
from real_data import ENCODER, DownloadError, cached, model_folder
from sentiment import step
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_eas import EASCallback, EASConfig

AUTO = {"vqa": AutoModelForVisualQuestionAnswering, "nlvr2": AutoModelForSequenceClassification}
# besides adapters and the head, as in the authors' code
TRAINED = ["cross_modal_text_pooler", "cross_modal_image_pooler", "token_type_embeddings"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=AUTO, default="vqa")
    parser.add_argument("--model", help="a METER's *.ckpt, or hub name or folder of a BridgeTower")
    parser.add_argument("--tokenizer", default="roberta-base", help="of the text encoder: hub name or folder")
    parser.add_argument("--data", type=Path, help="folder with VQA v2's or NLVR2's files, see docs/paper.md")
    parser.add_argument("--small", action="store_true", help="a small METER and easy-VQA")
    parser.add_argument("--tiny", action="store_true", help="random weights and drawn examples")
    parser.add_argument("--num-skip", type=int, default=10, help="attentions to skip; the paper skips 8 to 16 of 24")
    parser.add_argument("--r", type=int, default=96, help="rank of the adapters in front of attentions")
    parser.add_argument("--r-pia", type=int, default=144, help="rank of those in front of FFNs, and of stand-ins")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="questions in a training step")
    parser.add_argument("--train-examples", type=int, help="questions to train on; all by default")
    parser.add_argument("--search-examples", type=int, default=512, help="other questions, to search with")
    parser.add_argument("--search-interval", type=int, default=20, help="training steps between rounds of the search")
    parser.add_argument("--test-examples", type=int, help="questions to test with; all by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights and of training")
    parser.add_argument("--output", type=Path, default=Path("outputs/meter"), help="folder for the merged model")
    wanted = parser.parse_known_args()[0]
    if wanted.small or wanted.tiny:
        parser.set_defaults(**(meter_small.TINY if wanted.tiny else meter_small.SMALL))
    args = parser.parse_args()
    if args.small and args.task != "vqa":
        parser.error("--small has questions for --task vqa alone; --tiny has examples of both.")
    if not (args.small or args.tiny or (args.model and args.data)):
        parser.error("give --model and --data, or --small or --tiny, which bring both.")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Training and testing
# ----------------------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    examples: Sequence[ImageQuestion],
    collate: Collator,
    args: argparse.Namespace,
    epochs: float,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train what is trainable with the stock Trainer; one learning rate for all, where the authors have several."""
    training_args = TrainingArguments(
        output_dir=str(args.output),
        learning_rate=args.learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        remove_unused_columns=False,  # examples are questions, which the collator makes arguments of
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        dataloader_num_workers=0 if args.small or args.tiny else 8,  # large images take long to read
        dataloader_pin_memory=False,
        disable_tqdm=False,
        seed=args.seed,
    )
    Trainer(model, training_args, train_dataset=examples, data_collator=collate, callbacks=[*callbacks]).train()
    model.eval()


def pretrain(args: argparse.Namespace, target: Path, scratch: Path) -> None:
    """Train all but the towers of the small METER, on questions about other images, and save it."""
    model = meter_small.small_meter(args)
    for tower in (model.text_transformer, model.vit_model):
        tower.requires_grad_(False)
    answers, size = list(model.config.id2label.values()), model.config.vision_config.image_size
    collate = Collator(AutoTokenizer.from_pretrained(args.tokenizer), answers, size)
    fit(model, read("vqa", args.data, "pretrain"), collate, args, epochs=2)
    model.save_pretrained(target)


def with_eas(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    """The model with adapters in its fusion layers; towers are as they were, and stay so."""
    modules_to_save = [*TRAINED, model.HEAD]
    settings = dict(num_skip=args.num_skip, r=args.r, r_pia=args.r_pia, scaling=1.0)
    config = EASConfig(**settings, modules_to_save=modules_to_save)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".embeddings." in name:  # PEFT goes by the ends of names, and text encoders have types of tokens, too
            parameter.requires_grad_(False)
    model.print_trainable_parameters()
    return model


@torch.no_grad()
def logits_of(
    model: nn.Module, questions: Sequence[ImageQuestion], collate: Collator, args: argparse.Namespace
) -> torch.Tensor:
    """What the model says of each answer to each question: `(questions, answers)`."""
    logits = []
    for start in range(0, len(questions), args.batch_size):
        batch = collate(questions[start : start + args.batch_size])
        logits.append(model(**{name: value.to(model.device) for name, value in batch.items()}).logits.float().cpu())
    return torch.cat(logits)


def cells(model: nn.Module, logits: torch.Tensor, scores: torch.Tensor, attentions: int) -> dict[str, str]:
    """A row of the table: the mean of what the model's answers are worth in per cent, with its error, and sizes."""
    worth = 100 * scores.gather(1, logits.argmax(-1, keepdim=True)).double().flatten()
    return {
        "score": f"{worth.mean():.2f} ± {worth.std() / len(worth) ** 0.5:.2f}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "attentions": str(attentions),
    }


def fusion_attentions(model: nn.Module) -> int:
    """How many attentions the fusion layers have."""
    kinds = [type(module).__name__ for name, module in model.named_modules() if "cross_modal" in name]
    return kinds.count("BridgeTowerAttention")


def main() -> None:
    args = parse_args()
    transformers.logging.disable_progress_bar()  # those of loading; the Trainer's stays
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logits: dict[str, torch.Tensor] = {}

    if args.small:
        args.data, args.tokenizer = easy_vqa(), model_folder(ENCODER)
    elif args.tiny:
        args.data, args.tokenizer = args.output / "tiny" / "data", args.output / "tiny" / "tokenizer"
        write_tiny_data(args.data)
        save_tiny_tokenizer(args.tokenizer)
        args.model = args.model or meter_small.save_tiny_checkpoint(args.output / "tiny")

    with step(f"Reading {args.data}"):
        train, test = (read(args.task, args.data, split) for split in SPLITS[args.task])
        answers = ["False", "True"] if args.task == "nlvr2" else frequent_answers([*train, *test])
        search, train = train[: args.search_examples], train[args.search_examples :][: args.train_examples]
        test = test[: args.test_examples]
        print(f"{len(train)} to train on, {len(search)} to search with, {len(test)} to test with")
        print(f"{len(answers)} answers to choose from")

    with step(f"Loading {args.model or 'the small METER, whose fusion layers are trained the first time'}"):
        args.model = args.model or cached(f"meter-easy-vqa-{args.seed}", partial(pretrain, args))
        base = load_model(args.model, args.task, answers).to("cuda" if torch.cuda.is_available() else "cpu")
        collate = Collator(AutoTokenizer.from_pretrained(args.tokenizer), answers, base.config.vision_config.image_size)

    with step("Testing it"):
        scores = collate.scores(test)
        logits["base"] = logits_of(base, test, collate, args)

    with step("Fine-tuning EAS, and searching"):
        set_seed(args.seed)
        eas = with_eas(copy.deepcopy(base), args)
        fit(eas, train, collate, args, args.epochs, [EASCallback(search, interval=args.search_interval)])
        skipped = eas.skip_layers
        print(f"EAS skips {', '.join(skipped)}")

    with step("Testing EAS, before and after merging"):
        logits["EAS, not merged"] = logits_of(eas, test, collate, args)
        models = {"base": base, "EAS, not merged": copy.deepcopy(eas)}  # merging works in place
        merged = models["EAS, merged"] = eas.merge_and_unload()
        logits["EAS, merged"] = logits_of(merged, test, collate, args)

    with step("Measuring speed"):
        batch = {name: value.to(merged.device) for name, value in collate(test[: args.batch_size]).items()}
        times = timed({name: partial(model, **batch) for name, model in models.items()}, len(batch["labels"]))
        left = [fusion_attentions(model) for model in (base, merged)]
        rows = zip(models, (left[0], left[0] - len(skipped), left[1]), strict=True)
        print_table({n: cells(models[n], logits[n], scores, left) | times[n] for n, left in rows})
        difference = (logits["EAS, merged"] - logits["EAS, not merged"]).abs().max()
        print(f"Largest difference that merging makes to a logit: {difference:.1e}")

    with step(f"Saving the merged model to {args.output}, and loading it"):
        merged.save_pretrained(args.output)
        for part in (collate.tokenizer, collate.processor):
            part.save_pretrained(args.output)
        loaded = AUTO[args.task].from_pretrained(args.output)
        same = torch.equal(logits_of(loaded.to(base.device), test, collate, args), logits["EAS, merged"])
        print(f"The loaded model says {'the very same' if same else 'SOMETHING ELSE'} as the merged one.")
        print("Elsewhere, `import meter_model` comes before that: it registers METER, and imports peft_eas.")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, DownloadError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
