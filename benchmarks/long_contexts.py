"""How fast merged models are where contexts are long: 2k, 8k and 32k tokens, in transformers and in llama.cpp.

    python benchmarks/long_contexts.py                  what the results don't have yet
    python benchmarks/long_contexts.py --only compiled  engines whose name contains this
    python benchmarks/long_contexts.py --again          all of it, whatever there is

A narrow Llama with random weights, made on the spot, without 4 of its 10 attentions, against itself with all of them.
It is narrow so that one CPU thread can read 32k tokens, and spends its time there on attending, as wider ones do. Every
ratio is the median of paired ratios, one a round: in a round, everything that is compared runs once, in turn; the
`control` is a second copy of the base model. A case is written to `benchmarks/results/long.*` as soon as it is
measured, and left alone by later runs. What is attended to when decoding are keys and values drawn at random: their
numbers make no difference to the time.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from engines import InLlamaCpp, InTransformers
from measure import (
    CLOCKS,
    Work,
    decode,
    decode_bytes,
    kv_bytes,
    machine,
    merge,
    prefill,
    prefill_flops,
    side_by_side,
    spread,
    summary,
    table,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.cache_utils import Cache

LAYERS, SKIPPED = 10, 4
ENGINES = {
    "sdpa": InTransformers(),
    "static cache": InTransformers(static=True),
    "compiled": InTransformers(static=True, compiled=True),
    "llama.cpp, float16": InLlamaCpp("float16", lambda: bytes_only()),
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        engine: A key of `ENGINES`.
        phase: `"prefill"` or `"decode"`.
        batch: Prompts at a time.
        tokens: Of each prompt.
        rounds: Paired measurements.
    """

    engine: str
    phase: str
    batch: int
    tokens: int
    rounds: int

    @property
    def key(self) -> list:
        return [self.engine, self.phase, self.batch, self.tokens]

    @property
    def is_long(self) -> bool:
        """Whether one piece of work takes so long that it needs no warming up."""
        return self.phase == "prefill" and self.batch * self.tokens >= 32768


CASES = [
    *(Case("sdpa", "decode", batch, tokens, 11) for batch in (1, 8) for tokens in (2048, 8192, 32768)),
    *(Case("static cache", "decode", batch, tokens, 11) for batch in (1, 8) for tokens in (2048, 8192, 32768)),
    *(Case("compiled", "decode", batch, tokens, 11) for batch in (1, 8) for tokens in (2048, 8192, 32768)),
    *(Case("sdpa", "prefill", 1, tokens, rounds) for tokens, rounds in ((2048, 11), (8192, 5), (32768, 3))),
    *(Case("sdpa", "prefill", 8, tokens, rounds) for tokens, rounds in ((2048, 5),)),
    *(Case("static cache", "prefill", 1, tokens, rounds) for tokens, rounds in ((2048, 7), (8192, 3))),
    *(Case("llama.cpp, float16", phase, 1, tokens, 7) for tokens in (2048, 8192) for phase in ("prefill", "decode")),
]
LEFT_OUT = """\
Left out: prefills of 8 x 8192 and 8 x 32768 tokens, which are eight times the work of one, row by row, and take that
long; prefills of 32768 tokens into a static cache, where transformers makes a mask of 32768 x 32776, 4 GB in float32;
compiled prefills, whose attention is the same kernel; llama.cpp with 32768 tokens and with more than one prompt, for
time."""

# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def narrow() -> LlamaForCausalLM:
    """A Llama with random weights: two queries' heads that share keys and values."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def bytes_only() -> PreTrainedTokenizerFast:
    """A tokenizer that knows 256 bytes and two spaces, as llama.cpp refuses one without any merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    vocab = {piece: i for i, piece in enumerate([*alphabet, 2 * space])}
    raw = Tokenizer(models.BPE(vocab, [(space, space)]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def attending(model: PreTrainedModel) -> list[int]:
    """Layers that have an attention."""
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "q_proj")]


