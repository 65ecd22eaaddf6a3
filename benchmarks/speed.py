"""How fast EAS is, as ratios measured side by side in one process.

    python benchmarks/speed.py stripped    merged models against the same models stripped by hand
    python benchmarks/speed.py base        merged models against their base model, next to what the saved work allows
    python benchmarks/speed.py unmerged    models with adapters, not merged, against their base model
    python benchmarks/speed.py paper       merged models against their base with adapters in every layer, not merged
    python benchmarks/speed.py training    a training step against PEFT's LoRA: time and memory
    python benchmarks/speed.py all         all of them, one after the other

Each prints a table; without `--quick`, it also goes to `benchmarks/results/` as Markdown and JSON, `base` with a
picture. Every ratio is the median of paired ratios, one a round: in a round, everything that is compared runs once, in
turn. A `control` is a second copy of what the others are compared with: how far it is from 1 says what a ratio can
resolve.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import (
    CLOCKS,
    TOLERANCE,
    adapt,
    allocated,
    decode,
    decode_bytes,
    draw,
    filled,
    kv_bytes,
    load_base,
    machine,
    merge,
    prefill,
    prefill_flops,
    profile_table,
    shares_by_part,
    side_by_side,
    spread,
    strip_by_hand,
    summary,
    table,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_eas import EASConfig

GOAL_STRIPPED = 1.02
GOAL_DECODING = 1.03
GOAL_TRAINING = 0.95
GOAL_ALL_LINEARS = 1.25
LORAS = {"LoRA": ["q_proj", "v_proj"], "LoRA, all linears": "all-linear"}
"""What LoRA's are compared with, and where they are."""


# ----------------------------------------------------------------------------------------------------------------------
# The questions
# ----------------------------------------------------------------------------------------------------------------------


def run_stripped(args: argparse.Namespace) -> dict:
    """Does a merged model cost more than one whose attentions were deleted by hand?"""
    base = load_base(args.random_weights)
    config, tokens = base.config, 64 if args.quick else 512
    skip = spread(8, config.num_hidden_layers)
    ids = torch.randint(config.vocab_size, (1, tokens))
    rows = []
    plain = merge(base, skip, "none")
    hand, twin = (strip_by_hand(plain, config, skip) for _ in range(2))
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, hand(ids).logits, rtol=0, atol=0.01)
    models = {
        "a constant": plain,
        "a linear map": merge(base, skip, "none", stand_in="linear"),
        "a linear map, by `merge_adapter`": adapt(base, skip, "none", stand_in="linear"),
        "a mean over tokens": merge(base, skip, "mean"),
    }
    models["a linear map, by `merge_adapter`"].merge_adapter()
    for left, merged in models.items():
        for case, make in (
            (f"prefill of {tokens}", lambda model: prefill(model, ids)),
            (f"decode after {tokens}", lambda model: decode(model, ids, args.steps, filled(model, ids))),
        ):
            works = {"hand": make(hand), "merged": make(merged), "control": make(twin)}
            ratios = side_by_side(works, args.rounds, CLOCKS[args.clock])
            measured, control = summary(ratios["merged"]), summary(ratios["control"])
            rows.append(
                {"left": left, "case": case, **measured, "control": control["median"]}
                | {"goal": GOAL_STRIPPED, "reached": measured["median"] <= GOAL_STRIPPED, "ratios": ratios}
            )
            if args.profile:
                for name, model in (("merged", merged), ("hand", hand)):
                    write_profile(args, f"stripped {left} {case} {name}", model, works[name])
    return {
        "title": f"Merged against stripped by hand ({len(skip)} of {config.num_hidden_layers} attentions skipped)",
        "note": "By what skipped attentions leave. With a constant both models share their weights, and their logits "
        "are equal; the others are against the same model: what they cost. Below 1: merged is the faster one.",
        "columns": ["left", "case", "median", "q1", "q3", "control", "goal", "reached"],
        "rows": rows,
    }


