"""What the benchmarks share: models, counts of work from shapes, timing side by side, tables and pictures."""

from __future__ import annotations

import copy
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from peft_eas import EASConfig
from peft_eas.runtime.eas_attention import StandIn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

TOLERANCE = 0.03
"""How far a ratio to the base model may be from the bound before it needs an explanation."""

# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def load_base(random_weights: bool = False) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in float32, or a model of its shape with random weights."""
    if not random_weights:
        from real_data import load_model

        return load_model().eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` indices, evenly spread: which attentions go makes no difference to speed."""
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def adapt(
    base: PreTrainedModel, skip: list[int], propagation: str, use_bias: bool = True, stand_in: str = "mean"
) -> PeftModel:
    """A copy of `base` with adapters, which are drawn at random, as fresh ones would fold to nothing."""
    config = EASConfig(
        skip_layers=skip, stand_in=stand_in, propagation=propagation, use_bias=use_bias, init_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(base), config).eval()


def merge(
    base: PreTrainedModel, skip: list[int], propagation: str, use_bias: bool = True, stand_in: str = "mean"
) -> PreTrainedModel:
    """A merged copy of `base`."""
    return adapt(base, skip, propagation, use_bias, stand_in).merge_and_unload().eval()


class HandStrippedLayer(nn.Module):
    """A Llama decoder layer whose attention someone has deleted from the source code."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(self, x: torch.Tensor, **_) -> torch.Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


def strip_by_hand(merged: PreTrainedModel, config: LlamaConfig, skip: list[int]) -> LlamaForCausalLM:
    """The least that computes what `merged` computes: stock Llama code and plain linears, over the very same weights.

    Args:
        merged: The model to rebuild, with `propagation="none"` and stand-ins that are constants of zero.
        config: The base model's configuration.
        skip: Layers without attention.
    """
    hand = LlamaForCausalLM(config).eval()
    retained = [layer for i, layer in enumerate(hand.model.layers) if i not in skip]
    for slot, layer in enumerate(retained):
        layer.self_attn.layer_idx = slot
    for i in skip:
        hand.model.layers[i] = HandStrippedLayer(hand.model.layers[i])
    state = merged.state_dict()
    for name, module in hand.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.bias" in state:
            module.bias = nn.Parameter(torch.empty(module.out_features))
    missing = hand.load_state_dict(state, strict=False, assign=True).missing_keys
    assert not missing, missing
    return hand


# ----------------------------------------------------------------------------------------------------------------------
# Counts of work, exact from the shapes
# ----------------------------------------------------------------------------------------------------------------------


def prefill_flops(config: LlamaConfig, retained: int, tokens: int) -> int:
    """Operations of the matrix products in the prefill of one row; logits of the last token only, as `generate` does.

    Attention is causal: token `i` attends to `i` tokens. Norms, rotations, softmax and biases are not counted.
    """
    d, head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    projections = 2 * tokens * d * (2 * q + 2 * kv)
    scores_and_values = 2 * 2 * q * (tokens * (tokens + 1) // 2)
    ffn = 2 * tokens * 3 * d * config.intermediate_size
    return retained * (projections + scores_and_values) + config.num_hidden_layers * ffn + 2 * d * config.vocab_size


def decode_bytes(model: PreTrainedModel, config: LlamaConfig, retained: int, cached: float, rows: int = 1) -> float:
    """Bytes read to decode one token of each of `rows` rows: each weight once, and keys and values of `cached` tokens.

    Of the embedding one row is read; but here it is tied to the head, which is read as a whole.
    """
    assert config.tie_word_embeddings
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    width = 2 * config.num_key_value_heads * config.head_dim
    left = sum(m.mean_down.shape[0] for m in model.modules() if isinstance(m, StandIn) and m.mean_down is not None)
    return weights + rows * cached * (retained * width + left) * model.dtype.itemsize


def kv_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that `cache` really holds."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Work = Callable[[Callable[[], float]], float]
"""Does one piece of work with the clock it is given, and returns how long the part that counts took."""


def synchronised(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """`clock`, read when `device` has done all that it was given to do."""
    wait = torch.get_device_module(device).synchronize  # the CPU's does nothing

    def read() -> float:
        wait()
        return clock()

    return read


def prefill(model: Callable, ids: torch.Tensor, cache: Cache | None = None) -> Work:
    """Work: read the prompt `ids` into a new KV cache, or into `cache`, emptied before."""

    def work(clock: Callable[[], float]) -> float:
        with torch.inference_mode():
            if cache is not None:
                cache.reset()
            start = clock()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return clock() - start

    return work


def filled(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None = None) -> Cache:
    """The KV cache after the prefill of `ids`: `cache`, or a new one."""
    with torch.inference_mode():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def decode(model: Callable, ids: torch.Tensor, steps: int, cache: Cache) -> Work:
    """Work: decode `steps` tokens, one at a time, with `cache`, which has read `ids` and then forgets the `steps`."""

    def work(clock: Callable[[], float]) -> float:
        with torch.inference_mode():
            start = clock()
            for step in range(steps):
                model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            seconds = clock() - start
            for layer in cache.layers:
                if isinstance(layer, StaticLayer):
                    layer.cumulative_length.sub_(steps)
                else:
                    layer.crop(-steps)
        return seconds

    return work


def side_by_side(
    works: dict[str, Work], rounds: int, clock: Callable[[], float], warm_up: bool = True
) -> dict[str, list[float]]:
    """Ratios to the first work of `works`, one a round, for each of the others.

    In each round all works run once, in an order drawn anew, so that neither a machine that gets slower in the meantime
    nor what ran just before favours any of them. A round before the first warms up and is not counted; works of minutes
    may do without.
    """
    names, rng = list(works), random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in names[1:]}
    for round_ in range(-1 if warm_up else 0, rounds):
        seconds = {name: works[name](clock) for name in rng.sample(names, len(names))}
        if round_ >= 0:
            for name in ratios:
                ratios[name].append(seconds[name] / seconds[names[0]])
    return ratios


def summary(ratios: list[float]) -> dict:
    """Median and quartiles of paired ratios."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "rounds": len(ratios)}


def seconds_by_part(model: LlamaForCausalLM, work: Work, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds that one piece of work spends in attentions and FFNs (with their norms), in the head, and in the rest."""
    parts = {"attentions": [], "FFNs": [], "head": [model.lm_head]}
    for layer in model.model.layers:
        parts["attentions"] += [layer.input_layernorm, layer.self_attn]
        parts["FFNs"] += [layer.post_attention_layernorm, layer.mlp]
    spent = dict.fromkeys(parts, 0.0)
    handles = []
    for name, modules in parts.items():

        def enter(*_, name=name) -> None:
            spent[name] -= clock()

        def leave(*_, name=name) -> None:
            spent[name] += clock()

        for module in modules:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    seconds = work(clock)
    for handle in handles:
        handle.remove()
    return spent | {"rest": seconds - sum(spent.values())}


def shares_by_part(
    models: dict[str, LlamaForCausalLM], works: dict[str, Work], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """For each model, the seconds of its parts as shares of the first model's time: medians of rounds."""
    first, *_ = models
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        seconds = {name: seconds_by_part(model, works[name], clock) for name, model in models.items()}
        total = sum(seconds[first].values())
        for name, parts in seconds.items():
            found[name].append({part: value / total for part, value in parts.items()})
    return {
        name: {part: statistics.median(shares[part] for shares in runs) for part in runs[0]}
        for name, runs in found.items()
    }


def profile_table(model: PreTrainedModel, work: Work) -> str:
    """Where the time of one piece of work goes: the layers' parts (`part: ...`) and the operators."""
    base = getattr(model, "model", model)
    parts: dict[str, list[nn.Module]] = {"part: head": [model.lm_head], "part: final norm": [base.norm]}
    for layer in base.layers:
        for name, module in layer.named_children():
            parts.setdefault(f"part: {name}", []).append(module)
    handles = []
    for name, modules in parts.items():
        open_records: list = []

        def enter(*_, name=name, open_records=open_records) -> None:
            open_records.append(record_function(name))
            open_records[-1].__enter__()

        def leave(*_, open_records=open_records) -> None:
            open_records.pop().__exit__(None, None, None)

        for module in modules:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    work(time.perf_counter)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        work(time.perf_counter)
    for handle in handles:
        handle.remove()
    return prof.key_averages().table(sort_by="cpu_time_total", row_limit=30, max_name_column_width=60)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the tensors that `work` makes: the most at one time, and what is left while its result is kept.

    They are summed up from every allocation and release that the profiler sees: exact, and the same in each run, unlike
    a process's resident memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = work()
    del result
    held = peak = 0
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# ----------------------------------------------------------------------------------------------------------------------


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(columns: list[str], rows: list[dict]) -> str:
    """A Markdown table of the `columns` of `rows`."""
    lines = [columns, ["---"] * len(columns), *[[cell(row[c]) for c in columns] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: list[dict], labels: list[str], file: Path) -> None:
    """Measured ratios to the base model (`median`, `q1`, `q3`, `control`) next to `bound` and, if known, `by time`."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 0.36 * len(rows) + 2), layout="constrained")
    places = range(len(rows))[::-1]
    for y, row in zip(places, rows, strict=True):
        ax.fill_betweenx([y - 0.3, y + 0.3], row["bound"] - TOLERANCE, row["bound"] + TOLERANCE, color="0.88", lw=0)
        ax.plot([row["bound"]] * 2, [y - 0.3, y + 0.3], "k-", lw=2)
        if row["by time"] is not None:
            ax.plot([row["by time"]] * 2, [y - 0.3, y + 0.3], "C0--", lw=2)
        ax.plot(row["control"], y, "x", color="0.5", ms=6)
        ax.plot([row["q1"], row["q3"]], [y, y], "k-", lw=1)
        ax.plot(row["median"], y, "ko", mfc="white", ms=7)
    ax.plot([], [], "k-", lw=2, label="bound by saved operations (prefill) or bytes (decode)")
    ax.fill_between([], [], [], color="0.88", label="3 points around the bound")
    ax.plot([], [], "C0--", lw=2, label="by the skipped attentions' share of the base model's time")
    ax.plot([], [], "ko-", lw=1, mfc="white", ms=7, label="measured: median and quartiles")
    ax.plot([], [], "x", color="0.5", ms=6, label="a second copy of the base model")
    ax.axvline(1, color="k", ls=":", lw=1)
    ax.margins(y=0.02)
    ax.set_yticks(places, labels)
    ax.set_xlabel("time of the merged model / time of its base model")
    fig.legend(loc="outside upper center", ncols=1, fontsize=9, frameon=False)
    fig.savefig(file, dpi=150)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = named[0] if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
