"""How fast merged models are where they run: in transformers (plain, static cache, compiled), and in llama.cpp.

    python benchmarks/engines.py                    every engine, on the CPU
    python benchmarks/engines.py --only llama       engines whose name contains this
    python benchmarks/engines.py --profile          also where the time goes, in the base model and the merged one
    python benchmarks/engines.py --device cuda      on a GPU: bfloat16, 1 and 32 prompts of 512 to 8192 tokens

SmolLM2-135M without 8 of its 30 attentions against itself with all of them. Every ratio is the median of paired ratios,
one a round: in a round, everything that is compared runs once, in turn. The `control` is a second copy of the base
model: how far it is from 1 says what a ratio can resolve. Compiling, loading and converting are not counted. The
results go to `benchmarks/results/engines.*` (JSON, tables, a picture) as soon as an engine is done, and replace what
was there of this engine; those of a GPU to `engines-cuda.*`; with `--quick`, nowhere.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import (
    CLOCKS,
    TOLERANCE,
    Work,
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
    shares_by_part,
    side_by_side,
    spread,
    summary,
    synchronised,
    table,
)
from transformers import CompileConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

import peft_eas

SKIPPED = 8
PROFILE_ROUNDS = 3
"""Of the profile alone."""
PARTS = ("attentions", "FFNs", "head", "rest")

# ----------------------------------------------------------------------------------------------------------------------
# Engines
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A model in an engine, ready to be timed with one prompt.

    Attributes:
        works: `{"prefill": ..., "decode": ...}`: reads the prompt; decodes some tokens after it.
        decode_bytes: Bytes read to decode one token (of each row): weights, keys and values.
        kv_bytes: Bytes of the KV cache.
    """

    works: dict[str, Work]
    decode_bytes: float
    kv_bytes: int


@dataclass(frozen=True)
class InTransformers:
    """transformers, called as `generate` calls it.

    Attributes:
        attention: `attn_implementation`.
        static: Whether the KV cache is a static one, as with `cache_implementation="static"`.
        compiled: Whether the model is compiled, as `generate` does it on a GPU with a static cache; its prefill, too.
    """

    attention: str = "sdpa"
    static: bool = False
    compiled: bool = False

    devices = None  # all
    merged = ("none", "mean")
    packages = ()

    def start(self, model: PreTrainedModel, ids: torch.Tensor, steps: int, folder: Path) -> Running:
        model.set_attn_implementation(self.attention)
        rows, tokens = ids.shape
        retained = sum(hasattr(layer.self_attn, "q_proj") for layer in model.model.layers)
        call = model.get_compiled_call(CompileConfig()) if self.compiled else model
        static = StaticCache(config=model.config, max_cache_len=tokens + steps) if self.static else None
        cache = filled(model, ids, static)
        # a static cache is read as a whole; another up to the token itself, on average over the steps
        cached = tokens + (steps if self.static else (steps + 1) / 2)
        return Running(
            {"prefill": prefill(call, ids, static), "decode": decode(call, ids, steps, cache)},
            decode_bytes(model, model.config, retained, cached, rows),
            kv_bytes(cache),
        )


@dataclass(frozen=True)
class InLlamaCpp:
    """llama.cpp with its default settings, in this process, on a GGUF file that `peft_eas.export` writes.

    Attributes:
        dtype: Of the file's matrices. Keys and values are float16.
        tokenizer: Loads the model's tokenizer. `None`: SmolLM2's.
    """

    dtype: str
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None

    devices = ("cpu",)  # what the wheel is built for
    merged = ("none",)  # nothing else fits in the file
    packages = ("xllamacpp", "gguf")

    def start(self, model: PreTrainedModel, ids: torch.Tensor, steps: int, folder: Path) -> Running:
        import gguf
        import xllamacpp
        from real_data import load_tokenizer

        (prompt,) = ids.tolist()
        tokenizer = (self.tokenizer or load_tokenizer)()
        peft_eas.export(model, folder, "gguf", tokenizer=tokenizer, dtype=self.dtype)
        file = str(folder / "model.gguf")
        params = xllamacpp.CommonParams()
        params.model.path, params.port, params.verbosity, params.n_parallel = file, 0, -1, 1
        params.n_ctx = len(prompt) + steps + 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        server = xllamacpp.Server(params)

        def complete(n_predict: int, cache_prompt: bool) -> dict:
            request = dict(
                prompt=prompt, n_predict=n_predict, cache_prompt=cache_prompt, temperature=0, ignore_eos=True
            )
            return server.handle_completions(request)["timings"]

        def read(clock: Callable[[], float]) -> float:
            start = clock()
            done = complete(1, cache_prompt=False)
            seconds = clock() - start
            assert done["prompt_n"] == len(prompt), done
            return seconds

        def write(clock: Callable[[], float]) -> float:
            complete(1, cache_prompt=True)
            start = clock()
            done = complete(steps, cache_prompt=True)  # the first step reads the prompt's last token once more
            seconds = clock() - start
            assert (done["prompt_n"], done["predicted_n"]) == (1, steps), done
            return seconds

        reader = gguf.GGUFReader(file)
        heads = sum(reader.get_field("deci.attention.head_count_kv").contents())
        kv_bytes_per_token = 2 * heads * model.config.head_dim * 2
        weights = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        cached = len(prompt) + (steps - 1) / 2
        return Running(
            {"prefill": read, "decode": write},
            weights + cached * kv_bytes_per_token,
            len(prompt) * kv_bytes_per_token,
        )


