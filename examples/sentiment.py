"""Fine-tune a language model for movie reviews with EAS, and compare it with LoRA.

What it does, with `make demo` or `python examples/sentiment.py`:

1. fine-tunes LoRA on all linears;
2. fine-tunes EAS on the same reviews for as many steps; the first of them search for the attentions to skip;
3. merges both, and compares accuracy, size, KV cache and speed;
4. saves the merged EAS model and lets a new process load it and judge reviews that it has not seen.

It takes about 9 minutes on two CPU cores; what it needs is downloaded the first time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from real_data import (
    ANSWERS,
    DEFAULT_MODEL,
    DownloadError,
    Review,
    collator,
    load_model,
    load_tokenizer,
    movie_reviews,
    tokenise,
)
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_eas import EASCallback, EASConfig

LEARNING_RATE = 2e-3  # of LoRA and EAS
MAX_LENGTH = 80  # of a review, in characters: longer ones take a small computer too long


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model for movie reviews with EAS, and compare it with LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub name or folder of a causal language model")
    parser.add_argument("--num-skip", type=int, default=8, help="how many attentions EAS skips")
    parser.add_argument(
        "--skip-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="skip the attentions of just these layers, no search",
    )
    parser.add_argument("--train-examples", type=int, default=1120, help="reviews to train on, each once")
    parser.add_argument("--search-examples", type=int, default=128, help="other reviews, to search with")
    parser.add_argument("--held-out-examples", type=int, default=400, help="further reviews, to test with")
    parser.add_argument("--batch-size", type=int, default=8, help="reviews in a training step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the reviews' order, the adapters and the training")
    parser.add_argument("--output", type=Path, default=Path("outputs/sentiment"), help="folder for the merged model")
    return parser.parse_args()


def train(
    model: nn.Module,
    config: PeftConfig,
    learning_rate: float,
    examples: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """Fine-tune with the stock Trainer: every review once."""
    set_seed(args.seed)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    training_args = TrainingArguments(
        output_dir=str(args.output),
        learning_rate=learning_rate,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length",  # hardly any padding, so nearly twice as fast
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=False,
        seed=args.seed,
    )
    Trainer(
        model, training_args, train_dataset=examples, data_collator=collator(tokenizer), callbacks=list(callbacks)
    ).train()
    return model.eval()


@torch.no_grad()
def next_token_logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, reviews: Sequence[Review], batch_size: int = 25
) -> torch.Tensor:
    """What the model would say after each review's prompt: `(reviews, vocabulary)`."""
    logits = []
    for start in range(0, len(reviews), batch_size):
        prompts = [review.prompt for review in reviews[start : start + batch_size]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        logits.append(model(**batch, logits_to_keep=1).logits[:, -1].float().cpu())
    return torch.cat(logits)


def accuracy_and_loss(
    logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase, reviews: Sequence[Review]
) -> tuple[float, float]:
    """How often the right answer is likelier than the wrong one, and the cross-entropy of the right one."""
    negative, positive = (tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS)
    is_positive = torch.tensor([review.rating > 0 for review in reviews])
    right = (logits[:, positive] > logits[:, negative]) == is_positive
    targets = torch.where(is_positive, positive, negative)
    return right.float().mean().item(), F.cross_entropy(logits, targets).item()


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], prompt_length: int = 512, new_tokens: int = 16, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """How fast each model reads a prompt (`prefill`) and generates (`decode`), relative to the first model, and the KV
    cache's bytes per token (`kv_bytes`).

    The models take turns, and each is compared with the first one's time in the same round, so that whatever else the
    machine does hits all alike; the median over the rounds is given.
    """
    prompt = torch.randint(1000, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    seconds = {name: {"prefill": [], "decode": []} for name in models}
    kv_bytes = {}
    for _ in range(1 + rounds):
        for name, model in models.items():
            start = time.perf_counter()
            output = model(prompt.to(model.device), use_cache=True, logits_to_keep=1)
            token, cache = output.logits.argmax(-1), output.past_key_values
            token.item()  # waits for an accelerator, too
            seconds[name]["prefill"].append(time.perf_counter() - start)
            held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
            kv_bytes[name] = sum(t.nbytes for t in held) / prompt_length
            start = time.perf_counter()
            for _ in range(new_tokens):
                token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            token.item()
            seconds[name]["decode"].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    results = {}
    for name, own in seconds.items():
        results[name] = {"kv_bytes": kv_bytes[name]}
        for kind in own:  # the first round was for warming up
            pairs = zip(first[kind][1:], own[kind][1:], strict=True)
            results[name][kind] = statistics.median(reference / this for reference, this in pairs)
    return results


def print_table(scores: dict[str, tuple[float, float]], models: dict[str, nn.Module]) -> None:
    """One row a model, with its accuracy and loss in `scores`; speeds are relative to the first one's."""
    columns = {"accuracy": 10, "loss": 8, "parameters": 12, "KV bytes/token": 16, "prefill": 9, "decode": 9}
    rows = []
    for name, measured in measure(models).items():
        accuracy, loss = scores[name]
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        speeds = (f"{measured[kind]:.2f}x" for kind in ("prefill", "decode"))
        cells = (f"{accuracy:.3f}", f"{loss:.3f}", f"{parameters / 1e6:.1f} M", f"{measured['kv_bytes']:,.0f}", *speeds)
        rows.append((name, cells))
    for name, cells in [("", columns), *rows]:
        print(f"{name:18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values(), strict=True)))


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is being done, and how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    args = parse_args()
    transformers.logging.disable_progress_bar()  # those of loading; the Trainer's stays
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    models: dict[str, nn.Module] = {}  # the rows of the table
    logits: dict[str, torch.Tensor] = {}

    with step(f"Loading {args.model} and movie reviews"):
        tokenizer = load_tokenizer(args.model)
        base = models["base"] = load_model(args.model)
        total = args.train_examples + args.search_examples
        reviews, held_out = movie_reviews(total, args.held_out_examples, MAX_LENGTH)
        held_out.sort(key=lambda review: len(review.text))  # batches need less padding
        examples = tokenise(reviews, tokenizer)
        examples, search_examples = examples[: args.train_examples], examples[args.train_examples :]
        print(
            f"{len(examples)} reviews to train on, {len(search_examples)} to search with, {len(held_out)} to test with"
        )

    with step("Testing the pretrained model"):
        logits["base"] = next_token_logits(base, tokenizer, held_out)

    with step("Fine-tuning LoRA"):
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        lora = train(load_model(args.model), config, LEARNING_RATE, examples, tokenizer, args)

    with step("Testing LoRA"):
        models["LoRA, merged"] = lora.merge_and_unload()
        logits["LoRA, merged"] = next_token_logits(models["LoRA, merged"], tokenizer, held_out)

    with step("Searching and fine-tuning EAS"):
        wanted = {"skip_layers": args.skip_layers} if args.skip_layers else {"num_skip": args.num_skip}
        config, callbacks = EASConfig(**wanted, task_type="CAUSAL_LM"), [EASCallback(search_examples)]
        eas = train(load_model(args.model), config, LEARNING_RATE, examples, tokenizer, args, callbacks)
        print(f"EAS skips the attentions of layers {eas.skip_layers}, out of {base.config.num_hidden_layers}")
        if not args.skip_layers:
            print(f"{args.output / 'search.png'} shows the search")

    with step("Testing EAS, before and after merging"):
        logits["EAS, not merged"] = next_token_logits(eas, tokenizer, held_out)
        models["EAS, not merged"] = copy.deepcopy(eas)  # merging works in place
        merged = models["EAS, merged"] = eas.merge_and_unload()
        logits["EAS, merged"] = next_token_logits(merged, tokenizer, held_out)

    with step("Measuring speed"):
        base.to(merged.device)  # the Trainer has put the others there
        scores = {name: accuracy_and_loss(these, tokenizer, held_out) for name, these in logits.items()}
        print_table(scores, models)
        difference = (logits["EAS, merged"] - logits["EAS, not merged"]).abs().max()
        print(
            "Speeds are those of reading 512 tokens and of generating 16 more, relative to the base model's.\n"
            "LoRA, once merged, has the base model's structure: how far it is from 1.00x shows how exact they are.\n"
            f"Largest difference that merging makes to a logit of a held-out prompt: {difference:.1e}"
        )

    with step(f"Saving the merged model to {args.output}, and loading it in a new process"):
        merged.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        some = held_out[:: max(1, len(held_out) // 4)][:4]
        print("Mean ratings by people, from -4 to 4: " + ", ".join(f"{review.rating:+.1f}" for review in some) + "\n")
        generate = Path(__file__).with_name("generate.py")
        subprocess.run([sys.executable, str(generate), str(args.output), *(r.prompt for r in some)], check=True)


if __name__ == "__main__":
    try:
        main()
    except DownloadError as error:
        raise SystemExit(f"error: {error}") from None