def make_models() -> dict[str, PreTrainedModel]:
    base = narrow()
    merged = merge(base, spread(SKIPPED, LAYERS), "none", use_bias=False)
    assert len(attending(merged)) == LAYERS - SKIPPED
    return {"base": base, "merged": merged, "control": copy.deepcopy(base)}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def drawn(model: PreTrainedModel, batch: int, tokens: int, static: int | None) -> Cache:
    """A KV cache of `tokens` that a model might have read, in no time.

    Args:
        model: Whose cache it is.
        batch: Prompts.
        tokens: Of each.
        static: Tokens that there is place for, of a static cache.
    """
    config = model.config
    cache = DynamicCache(config=config) if static is None else StaticCache(config=config, max_cache_len=static)
    with torch.inference_mode():
        for i in attending(model):
            sizes = batch, config.num_key_value_heads, tokens, config.head_dim
            cache.update(torch.randn(sizes), torch.randn(sizes), i)
    return cache


def start(case: Case, model: PreTrainedModel, steps: int, folder: Path) -> tuple[Work, float, int]:
    """The work of a model in `case`, the bytes that a decoded token reads, and those of the KV cache."""
    engine, ids = ENGINES[case.engine], torch.randint(model.config.vocab_size, (case.batch, case.tokens))
    if isinstance(engine, InLlamaCpp):
        running = engine.start(model, ids, 8 * steps, folder)  # of which each takes a millisecond
        return running.works[case.phase], running.decode_bytes, running.kv_bytes
    model.set_attn_implementation(engine.attention)
    call = model.get_compiled_call(CompileConfig()) if engine.compiled else model
    room = case.tokens + steps if engine.static else None
    cached = case.tokens + (steps if engine.static else (steps + 1) / 2)
    read = decode_bytes(model, model.config, len(attending(model)), cached, case.batch)
    if case.phase == "prefill":
        cache = StaticCache(config=model.config, max_cache_len=room) if room else None
        kv = kv_bytes(drawn(model, case.batch, case.tokens, room))
        return prefill(call, ids, cache), read, kv
    cache = drawn(model, case.batch, case.tokens, room)
    return decode(call, ids, steps, cache), read, kv_bytes(cache)