def run_base(args: argparse.Namespace) -> dict:
    """Is a merged model as much faster than its base model as the saved work allows?"""
    base = load_base(args.random_weights)
    config = base.config
    layers, counts = config.num_hidden_layers, (8, 12)
    models = {f"{k} skipped": merge(base, spread(k, layers), "none") for k in counts}
    models = {"base": base, **models, "control": copy.deepcopy(base)}
    retained = {"base": layers, **{f"{k} skipped": layers - k for k in counts}}
    rows = []

    def compare(case: str, ids: torch.Tensor, works: dict, amounts: dict) -> None:
        ratios = side_by_side(works, args.rounds, CLOCKS[args.clock])
        parts = shares_by_part({"base": base}, works, min(args.rounds, 5), CLOCKS[args.clock])["base"]
        caches = {name: kv_bytes(filled(models[name], ids)) for name in retained}
        for k in counts:
            name = f"{k} skipped"
            measured, bound, kv = summary(ratios[name]), amounts[name] / amounts["base"], caches[name] / caches["base"]
            assert kv == (layers - k) / layers, kv
            off = measured["median"] - bound
            rows.append(
                {"case": case, "skipped": k, **measured, "bound": bound, "points off": 100 * off}
                | {"within": abs(off) <= TOLERANCE, "by time": 1 - k / layers * parts["attentions"]}
                | {"control": summary(ratios["control"])["median"], "KV": kv, "ratios": ratios}
            )
        if args.profile:
            for name, model in models.items():
                write_profile(args, f"base {case} {name}", model, works[name])

    for tokens in (64, 128) if args.quick else (512, 2048):
        ids = torch.randint(config.vocab_size, (1, tokens))
        works = {name: prefill(model, ids) for name, model in models.items()}
        amounts = {name: prefill_flops(config, count, tokens) for name, count in retained.items()}
        compare(f"prefill of {tokens}", ids, works, amounts)
    for tokens in (16, 64) if args.quick else (64, 2048):
        ids = torch.randint(config.vocab_size, (1, tokens))
        works = {name: decode(model, ids, args.steps, filled(model, ids)) for name, model in models.items()}
        cached = tokens + (args.steps + 1) / 2  # on average; a token's own keys and values are read, too
        amounts = {name: decode_bytes(models[name], config, count, cached) for name, count in retained.items()}
        compare(f"decode after {tokens}", ids, works, amounts)
    return {
        "title": f"Merged against base (of {layers} attentions, defaults)",
        "note": "The bound is the ratio of the operations of the matrix products (prefill), or of the bytes of the "
        "weights, keys and values that are read for a token (decode). 'By time' is 1 less the skipped attentions' "
        "share of the base model's time, as measured in it. Where it is off the bound, attentions cost more or less "
        "time than their operations or bytes suggest; where the measured ratio is above it, and by more than the "
        "control is off 1, EAS costs that. 'KV' is the ratio of the bytes that the real caches hold.",
        "columns": [
            "case",
            "skipped",
            "median",
            "q1",
            "q3",
            "bound",
            "points off",
            "within",
            "by time",
            "control",
            "KV",
        ],
        "rows": rows,
    }


def run_unmerged(args: argparse.Namespace) -> dict:
    """How much slower than its base is a model with adapters that are not merged?"""
    base = load_base(args.random_weights)
    config, skip = base.config, spread(8, base.config.num_hidden_layers)
    loras = {name: LoraConfig(r=8, target_modules=where, task_type="CAUSAL_LM") for name, where in LORAS.items()}
    models = {
        "base": base,
        "EAS": adapt(base, skip, "none", stand_in="linear"),
        **{name: get_peft_model(copy.deepcopy(base), lora).eval() for name, lora in loras.items()},
        "control": copy.deepcopy(base),
    }
    rows = []

    def compare(case: str, works: dict, goal: float | None) -> None:
        ratios = side_by_side(works, args.rounds, CLOCKS[args.clock])
        control = summary(ratios.pop("control"))["median"]
        for name, own in ratios.items():
            measured, goal_here = summary(own), goal if name == "EAS" else None
            reached = None if goal_here is None else measured["median"] <= goal_here
            rows.append(
                {"case": case, "adapter": name, **measured, "control": control}
                | {"goal": goal_here, "reached": reached, "ratios": own}
            )
        if args.profile:
            for name, model in models.items():
                write_profile(args, f"unmerged {case} {name}", getattr(model, "base_model", model), works[name])

    tokens = 64 if args.quick else 512
    ids = torch.randint(config.vocab_size, (1, tokens))
    compare(f"prefill of {tokens}", {name: prefill(model, ids) for name, model in models.items()}, None)
    for tokens in (16, 64) if args.quick else (64, 512):
        ids = torch.randint(config.vocab_size, (1, tokens))
        works = {name: decode(model, ids, args.steps, filled(model, ids)) for name, model in models.items()}
        compare(f"decode after {tokens}", works, GOAL_DECODING)
    return {
        "title": f"Not merged against base ({len(skip)} of {config.num_hidden_layers} attentions skipped)",
        "note": "EAS has its defaults. All are ratios to the base model without adapters. LoRA's have rank 8.",
        "columns": ["case", "adapter", "median", "q1", "q3", "control", "goal", "reached"],
        "rows": rows,
    }


