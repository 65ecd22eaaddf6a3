"""All that is to be measured on a GPU, in one command of less than 9 minutes.

    python benchmarks/gpu.py                    # random weights in the shape of Qwen2.5-1.5B, in bfloat16
    python benchmarks/gpu.py --model FOLDER     # a model of the Hub, or in a folder
    python benchmarks/gpu.py --small            # a tiny model, on the CPU if there is no GPU: to see that it runs

In this order: a search, a merge and a save, end to end; prefill and decoding of the base model, with adapters that are
not merged, and merged, for 1 and 32 prompts of 512 to 8192 tokens; a training step next to LoRA's; decoding with a
static cache, compiled in the mode "reduce-overhead"; and the same on a base model that bitsandbytes has quantised. What
is not installed, does not fit into the memory, or fails, is a row that says so.

Ratios are medians of paired rounds, with quartiles: in a round everything that is compared runs once, in turn. There
are as many rounds as there is time for, and each row is in `benchmarks/results/gpu.json` and `gpu.md` as soon as it is
known, so that nothing is lost when the time is over, which ends the process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import adapt, decode, filled, machine, merge, prefill, side_by_side, spread, summary, synchronised, table
from peft import LoraConfig, get_peft_model
from speed import LORAS, train_step
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_eas import EASCallback, EASConfig

SHAPE = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
SMALL = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MARGIN = 15
"""Seconds before the end in which nothing new begins."""
COLUMNS = ("part", "case", "what", "median", "q1", "q3", "rounds", "seconds", "GB", "note")


class Bench:
    """The models, the time that is left, and the rows so far.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.start = time.monotonic()
        self.args = args
        self.rows: list[dict] = []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clock = synchronised(time.perf_counter, self.device)
        self.small = args.small
        if args.model:
            base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(self.device)
        else:
            with torch.device(self.device):
                config = Qwen2Config(**(SMALL if args.small else SHAPE))
                base = Qwen2ForCausalLM(config).to(torch.bfloat16)
        self.base = base.eval()
        self.layers = self.base.config.num_hidden_layers
        self.skip = spread(self.layers * 8 // 30, self.layers)

    def left(self) -> float:
        """Seconds until nothing new is begun."""
        return self.start + 60 * self.args.minutes - MARGIN - time.monotonic()

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(self.base.config.vocab_size, (rows, tokens), device=self.device)

    def add(self, part: str, case: str = "", what: str = "", **facts: Any) -> None:
        """Write down a row."""
        self.rows.append({"part": part, "case": case, "what": what, **facts})
        said = [value for key, value in self.rows[-1].items() if key != "ratios"]
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in said), flush=True)
        if self.args.out is None:
            return
        self.args.out.mkdir(parents=True, exist_ok=True)
        about = machine() | {"device": str(self.device), "attention": self.base.config._attn_implementation}
        if self.device.type == "cuda":
            about["device"] = torch.cuda.get_device_name()
        about |= {
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        }
        shown = [{column: row.get(column, "") for column in COLUMNS} for row in self.rows]
        text = "# On a GPU\n\n" + table(list(COLUMNS), shown) + "\n\n"
        text += "\n".join(f"- {key}: {value}" for key, value in about.items()) + "\n"
        self._write("gpu.json", json.dumps({"machine": about, "rows": self.rows}, indent=1) + "\n")
        self._write("gpu.md", text)

    def _write(self, name: str, text: str) -> None:
        """All at once, since the time may be over in between."""
        half = self.args.out / f".{name}"
        half.write_text(text)
        half.replace(self.args.out / name)

    def compare(self, part: str, case: str, works: dict[str, Callable], share: float) -> None:
        """Rows of ratios to the first of `works`, in at most this many seconds."""
        for _ in range(2):  # the first time of everything takes longer
            started = time.monotonic()
            for work in works.values():
                work(self.clock)
            a_round = time.monotonic() - started
        # `side_by_side` has a round more
        rounds = 2 if self.small else min(20, int(min(share, self.left()) / max(a_round, 1e-3)) - 1)
        if rounds < 2:
            self.add(part, case, note=f"no time: a round takes {a_round:.0f} s")
            return
        for name, ratios in side_by_side(works, rounds, self.clock).items():
            self.add(part, case, name, **summary(ratios), ratios=ratios)

    def timed(self, part: str, case: str, what: str, work: Callable) -> Any:
        """A row with the seconds of one thing and the most memory of the device meanwhile; what it returns."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = self.clock()
        result = work()
        seconds = self.clock() - start
        memory = {"GB": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {}
        self.add(part, case, what, seconds=seconds, **memory)
        return result


# ----------------------------------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------------------------------


def end_to_end(bench: Bench) -> None:
    part, length, steps = "end to end", 32 if bench.small else 512, 6 if bench.small else 60
    rows = [{"input_ids": row, "labels": row} for row in bench.ids(8 * steps + 16, length).cpu()]
    config = EASConfig(num_skip=len(bench.skip), task_type="CAUSAL_LM")
    model = bench.timed(part, "", "adapters attached", lambda: get_peft_model(copy.deepcopy(bench.base), config))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=bench.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        callbacks = [EASCallback(rows[-16:])]
        trainer = Trainer(
            model, arguments, train_dataset=rows[:-16], data_collator=default_data_collator, callbacks=callbacks
        )
        bench.timed(part, f"{steps} steps of 8 x {length}", "trained, with a search", trainer.train)
        model, ids = model.eval(), bench.ids(1, length)
        with torch.inference_mode():
            before = model(ids).logits.float()
        merged = bench.timed(part, "", "merged, looking for NaN", lambda: model.merge_and_unload(safe_merge=True))
        with torch.inference_mode():
            moved = (merged(ids).logits.float() - before).abs().max() / before.abs().max()
        bench.add(part, "", "merging moved logits by", note=f"{float(moved):.1e} of the largest, in {merged.dtype}")
        bench.timed(part, "", "saved", lambda: merged.save_pretrained(f"{scratch}/merged"))
        bench.timed(part, "", "loaded", lambda: type(merged).from_pretrained(f"{scratch}/merged", dtype="auto"))


def sizes(bench: Bench) -> Iterator[tuple[int, int]]:
    for tokens in (16, 32) if bench.small else (512, 2048, 8192):
        for rows in (1, 2) if bench.small else (1, 32):
            yield rows, tokens


def inference(bench: Bench) -> None:
    base, skip, steps = bench.base, bench.skip, 4 if bench.small else 16
    models = {
        "base": base,
        "control": copy.deepcopy(base),
        "EAS, not merged": adapt(base, skip, "none", stand_in="linear"),
        "EAS, merged": merge(base, skip, "none", stand_in="linear"),
        "EAS, merged, constants": merge(base, skip, "none"),
    }
    kinds = ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
    if len(kinds) == 1:
        bench.add("inference", note="flash_attn is not installed: sdpa alone, which has kernels of its own for it")
    for kind in kinds:
        for model in models.values():
            getattr(model, "base_model", model).set_attn_implementation(kind)
        for rows, tokens in sizes(bench):
            ids, case = bench.ids(rows, tokens), f"{rows} x {tokens}, {kind}"
            bench.compare("prefill", case, {name: prefill(model, ids) for name, model in models.items()}, 12)
            caches = {name: filled(model, ids) for name, model in models.items()}
            works = {name: decode(model, ids, steps, caches[name]) for name, model in models.items()}
            bench.compare(f"decode {steps}", case, works, 12)
            del caches, works
            free()
    for model in models.values():
        getattr(model, "base_model", model).set_attn_implementation("sdpa")


def training(bench: Bench) -> None:
    configs: dict[str, Any] = {
        name: LoraConfig(r=8, target_modules=where, task_type="CAUSAL_LM") for name, where in LORAS.items()
    }
    configs |= {"control": configs["LoRA"], "EAS": EASConfig(skip_layers=bench.skip, task_type="CAUSAL_LM")}
    rows, tokens = (2, 32) if bench.small else (8, 512)
    compare_training(bench, "training step", bench.base, configs, rows, tokens)


def compare_training(
    bench: Bench, part: str, base: PreTrainedModel, configs: dict[str, Any], rows: int, tokens: int
) -> None:
    ids, works = bench.ids(rows, tokens), {}
    for name, config in configs.items():
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def work(clock: Callable[[], float], model=model, optimizer=optimizer) -> float:
            start = clock()
            train_step(model, optimizer, ids, ids)
            return clock() - start

        bench.timed(part, f"{rows} x {tokens}", f"first step: {name}", lambda work=work: work(bench.clock))
        works[name] = work
    bench.compare(part, f"{rows} x {tokens}, to {next(iter(works))}", works, 40)


def compiled(bench: Bench) -> None:
    steps = 4 if bench.small else 32
    models = {"base": bench.base, "EAS, merged": merge(bench.base, bench.skip, "none", stand_in="linear")}
    for rows, tokens in ((1, 32),) if bench.small else ((1, 512), (32, 2048)):
        ids, works = bench.ids(rows, tokens), {}
        for name, model in models.items():
            call = model.get_compiled_call(CompileConfig(mode="reduce-overhead"))
            cache = filled(model, ids, StaticCache(config=model.config, max_cache_len=tokens + steps))
            works[name] = decode(call, ids, steps, cache)
        bench.compare(f"decode {steps}, compiled", f"{rows} x {tokens}, static cache", works, 20)
        torch.compiler.reset()
        free()


def quantised(bench: Bench) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        bench.add("bitsandbytes", note="is not installed")
        return
    with tempfile.TemporaryDirectory() as scratch:
        bench.base.save_pretrained(scratch)
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )

        def load() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(
                scratch, quantization_config=settings, device_map={"": bench.device}, dtype=torch.bfloat16
            )

        base = bench.timed("bitsandbytes", "4 bits", "loaded", load)
        configs = {
            "LoRA, all linears": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            "EAS": EASConfig(skip_layers=bench.skip, task_type="CAUSAL_LM"),
        }
        rows, tokens = (2, 32) if bench.small else (8, 512)
        compare_training(bench, "training step, 4 bits", base, configs, rows, tokens)
        adapted = get_peft_model(base, configs["EAS"])
        bench.timed("bitsandbytes", "4 bits", "merged", lambda: adapted.merge_and_unload(safe_merge=True))


PARTS = (end_to_end, inference, training, compiled, quantised)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the Hub, or a folder (default: random weights)")
    parser.add_argument("--small", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which the process ends (default: 8.5)")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS], nargs="+")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; --small: none)")
    args = parser.parse_args()
    if args.out is None and not args.small:
        args.out = Path(__file__).parent / "results"

    def stop() -> None:
        print(f"{args.minutes} minutes are over: what is not done is left out.", flush=True)
        os._exit(0)

    timer = threading.Timer(60 * args.minutes, stop)
    timer.daemon = True
    timer.start()
    torch.manual_seed(0)
    bench = Bench(args)
    if bench.device.type == "cpu":
        torch.set_num_threads(1)
    for part in PARTS:
        if args.only and part.__name__ not in args.only:
            continue
        if bench.left() <= 0:
            bench.add(part.__name__, note="no time")
            continue
        try:
            part(bench)
        except Exception as error:  # the others are to run all the same, and a GPU is not there a second time
            bench.add(
                part.__name__, note=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
        free()
    bench.add("all", seconds=time.monotonic() - bench.start)


if __name__ == "__main__":
    main()