def measure(case: Case, models: dict[str, PreTrainedModel], args: argparse.Namespace) -> dict:
    """The row of `case`."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    engine = ENGINES[case.engine]
    with tempfile.TemporaryDirectory() as folder:
        running = {name: start(case, model, args.steps, Path(folder) / name) for name, model in models.items()}
        works = {name: work for name, (work, *_) in running.items()}
        ratios = side_by_side(works, case.rounds, CLOCKS[args.clock], warm_up=not case.is_long)
    kv = [running[name][2] for name in ("base", "merged")]
    if case.phase == "prefill":
        config = models["base"].config
        amounts = [prefill_flops(config, retained, case.tokens) for retained in (LAYERS, LAYERS - SKIPPED)]
    else:
        amounts = [running[name][1] for name in ("base", "merged")]
    return {
        "engine": case.engine,
        "phase": case.phase,
        "batch": case.batch,
        "tokens": case.tokens,
        **summary(ratios["merged"]),
        "bound": amounts[1] / amounts[0],
        "control": summary(ratios["control"])["median"],
        "KV MB, base": kv[0] / 1e6,
        "KV": kv[1] / kv[0],
        "ratios": ratios,
        "clock": args.clock,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/long_contexts.py", *sys.argv[1:]]),
        "machine": machine() | {package: importlib.metadata.version(package) for package in engine.packages},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------

COLUMNS = [
    "engine", "phase", "batch", "tokens", "median", "q1", "q3", "rounds", "bound", "control", "KV MB, base", "KV",
]  # fmt: skip
NOTE = f"""\
Time of the merged model as a ratio to its base model's: medians and quartiles (q1, q3) of paired rounds. The bound is
the ratio of the operations of the matrix products (prefill), or of the bytes of the weights, keys and values that are
read for a token (decode). Of the attentions {LAYERS - SKIPPED} of {LAYERS} are left, which is where both bounds go as
contexts grow, and what is left of the KV cache. 'Control': a second copy of the base model. A Llama of random weights,
{LAYERS} layers, width 128, FFNs of 384, two heads of 32 over one of keys and values, 257 tokens; float32, and where
llama.cpp runs, float16."""


def markdown(rows: list[dict]) -> str:
    lines = [
        f"# Long contexts: merged against base ({SKIPPED} of {LAYERS} attentions skipped)",
        "![Ratios by length, with the bounds](long.png)",
        table(COLUMNS, rows),
        NOTE,
        LEFT_OUT,
        "## How it was measured",
    ]
    runs: dict[str, list[str]] = {}
    for row in rows:
        about = "; ".join(f"{key}: {value}" for key, value in row["machine"].items())
        how = f"{row['date']}, `{row['command']}`, {row['clock']} clock; {about}"
        runs.setdefault(how, []).append(f"{row['engine']} {row['phase']} {row['batch']} x {row['tokens']}")
    lines += [f"- {how}: {len(cases)} rows, from {cases[0]}" for how, cases in runs.items()]
    return "\n\n".join(lines) + "\n"


def draw(rows: list[dict], file: Path) -> None:
    """Ratios by length, one line an engine and batch, next to the bound."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        lines: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["phase"] == phase:
                lines.setdefault((row["engine"], row["batch"]), []).append(row)
        for n, ((engine, batch), found) in enumerate(lines.items()):
            found = sorted(found, key=lambda row: row["tokens"])
            colour = f"C{list(ENGINES).index(engine)}"
            x = [row["tokens"] / 1024 * 1.03 ** (n - len(lines) / 2) for row in found]  # side by side
            y = [row["median"] for row in found]
            spread_ = [[row["median"] - row["q1"] for row in found], [row["q3"] - row["median"] for row in found]]
            label = f"{engine}{f', {batch} prompts' * (batch > 1)}"
            ax.errorbar(x, y, spread_, color=colour, marker="o" if batch == 1 else "s", ms=4, lw=1, label=label)
            ax.plot(x, [row["bound"] for row in found], color=colour, ls=":" if batch == 1 else "--", lw=1)
        ax.axhline(1, color="k", lw=0.8)
        ax.axhline(1 - SKIPPED / LAYERS, color="0.6", lw=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks([2, 8, 32], ["2k", "8k", "32k"])
        ax.set_xlabel("tokens of the context")
        ax.set_title(f"{phase} (dotted, dashed: bounds)", fontsize=10)
        if lines:
            ax.legend(fontsize=7, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    axes[0].set_ylabel("time, merged / base")
    axes[0].set_ylim(0.5, 1.05)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def write(rows: list[dict], folder: Path) -> None:
    """JSON, table and picture; first to names of their own, so that a run that is stopped leaves what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "long.json.part"
    scratch.write_text(json.dumps(rows, indent=1) + "\n")
    scratch.replace(folder / "long.json")
    (folder / "long.md").write_text(markdown(rows))
    draw(rows, folder / "long.png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help=f"engines whose name contains this: {list(ENGINES)}")
    parser.add_argument("--tokens", type=int, help="only contexts of at most so many")
    parser.add_argument("--steps", type=int, default=8, help="tokens that one measurement decodes (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default: 1, the steadiest)")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="default: cpu, the process's own")
    parser.add_argument("--again", action="store_true", help="measure what the results have, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args(argv)


def wanted(args: argparse.Namespace, known: list[dict]) -> Iterator[Case]:
    """The cases that are asked for and not yet among the rows."""
    have = [[row[key] for key in ("engine", "phase", "batch", "tokens")] for row in known]
    for case in CASES:
        is_asked_for = args.only in case.engine and case.tokens <= (args.tokens or case.tokens)
        if is_asked_for and (args.again or case.key not in have):
            yield case


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    file = args.out / "long.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    models = make_models()
    for case in list(wanted(args, rows)):
        row = measure(case, models, args)
        print(table(COLUMNS, [row]).splitlines()[-1], flush=True)
        found = {tuple(row[key] for key in ("engine", "phase", "batch", "tokens")): row for row in [*rows, row]}
        rows = [found[tuple(case.key)] for case in CASES if tuple(case.key) in found]
        write(rows, args.out)
        gc.collect()


if __name__ == "__main__":
    main()