def run_paper(args: argparse.Namespace) -> dict:
    """How much faster is a merged model than its base with adapters in every layer, which LaVIN does not merge?"""
    base = load_base(args.random_weights)
    config = base.config
    layers, counts = config.num_hidden_layers, (8, 12)
    models = {
        "adapters in every layer": adapt(base, [], "none"),
        "base": base,
        **{f"{k} skipped": merge(base, spread(k, layers), "none", stand_in="linear") for k in counts},
        "control": adapt(base, [], "none"),
    }
    rows = []
    tokens = 64 if args.quick else 512
    ids = torch.randint(config.vocab_size, (1, tokens))
    for case, make in (
        (f"prefill of {tokens}", lambda model: prefill(model, ids)),
        (f"decode after {tokens}", lambda model: decode(model, ids, args.steps, filled(model, ids))),
    ):
        works = {name: make(model) for name, model in models.items()}
        ratios = side_by_side(works, args.rounds, CLOCKS[args.clock])
        control = summary(ratios.pop("control"))["median"]
        for name, own in ratios.items():
            title = name if name == "base" else f"EAS, merged, {name}"
            times = [1 / ratio for ratio in own]
            rows.append({"case": case, "model": title, **summary(own), "control": control}
                        | {"times as fast": summary(times)["median"], "ratios": own})  # fmt: skip
    return {
        "title": f"Merged against adapters in every layer, not merged ({layers} attentions)",
        "note": "The paper's comparison. The ratios are to the base model with this package's adapters in front of "
        "every attention and FFN (rank 16 and 32), nothing skipped and nothing merged: LaVIN's kind. Merged models "
        "have linear stand-ins, the default.",
        "columns": ["case", "model", "median", "q1", "q3", "control", "times as fast"],
        "rows": rows,
    }


