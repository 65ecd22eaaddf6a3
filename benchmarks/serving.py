"""Tokens a second of vLLM under continuous load, merged against base, with the same memory for the KV cache.

    python benchmarks/serving.py --python path/to/python    an interpreter that has vLLM; it need not have peft_eas
    python benchmarks/serving.py --python ... --quick       few requests and rounds, and no results written

Requests of 256 to 768 tokens are all there from the start, each asks for 96 more, and as many run at once as the KV
cache has room for. A merged model keeps fewer keys and values of a token, so more requests run at once, and share what
a step costs whoever takes part: reading the weights, and the engine's own work. Models with random weights, made on the
spot, without 4 of their 10 attentions:

- a Llama, in vLLM's own code, merged with `stand_in="mean"` and written by `peft_eas.export(..., "nemotron-nas")`;
- a Qwen3 in vLLM's Transformers backend, merged with the default stand-ins and saved as it is.

Each model is in a process of its own, which waits while another works. In a round all of them run, in an order drawn
anew, on one thread; the `control` is the base model in one more process. The results go to
`benchmarks/results/serving.*`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, merge, spread, summary, table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import peft_eas

LAYERS, SKIPPED = 10, 4
SIZES = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""
KV_BYTES = 30 * BLOCK * LAYERS * 2 * 2 * 64 * 4
"""Of the KV cache, for every model: 30 blocks of the base model's, which are 50 of the merged one's."""
FEW = 4
"""Requests at once that there is room for in every model, to tell what more room brings from what else does."""

SERVER = """
import json, os, sys, time
from vllm import LLM, SamplingParams
folder, requests, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(folder, trust_remote_code=True, skip_tokenizer_init=True, enable_prefix_caching=False, **settings)
engine = llm.llm_engine
scheduler = engine.engine_core.engine_core.scheduler
kv = scheduler.kv_cache_config
preempted = 0
preempt = scheduler._preempt_request

def count(*args, **kwargs):
    global preempted
    preempted += 1
    return preempt(*args, **kwargs)

scheduler._preempt_request = count

most = scheduler.max_num_active_reqs

def load(requests, at_once):
    global preempted
    preempted, running, made = 0, [], 0
    scheduler.max_num_active_reqs = at_once or most
    for number, (ids, new) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine.add_request(f"{time.time()}-{number}", {"prompt_token_ids": ids}, params)
    wall, cpu = time.perf_counter(), time.process_time()
    while engine.has_unfinished_requests():
        for output in engine.step():
            made += len(output.outputs[0].token_ids) if output.finished else 0
        running.append(len(scheduler.running))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert made == sum(new for _, new in requests), made
    return dict(
        tokens=made, wall=wall, cpu=cpu, steps=len(running), most=max(running), mean=sum(running) / len(running),
        preempted=preempted,
    )

load(requests[:2], 0)
facts = dict(
    blocks=kv.num_blocks,
    kv_bytes=sum(tensor.size for tensor in kv.kv_cache_tensors),
    layers=sum(len(group.layer_names) for group in kv.kv_cache_groups),
)
print("ANSWER" + json.dumps(facts), flush=True)
for line in sys.stdin:
    print("ANSWER" + json.dumps(load(requests, int(line))), flush=True)