ENGINES: dict[str, InTransformers | InLlamaCpp] = {
    "transformers": InTransformers(),
    "transformers, eager attention": InTransformers(attention="eager"),
    "transformers, static cache": InTransformers(static=True),
    "transformers, compiled": InTransformers(static=True, compiled=True),
    "llama.cpp, float16": InLlamaCpp("float16"),
    "llama.cpp, q8_0": InLlamaCpp("q8_0"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def one_layer(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """`base` without its layers, but for the first."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 1
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def make_models(base: LlamaForCausalLM, profile: bool) -> dict[str, PreTrainedModel]:
    """The models to compare, by name; the last two, only for a profile, tell what the base model's parts cost."""
    layers = base.config.num_hidden_layers
    skip = spread(SKIPPED, layers)
    models = {
        "base": base,
        "control": copy.deepcopy(base),
        "none": merge(base, skip, "none", use_bias=False),
        "mean": merge(base, skip, "mean"),
    }
    if profile:
        models["first attention"] = merge(base, list(range(1, layers)), "none", use_bias=False)
        models["first layer"] = one_layer(base)
    return models


# ----------------------------------------------------------------------------------------------------------------------
# Shares of time
# ----------------------------------------------------------------------------------------------------------------------


def shares_by_removal(first_attention: float, first_layer: float, layers: int) -> dict[str, float | None]:
    """The parts' shares of a model's time, from what is left of it where parts are gone.

    Args:
        first_attention: Time of the model with no attention but the first, as a ratio to the whole model's.
        first_layer: Time of the model with no layer but the first, likewise.
        layers: Layers of the whole model.
    """
    attentions, both = ((1 - left) * layers / (layers - 1) for left in (first_attention, first_layer))
    return {"attentions": attentions, "FFNs": both - attentions, "head": None, "rest": 1 - both}


def by_time(attentions: float, skipped: int, layers: int) -> float:
    """Time that is left without `skipped` of `layers` attentions, which take the share `attentions` together."""
    return 1 - attentions * skipped / layers


def profile_rows(
    engine: str, phase: str, case: str, models: dict, running: dict[str, Running], clock: Callable[[], float]
) -> list[dict]:
    """Shares of the base model's time: of its own parts first, and of the merged model's, where they can be told apart.

    Uncompiled, transformers runs module by module, and each is timed. Elsewhere, it is seen what is left without them.
    """
    works = {name: running[name].works[phase] for name in running}
    about = {"engine": engine, "case": case}
    if "first layer" in running:
        left = side_by_side({n: works[n] for n in ("base", "first attention", "first layer")}, PROFILE_ROUNDS, clock)
        medians = (summary(left[name])["median"] for name in ("first attention", "first layer"))
        shares = shares_by_removal(*medians, layers=models["base"].config.num_hidden_layers)
        return [about | {"model": "base", **shares, "sum": 1.0, "found by": "removal"}]
    chosen = {name: models[name] for name in ("base", "none")}
    found = shares_by_part(chosen, works, PROFILE_ROUNDS, clock)
    return [
        about | {"model": name, **shares, "sum": sum(shares.values()), "found by": "modules"}
        for name, shares in found.items()
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def row_of(ratios: list[float], control: list[float], bound: float, time: float | None) -> dict:
    """What is said of one merged model in one case."""
    measured = summary(ratios)
    off = measured["median"] - bound
    return {
        **measured,
        "bound": bound,
        "points off": 100 * off,
        "within": abs(off) <= TOLERANCE,
        "by time": time,
        "control": summary(control)["median"],
        "ratios": ratios,
        "control ratios": control,
    }


def compare(name: str, models: dict, ids: torch.Tensor, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Rows and profile of one engine with one prompt."""
    engine, config, (batch, tokens) = ENGINES[name], models["base"].config, ids.shape
    layers, clock = config.num_hidden_layers, synchronised(CLOCKS[args.clock], args.device)
    wanted = ["base", "control", *engine.merged]
    if args.profile and not _runs_module_by_module(engine):
        wanted += ["first attention", "first layer"]
    torch._dynamo.reset()  # or graphs of another size would count towards the limit of recompilations
    rows, profile = [], []
    with tempfile.TemporaryDirectory() as folder:
        running = {key: engine.start(models[key], ids, args.steps, Path(folder) / key) for key in wanted}
        for phase, preposition in (("prefill", "of"), ("decode", "after")):
            case = f"{phase} {preposition} {f'{batch} x ' * (batch > 1)}{tokens}"
            works = {key: running[key].works[phase] for key in ("base", "control", *engine.merged)}
            ratios = side_by_side(works, args.rounds, clock)
            time = None
            if args.profile:
                shares = profile_rows(name, phase, case, models, running, clock)
                time = by_time(shares[0]["attentions"], SKIPPED, layers)
                profile += shares
            for key in engine.merged:
                kv = [running[key].kv_bytes, running["base"].kv_bytes]
                assert key == "mean" or kv[0] * layers == kv[1] * (layers - SKIPPED), kv
                if phase == "prefill":
                    bound = prefill_flops(config, layers - SKIPPED, tokens) / prefill_flops(config, layers, tokens)
                else:
                    bound = running[key].decode_bytes / running["base"].decode_bytes
                rows.append(
                    {"engine": name, "case": case, "propagation": key}
                    | row_of(ratios[key], ratios["control"], bound, time)
                    | {"KV MB, base": kv[1] / 1e6, "KV MB, merged": kv[0] / 1e6, "KV": kv[0] / kv[1]}
                )
    return rows, profile


def _runs_module_by_module(engine: InTransformers | InLlamaCpp) -> bool:
    return isinstance(engine, InTransformers) and not engine.compiled


def measure_engine(name: str, models: dict, args: argparse.Namespace) -> dict:
    """All sizes in one engine, and how they were measured."""
    rows, profile, left_out = [], [], []
    for tokens in args.tokens:
        for batch in args.batch:
            size = f"{batch} x {tokens}"
            if batch > 1 and isinstance(ENGINES[name], InLlamaCpp):
                left_out.append(f"{size}: one prompt at a time")
                continue
            torch.manual_seed(0)
            ids = torch.randint(models["base"].config.vocab_size, (batch, tokens)).to(args.device)
            try:
                found = compare(name, models, ids, args)
            except torch.OutOfMemoryError:
                left_out.append(f"{size}: does not fit into the memory")
                continue
            rows += found[0]
            profile += found[1]
    return {
        "rows": rows,
        "profile": profile,
        "left out": left_out,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]]),
        "rounds": args.rounds,
        "steps": args.steps,
        "clock": args.clock,
        "dtype": str(args.dtype).removeprefix("torch."),
        "weights": "random" if args.random_weights else "pretrained",
        "machine": {
            "device": getattr(torch.get_device_module(args.device), "get_device_name", str)(args.device),
            **machine(),
            **{package: importlib.metadata.version(package) for package in ENGINES[name].packages},
        },
    }


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------

COLUMNS = [
    "engine", "case", "propagation", "median", "q1", "q3", "bound", "points off", "within", "by time", "control",
    "KV MB, base", "KV MB, merged", "KV",
]  # fmt: skip
PROFILE_COLUMNS = ["engine", "case", "model", *PARTS, "sum", "found by"]
NOTE = f"""\
Time of a merged model as a ratio to its base model's. `propagation="none"` is merged without biases, `"mean"` with
them. The bound is the ratio of the operations of the matrix products (prefill), or of the bytes of the
weights, keys and values that are read for a token (decode); 'within': at most {100 * TOLERANCE:.0f} points from it. 'By
time' is what to expect if the skipped attentions' share of the base model's time vanished, and nothing else changed."""
PROFILE_NOTE = """\
Shares of the base model's time. 'Modules': each module was timed (attentions and FFNs with their norms; the rest is
residual additions, embeddings, positions, masks and Python), and the merged model's (`propagation="none"`) stand below,
so that a row's sum is the ratio in these rounds. 'Removal', where modules can't be told apart: from the times of a
model without attentions and of one without layers, but for the first; the head is in the rest."""


def markdown(results: dict[str, dict]) -> str:
    """The tables of all engines, and how each was measured."""
    rows, profile = ([row for result in results.values() for row in result[key]] for key in ("rows", "profile"))
    lines = [f"# Engines: merged against base ({SKIPPED} of 30 attentions skipped)", table(COLUMNS, rows), NOTE]
    if profile:
        lines += ["## Where the time goes", table(PROFILE_COLUMNS, profile), PROFILE_NOTE]
    lines += ["## How it was measured", "Medians and quartiles (q1, q3) are those of paired ratios."]
    for name, result in results.items():
        about = "; ".join(f"{key}: {value}" for key, value in result["machine"].items())
        left_out = "".join(f"; left out: {what}" for what in result["left out"])
        lines.append(
            f"- {name}: {result['date']}, `{result['command']}`; {result['rounds']} rounds, {result['clock']} clock, "
            f"{result['weights']} weights, {result['steps']} tokens decoded at a time, {result['dtype']} in "
            f"transformers{left_out}; {about}"
        )
    return "\n\n".join(lines) + "\n"


def write(results: dict[str, dict], folder: Path, stem: str) -> None:
    """JSON, tables and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(results))
    rows = [row for result in results.values() for row in result["rows"]]
    labels = [f"{row['engine']}: {row['case']}, {row['propagation']}" for row in rows]
    draw(rows, labels, folder / f"{stem}.png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help=f"engines whose name contains this: {list(ENGINES)}")
    parser.add_argument("--quick", action="store_true", help="short inputs and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, help="paired measurements (default: 20, with --quick 2)")
    parser.add_argument("--steps", type=int, default=8, help="tokens that one measurement decodes (default: 8)")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the prompt (default: 512; on a GPU 512 2048 8192)")
    parser.add_argument("--batch", type=int, nargs="+", help="prompts at a time (default: 1; on a GPU 1 32)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="torch's name of it (default: cpu)")
    parser.add_argument("--dtype", help="in transformers (default: float32; on a GPU bfloat16)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default: 1, the steadiest)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="'cpu' counts the process's own time: for a busy machine, with one thread (default: wall)",
    )
    parser.add_argument("--random-weights", action="store_true", help="a model of the same shape, without a download")
    parser.add_argument("--profile", action="store_true", help="also find where the time goes")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results; --quick: none)")
    args = parser.parse_args(argv)
    on_cpu = args.device.type == "cpu"
    if args.clock == "cpu" and not on_cpu:
        parser.error("--clock cpu does not see what a GPU does: use --clock wall")
    if not any(args.only in name for name in ENGINES):
        parser.error(f"--only {args.only!r}: no engine's name contains this; there are {', '.join(ENGINES)}")
    args.rounds = max(2, args.rounds or (2 if args.quick else 20))  # quartiles need two
    args.tokens = args.tokens or ([64] if args.quick else [512] if on_cpu else [512, 2048, 8192])
    args.batch = args.batch or ([1] if on_cpu else [1, 32])
    args.dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results"
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stem = "engines" if args.device.type == "cpu" else f"engines-{args.device.type}"
    file = args.out and args.out / f"{stem}.json"
    results = json.loads(file.read_text()) if file and file.exists() else {}
    models = {
        name: model.to(device=args.device, dtype=args.dtype)
        for name, model in make_models(load_base(args.random_weights), args.profile).items()
    }
    for name in ENGINES:
        if args.only not in name or (ENGINES[name].devices and args.device.type not in ENGINES[name].devices):
            continue
        result = measure_engine(name, models, args)
        print(markdown({name: result}), flush=True)
        results[name] = result
        if args.out:  # at once: what was measured stays, whatever becomes of the rest
            write({key: results[key] for key in ENGINES if key in results}, args.out, stem)


if __name__ == "__main__":
    main()