def run_training(args: argparse.Namespace) -> dict:
    """Does a training step with EAS take more time or memory than one with LoRA?"""
    base = load_base(args.random_weights)
    rows_, tokens = (2, 32) if args.quick else (8, 64)
    skip = spread(8, base.config.num_hidden_layers)
    ids = torch.randint(base.config.vocab_size, (rows_, tokens))
    labels = ids.masked_fill(torch.arange(tokens) < 3 * tokens // 4, -100)
    loras = {name: LoraConfig(r=8, target_modules=where, task_type="CAUSAL_LM") for name, where in LORAS.items()}
    configs = {
        **loras,
        "control": loras["LoRA"],
        "EAS": EASConfig(skip_layers=skip, task_type="CAUSAL_LM"),
        "EAS, propagation mean": EASConfig(skip_layers=skip, propagation="mean", task_type="CAUSAL_LM"),
    }
    works, facts = {}, {}
    for name, config in configs.items():
        own = copy.deepcopy(base)
        made: list = []

        def attach_and_train(own=own, config=config, made=made) -> None:
            model = get_peft_model(own, copy.deepcopy(config)).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            made += [model, optimizer]
            for _ in range(2):  # the second has the optimizer's state from the first
                train_step(model, optimizer, ids, labels)

        # from before the adapter is attached: its parameters, gradients and optimizer state count as well
        peak, _ = allocated(attach_and_train)
        model, optimizer = made
        _, kept = allocated(lambda model=model: model(input_ids=ids, labels=labels).loss)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts[name] = {"peak memory": peak, "kept for backward": kept, "trainable": trainable}

        def work(clock: Callable[[], float], model=model, optimizer=optimizer) -> float:
            start = clock()
            train_step(model, optimizer, ids, labels)
            return clock() - start

        works[name] = work
        if args.profile:
            write_profile(args, f"training {name}", model.get_base_model(), work)
    ratios = side_by_side(works, args.rounds, CLOCKS[args.clock])
    rows = []
    control = summary(ratios.pop("control"))["median"]
    of_all = ratios["LoRA, all linears"]
    for name in ratios:
        measured = summary(ratios[name])
        sizes = {fact: value / facts["LoRA"][fact] for fact, value in facts[name].items()}
        ahead = summary([every / own for every, own in zip(of_all, ratios[name], strict=True)])
        reached = measured["median"] <= GOAL_TRAINING and ahead["median"] >= GOAL_ALL_LINEARS
        rows.append(
            {
                "adapter": name,
                **measured,
                "control": control,
                **sizes,
                "all linears / this": ahead["median"],
                "its q1": ahead["q1"],
                "its q3": ahead["q3"],
                "goals": f"{GOAL_TRAINING}, {GOAL_ALL_LINEARS}",
                "reached": reached,
                "ratios": ratios[name],
            }
            | {"bytes and parameters": facts[name]}
        )
    return {
        "title": f"A training step against LoRA on q_proj and v_proj (r=8, {len(skip)} attentions skipped, batch "
        f"{rows_} x {tokens})",
        "note": "Forward, backward and AdamW. All columns are ratios to LoRA, but for 'all linears / this', which "
        "says how many times as long LoRA on all linears takes. The goals are of the first and of that. 'Peak memory': "
        "the most bytes allocated at one time beyond the base model, counted from every allocation: adapters, "
        "optimizer state, gradients, activations. "
        "'Kept for backward': the same at the end of a forward. 'Trainable': parameters.",
        "columns": [
            "adapter",
            "median",
            "q1",
            "q3",
            "control",
            "peak memory",
            "kept for backward",
            "trainable",
            "all linears / this",
            "its q1",
            "its q3",
            "goals",
            "reached",
        ],
        "rows": rows,
    }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor) -> None:
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------


def write_profile(args: argparse.Namespace, name: str, model: nn.Module, work: Callable) -> None:
    file = args.profile / (name.replace(",", "").replace(" ", "_") + ".txt")
    args.profile.mkdir(parents=True, exist_ok=True)
    file.write_text(profile_table(model, work))
    print(f"wrote {file}")


def markdown(result: dict) -> str:
    about = "; ".join(f"{key}: {value}" for key, value in result["machine"].items())
    return (
        f"# {result['title']}\n\n{table(result['columns'], result['rows'])}\n\n{result['note']}\n\n"
        f"Median and quartiles (q1, q3) of {result['rows'][0]['rounds']} paired ratios, {result['clock']} clock, "
        f"{result['weights']} weights.\n\n"
        f"- {result['date']}, `{result['command']}`\n- {about}\n"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RUNS, "all"])
    parser.add_argument("--quick", action="store_true", help="short inputs and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, help="paired measurements (default: 20, with --quick 3)")
    parser.add_argument("--steps", type=int, default=8, help="tokens that one measurement decodes (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1, the steadiest)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="'cpu' counts the process's own time: for a busy machine, with one thread (default: wall)",
    )
    parser.add_argument("--random-weights", action="store_true", help="a model of the same shape, without a download")
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="also write where the time goes, with torch.profiler"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; --quick: none)")
    args = parser.parse_args(argv)
    args.rounds = max(2, args.rounds or (3 if args.quick else 20))  # quartiles need two
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results"
    return args


RUNS = {"stripped": run_stripped, "base": run_base, "unmerged": run_unmerged, "paper": run_paper} | {
    "training": run_training
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    for name in RUNS if args.what == "all" else [args.what]:
        torch.manual_seed(0)
        result = RUNS[name](args) | {
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
            "clock": args.clock,
            "weights": "random" if args.random_weights else "pretrained",
        }
        text = markdown(result)
        print(text)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{name}.md").write_text(text)
            (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            if name == "base":
                labels = [f"{row['case']}, {row['skipped']} skipped" for row in result["rows"]]
                draw(result["rows"], labels, args.out / "base.png")


if __name__ == "__main__":
    main()