os._exit(0)
"""


class Served:
    """A model in vLLM, in a process of its own.

    Args:
        python: The interpreter.
        folder: The model's.
        requests: `(prompt, tokens to generate)` of each.
        settings: Of `vllm.LLM`.
    """

    def __init__(self, python: str, folder: Path, requests: list, settings: dict) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, "-c", SERVER, str(folder), json.dumps(requests), json.dumps(settings)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.facts = self.answer()

    def answer(self) -> dict:
        for line in self.process.stdout or ():
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        self.log.seek(0)
        raise RuntimeError(f"vLLM stopped:\n{self.log.read()[-3000:]}")

    def load(self, at_once: int = 0) -> dict:
        """Have it do all requests, `at_once` at a time, or as many as there is room for, and say how it went."""
        assert self.process.stdin is not None
        print(at_once, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def llama(folder: Path) -> dict:
    """Writes a Llama and what it is merged to; settings of vLLM for both."""
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    merged = merge(base, spread(SKIPPED, LAYERS), "none", stand_in="mean")
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft_eas.export(merged, folder / "merged", format="nemotron-nas")
    return {}


def qwen3(folder: Path) -> dict:
    """The same with a Qwen3, merged with the default stand-ins, in the Transformers backend."""
    base = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    merged: PreTrainedModel = merge(base, spread(SKIPPED, LAYERS), "none", stand_in="linear")
    base.save_pretrained(folder / "base")
    merged.save_pretrained(folder / "merged")
    return {"model_impl": "transformers"}


PAIRS: dict[str, Callable[[Path], dict]] = {
    "Llama, vLLM's own code (nemotron-nas)": llama,
    "Qwen3, Transformers backend": qwen3,
}


def draw_requests(count: int, new: int) -> list:
    rng = random.Random(0)
    return [([rng.randrange(4096) for _ in range(rng.randint(256, 768))], new) for _ in range(count)]


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """The row of one pair."""
    settings = PAIRS[name](folder) | {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 64,
        "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": KV_BYTES, "block_size": BLOCK,
    }  # fmt: skip
    requests = draw_requests(args.requests, args.new)
    folders = {"base": "base", "merged": "merged", "control": "base"}
    served = {key: Served(args.python, folder / where, requests, settings) for key, where in folders.items()}
    facts = {key: server.facts for key, server in served.items()}
    assert (facts["base"]["layers"], facts["merged"]["layers"]) == (LAYERS, LAYERS - SKIPPED), facts
    loads = {key: (key, 0) for key in served} | {f"{key}, few": (key, FEW) for key in ("base", "merged")}
    runs: dict[str, list[dict]] = {key: [] for key in loads}
    rng = random.Random(0)
    for _ in range(args.rounds):
        for key in rng.sample(list(loads), len(loads)):
            which, at_once = loads[key]
            runs[key].append(served[which].load(at_once))
            print(name, key, runs[key][-1], flush=True)
    for server in served.values():
        server.stop()

    def rates(key: str, clock: str) -> list[float]:
        return [run["tokens"] / run[clock] for run in runs[key]]

    def ratios(key: str, clock: str, to: str = "base") -> list[float]:
        return [a / b for a, b in zip(rates(key, clock), rates(to, clock), strict=True)]

    def middle(key: str, fact: str) -> float:
        return statistics.median(run[fact] for run in runs[key])

    return {
        "model": name,
        **summary(ratios("merged", args.clock)),
        "control": summary(ratios("control", args.clock))["median"],
        f"{FEW} at once": summary(ratios("merged, few", args.clock, "base, few"))["median"],
        "tokens/s": statistics.median(rates("base", args.clock)),
        "tokens/s, merged": statistics.median(rates("merged", args.clock)),
        "KV MB": facts["base"]["kv_bytes"] / 1e6,
        "KV MB, merged": facts["merged"]["kv_bytes"] / 1e6,
        "tokens that fit": facts["base"]["blocks"] * BLOCK,
        "merged: fit": facts["merged"]["blocks"] * BLOCK,
        "at once": middle("base", "mean"),
        "at once, merged": middle("merged", "mean"),
        "at once, most": int(middle("base", "most")),
        "most, merged": int(middle("merged", "most")),
        "steps": int(middle("base", "steps")),
        "steps, merged": int(middle("merged", "steps")),
        "preempted": int(middle("base", "preempted")),
        "preempted, merged": int(middle("merged", "preempted")),
        "runs": runs,
        "facts": facts,
    }


COLUMNS = [
    "model", "median", "q1", "q3", "rounds", "control", f"{FEW} at once", "tokens/s", "tokens/s, merged", "KV MB",
    "KV MB, merged",
]  # fmt: skip
MORE = [
    "model", "tokens that fit", "merged: fit", "at once", "at once, merged", "at once, most", "most, merged", "steps",
    "steps, merged", "preempted", "preempted, merged",
]  # fmt: skip

NOTE = """\
Tokens generated in a second, merged over base: medians and quartiles (q1, q3) of paired rounds by the {clock} clock
('cpu': the process's own time, for a machine that others use), and the medians of the rates. 'Control': the base model
in a process of its own. '{few} at once': the same with no more requests at once than fit in both, so that only work is
saved; the rest is what more room brings. {requests} requests of 256 to 768 tokens, all there from the start, {new}
tokens generated for each; 'at once': requests that run in a step, in the mean and at most. Random weights, {layers}
layers, width {width}, float32, no compilation, one thread; prefix caching off."""


def markdown(result: dict) -> str:
    about = "; ".join(f"{key}: {value}" for key, value in result["machine"].items())
    title = (
        f"vLLM under continuous load, with the same memory for the KV cache ({SKIPPED} of {LAYERS} attentions skipped)"
    )
    note = NOTE.format(**result, few=FEW, width=SIZES["hidden_size"], layers=LAYERS)
    tables = [table(columns, result["rows"]) for columns in (COLUMNS, MORE)]
    return "\n\n".join([f"# {title}", *tables, note, f"- {result['date']}, `{result['command']}`\n- {about}"]) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--only", default="", metavar="TEXT", help=f"models whose name contains this: {list(PAIRS)}")
    parser.add_argument("--quick", action="store_true", help="few requests and one round, to see that it runs")
    parser.add_argument("--rounds", type=int, help="paired measurements (default: 5)")
    parser.add_argument("--requests", type=int, help="in a round (default: 32)")
    parser.add_argument("--new", type=int, default=96, help="tokens to generate for each (default: 96)")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="of the ratios (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; --quick: none)")
    args = parser.parse_args(argv)
    args.rounds = max(2, args.rounds or (2 if args.quick else 5))  # quartiles need two
    args.requests = args.requests or (8 if args.quick else 32)
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results"
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    rows = []
    for name in PAIRS:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args, Path(folder)))
    versions = "import json, torch, transformers, vllm; print(json.dumps([vllm.__version__, transformers.__version__]))"
    found = subprocess.run([args.python, "-c", versions], capture_output=True, text=True, check=True).stdout
    vllm, transformers = json.loads(found.splitlines()[-1])
    shown = ["path/to/python" if arg == args.python else arg for arg in sys.argv[1:]]
    result = {
        "rows": rows,
        "machine": machine() | {"threads": 1, "vllm": vllm, "its transformers": transformers},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/serving.py", *shown]),
        "clock": args.clock,
        "requests": args.requests,
        "new": args.new,
    }
    text = markdown(result)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serving.md").write_text(text)
        (args.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
