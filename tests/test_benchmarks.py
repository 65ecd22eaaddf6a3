"""What the benchmarks compute from what they measure, and that measuring leaves things as they were."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import engines
import growth
import long_contexts
import longer
import measure
import planted
import serving

LAYERS, TOKENS = 10, 12


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_operations_are_those_that_torch_counts(base, ids):
    """Token by token, each one looks at those before it: what a causal prefill does, but for the logits."""
    merged = measure.merge(base, [2, 5, 7], "none", use_bias=False)
    for model, retained in ((base, LAYERS), (merged, LAYERS - 3)):
        model.set_attn_implementation("eager")
        cache = DynamicCache(config=model.config)
        with FlopCounterMode(display=False) as counter:
            for i in range(TOKENS):
                model(ids[:1, i : i + 1], past_key_values=cache, use_cache=True)
        angles = counter.get_flop_counts().get(f"{type(model).__name__}.model.rotary_emb", {})
        expected = counter.get_total_flops() - sum(angles.values()) - (TOKENS - 1) * 2 * 32 * 97
        assert measure.prefill_flops(base.config, retained, TOKENS) == expected


@pytest.mark.parametrize("propagation", ["none", "mean"])
def test_bytes_are_those_of_the_weights_and_of_the_real_cache(propagation, base, ids):
    merged = measure.merge(base, [2, 5, 7], propagation)
    cache = measure.filled(merged, ids)
    linears = [m for m in merged.model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    norms = [m for m in merged.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    weights = sum(p.numel() * 4 for module in linears + norms for p in module.parameters())
    weights += 3 * 32 * 4  # what stands in
    weights += 3 * 2 * 32 * 32 * 4 if propagation == "mean" else 0
    assert measure.decode_bytes(merged, base.config, LAYERS - 3, TOKENS, rows=2) == weights + measure.kv_bytes(cache)
    a_token = measure.kv_bytes(measure.filled(base, ids)) / 10 / TOKENS
    left = 3 * 2 * 32 * 4 if propagation == "mean" else 0  # two rows, of the rank's numbers
    assert measure.kv_bytes(cache) == (7 * a_token + left) * TOKENS


def test_a_model_stripped_by_hand_computes_what_the_merged_one_does(base, ids):
    merged = measure.merge(base, [2, 5, 7], "none")
    row = ids[:1]
    hand = measure.strip_by_hand(merged, base.config, [2, 5, 7])
    with torch.inference_mode():
        torch.testing.assert_close(hand(row).logits, merged(row).logits, rtol=1e-4, atol=1e-5)


def test_ratios_do_not_see_a_machine_that_gets_slower():
    pace = iter(range(1, 100))

    def work_of(factor):
        return lambda clock: factor * clock()

    works = {"base": work_of(2.0), "merged": work_of(1.5), "control": work_of(2.0)}
    seen = []

    def clock():  # the same for all works of a round
        seen.append(next(pace) if len(seen) % len(works) == 0 else seen[-1])
        return seen[-1]

    ratios = measure.side_by_side(works, 5, clock)
    assert ratios == {"merged": [0.75] * 5, "control": [1.0] * 5}
    assert measure.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


@pytest.mark.parametrize("propagation", ["none", "mean"])
@pytest.mark.parametrize("static", [True, False])
def test_every_measurement_finds_the_cache_as_the_first_did(static, propagation, base, ids):
    model = measure.merge(base, [2, 5, 7], propagation)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 3) if static else None
    cache = measure.filled(model, ids, cache)
    works = [measure.decode(model, ids, 3, cache)]
    works += [measure.prefill(model, ids, cache), works[0]] if static else works
    with torch.inference_mode():
        for work in works:
            assert work(lambda: 1.0) == 0
            assert int(cache.get_seq_length()) == TOKENS
        untouched = measure.filled(model, ids)
        for step in range(3):
            token = ids[:, step : step + 1]
            found = model(token, past_key_values=cache, use_cache=True).logits
            expected = model(token, past_key_values=untouched, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_time_of_parts_that_are_gone():
    attention, ffn, rest = 0.3, 0.5, 4.0
    whole = LAYERS * (attention + ffn) + rest
    no_attentions, no_layers = whole - (LAYERS - 1) * attention, whole - (LAYERS - 1) * (attention + ffn)
    shares = engines.shares_by_removal(no_attentions / whole, no_layers / whole, LAYERS)
    assert shares.pop("head") is None
    assert shares == pytest.approx({"attentions": 3 / 12, "FFNs": 5 / 12, "rest": 4 / 12})
    assert engines.by_time(shares["attentions"], 8, LAYERS) == pytest.approx((whole - 8 * attention) / whole)


def test_parts_of_a_model_are_timed_one_by_one(base, ids):
    times = iter(range(10**6))  # a clock that goes on by one each time that it is read
    parts = measure.seconds_by_part(base, measure.prefill(base, ids), lambda: next(times))
    # two modules in each of the ten layers; work begins and ends outside of them
    assert parts == {"attentions": 20, "FFNs": 20, "head": 1, "rest": 42}


def test_engines_are_compared_and_what_does_not_fit_is_left_out(base, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "load_base", lambda random_weights: base)
    # it would stay for the tests that follow, and those that compare bits with another process would fail
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    start = engines.InTransformers.start

    def start_or_fail(self, model, ids, *args):
        if len(ids) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return start(self, model, ids, *args)

    monkeypatch.setattr(engines.InTransformers, "start", start_or_fail)
    options = "--rounds 2 --steps 2 --tokens 8 16 --batch 1 3 2 --dtype bfloat16 --profile --out"
    for only in ("static", "eager"):
        monkeypatch.setattr(sys, "argv", ["engines.py", "--only", only, *options.split(), str(tmp_path)])
        engines.main()
    results = json.loads((tmp_path / "engines.json").read_text())
    assert list(results) == ["transformers, eager attention", "transformers, static cache"]
    cases = [f"{phase} {rows}{n}" for n in (8, 16) for rows in ("", "2 x ") for phase in ("prefill of", "decode after")]
    for name, result in results.items():
        assert [(row["case"], row["propagation"]) for row in result["rows"]] == [
            (case, propagation) for case in cases for propagation in ("none", "mean")
        ]
        assert result["left out"] == [f"3 x {n}: does not fit into the memory" for n in (8, 16)]
        for row in result["rows"]:
            tokens, rows = int(row["case"].split()[-1]), 2 if " x " in row["case"] else 1
            kept = tokens + 2 if "static" in name else tokens
            assert row["KV MB, base"] * 1e6 == LAYERS * rows * kept * 2 * 2 * 8 * 2  # key and value, heads, size, bytes
            left = 8 * 32 / (2 * 2 * 8) if row["propagation"] == "mean" else 0  # of the skipped, in attentions
            assert row["KV"] == pytest.approx((2 + left) / LAYERS)
            if "prefill" in row["case"]:
                flops = [measure.prefill_flops(base.config, n, tokens) for n in (2, LAYERS)]
                assert row["bound"] == flops[0] / flops[1]
            else:
                assert 0.5 < row["bound"] < 1.2
        for shares in result["profile"]:
            assert sum(shares[part] for part in engines.PARTS) == pytest.approx(shares["sum"])
    assert (tmp_path / "engines.md").read_text().count("decode after 2 x 16") == 2 * (2 + 2)
    assert (tmp_path / "engines.png").stat().st_size > 0


def test_by_which_power_times_grow():
    steps = dict.fromkeys(growth.STEPS, 1.0) | {"score, grown": float("nan")}
    rows = [{"layers": 8, "width": 64, **steps}, {"layers": 16, "width": 64, **steps, "merge": 2.0, "save": 4.0}]
    first, second = growth.with_powers(rows, "layers")
    assert (first["merge"], first["score, grown"]) == ("1", "-")
    assert (second["merge"], second["save"], second["load"]) == ("2 (1.0)", "4 (2.0)", "1 (0.0)")


def test_the_cpu_clock_is_refused_for_a_gpu(capsys):
    with pytest.raises(SystemExit):
        engines.parse(["--device", "cuda", "--clock", "cpu"])
    assert "does not see what a GPU does" in capsys.readouterr().err


@pytest.mark.parametrize("kind", planted.KINDS)
def test_planted_attentions_add_what_they_are_to_add(kind):
    model, where, rows = planted.plant(kind, seed=3)
    assert len(where) == planted.PLANTED
    added = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda m, args, output, i=i: added.update({i: output[0]}))
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows[:8]]))
    for i, values in added.items():
        spread, size = values.flatten(0, 1).std(dim=0).max(), values.abs().max()
        expected = {"nothing": (False, False), "a constant": (False, True), "noise": (True, True)}[kind]
        assert (bool(spread > 1e-4), bool(size > 1e-4)) == (expected if i in where else (True, True))


def test_the_search_finds_what_is_planted():
    """One of each kind, and another one of noise; `python benchmarks/planted.py` has ten of each."""
    for kind, seed in (("nothing", 1), ("a constant", 2), ("noise", 7), ("noise", 3)):
        row = planted.search(kind, 100, seed)
        assert row["found"] == row["start"] == row["planted"]


@torch.inference_mode()
@pytest.mark.parametrize("static", [None, TOKENS + 3])
def test_a_drawn_cache_is_like_one_that_was_filled(static, base, ids):
    for model in (base, measure.merge(base, [2, 5, 7], "none")):
        cache = long_contexts.drawn(model, *ids.shape, static)
        like = StaticCache(config=model.config, max_cache_len=static) if static else None
        assert measure.kv_bytes(cache) == measure.kv_bytes(measure.filled(model, ids, like))
        measure.decode(model, ids, 3, cache)(lambda: 0.0)
        assert cache.get_seq_length(0) == TOKENS


def test_long_contexts_are_measured_once_each():
    keys = [tuple(case.key) for case in long_contexts.CASES]
    assert len(set(keys)) == len(keys)
    rows = [dict(zip(("engine", "phase", "batch", "tokens"), key, strict=True)) for key in keys[1:]]
    assert [tuple(case.key) for case in long_contexts.wanted(long_contexts.parse([]), rows)] == keys[:1]
    assert list(long_contexts.wanted(long_contexts.parse(["--only", "llama"]), rows)) == []
    assert len(list(long_contexts.wanted(long_contexts.parse(["--again", "--tokens", "2048"]), rows))) == sum(
        case.tokens == 2048 for case in long_contexts.CASES
    )


def test_all_served_models_have_the_same_memory():
    """Whole blocks of it, for the base model and the merged one, so that nothing is lost to rounding."""
    sizes = serving.SIZES
    width = 2 * sizes["num_key_value_heads"] * sizes["head_dim"] * 4
    blocks = [serving.KV_BYTES / (serving.BLOCK * width * layers) for layers in (10, 10 - serving.SKIPPED)]
    assert blocks == [30, 50]
    assert serving.draw_requests(5, 7) == serving.draw_requests(5, 7)
    assert all(256 <= len(prompt) <= 768 and new == 7 for prompt, new in serving.draw_requests(50, 7))


def test_longer_trainings_are_next_to_the_short_one_of_the_same_seed():
    def row(task, method, skipped, loss, kind="rate", seed=0, validation_loss=2.2):
        about = {"model": "SmolLM2", "task": task, "method": method, "skipped": skipped, "seed": seed}
        return about | {"kind": kind, "loss": loss, "validation_loss": validation_loss}

    rows = [
        row("Python source, 240 steps", "LoRA", 0, 2.52),
        row("Python source, 240 steps", "LoRA", 0, 2.51, validation_loss=2.3),  # of another rate
        row("Python source", "LoRA", 0, 2.59),  # to choose the rate
        row("Python source", "LoRA", 0, 2.58, "run"),
        row("Python source", "LoRA", 0, 2.57, "run", seed=1),
        row("Python source, 240 steps", "EAS, given set", 8, 2.6),
        row("Python source, 240 steps", "EAS, given set", 12, 2.7),
        row("movie reviews", "LoRA", 0, 0.2, "run"),
    ]
    assert longer.losses("LoRA", rows) == {60: 2.58, 240: 2.52}
    assert longer.losses("EAS, given set", rows) == {240: 2.6}
    assert longer.losses("skip, LoRA", rows) == {}
