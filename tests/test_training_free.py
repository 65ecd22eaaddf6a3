"""The benchmark without training: maps are the nearest there are, divergences the model's own, and a rerun goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import training_free
from trainings import Rows


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "training_free.json")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.normal_(std=0.3)
    return model


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return training_free.Texts(
        [torch.randint(99, (n,), generator=generator).tolist() for n in (9, 5, 12, 7, 12)], size=2
    )


def test_a_ridge_finds_a_map_that_there_is(monkeypatch):
    monkeypatch.setattr(training_free, "RIDGE", 1e-9)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(400, 6) * torch.tensor([1, 9, 1, 0.1, 1, 1]) + 3, torch.randn(6, 6), torch.randn(6)
    found = training_free.ridge(x, x @ weight + bias)
    torch.testing.assert_close(found.weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias, bias, atol=1e-3, rtol=1e-3)
    low = weight[:, :2] @ torch.randn(2, 6)
    found = training_free.ridge(x, x @ low, rank=2)
    torch.testing.assert_close(found.weight, low, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(training_free.ridge(x, x @ weight, rank=2).weight, atol=1e-4) == 2


@torch.no_grad()
def test_divergence_is_that_of_the_models_logits(llama, texts):
    zeros = {1: training_free.Affine(None, torch.zeros(32)), 2: training_free.Affine(None, torch.zeros(32))}
    whole = training_free.hidden_states(llama, texts)
    assert training_free.divergence(texts, whole, llama, {})[0] == pytest.approx(0, abs=1e-6)
    kl, error = training_free.divergence(texts, whole, llama, zeros)
    logits = [llama(**batch).logits for batch in texts.batches]
    for index in zeros:  # without an output, whatever it looks at
        llama.model.layers[index].self_attn.o_proj.weight.data.zero_()
    own = [llama(**batch).logits for batch in texts.batches]
    p, q = (texts.tokens(each).double().log_softmax(-1) for each in (logits, own))
    assert kl == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)
    assert 0 < error < kl
    assert training_free.divergence(texts, training_free.hidden_states(llama, texts), llama, zeros)[0] < 1e-6


@torch.no_grad()
def test_an_attention_that_is_constant_costs_nothing_with_its_mean(llama, texts):
    attention = llama.model.layers[2].self_attn
    attention.o_proj.weight.data.zero_()
    attention.o_proj.bias = torch.nn.Parameter(torch.randn(32))
    calibrated = training_free.Calibrated(llama, texts, texts)
    torch.testing.assert_close(calibrated.means[2].bias, attention.o_proj.bias)
    assert calibrated.deviation[2] < 1e-6 < min(calibrated.deviation[i] for i in (0, 1, 3))
    assert min(calibrated.own_kl, key=calibrated.own_kl.get) == 2
    assert calibrated.own_kl[2] < 1e-6


@torch.no_grad()
def test_maps_bring_the_calibration_texts_nearer(llama, texts, monkeypatch):
    monkeypatch.setattr(training_free, "RIDGE", 1e-6)  # more inputs than tokens: they can be fitted exactly
    calibrated = training_free.Calibrated(llama, texts, texts)
    whole, skipped = training_free.hidden_states(llama, texts), [1, 3]
    kls = {
        name: training_free.divergence(texts, whole, *fit(calibrated, skipped))[0]
        for name, (_, fit) in training_free.METHODS.items()
    }
    mean = kls["own KL, means"]
    assert kls["own KL, means, full map behind the FFN"] < mean / 5
    assert kls["own KL, full linear map of the layer's input (like ReplaceMe)"] < mean / 5
    assert kls["own KL, means, map of rank 32 behind the FFN"] == pytest.approx(
        kls["own KL, means, full map behind the FFN"], rel=1e-3, abs=1e-6
    )


def test_an_interrupted_second_part_goes_on(rows, llama, texts, monkeypatch, capsys):
    monkeypatch.setattr(training_free, "load_model", lambda: llama)
    monkeypatch.setattr(training_free, "texts_of", lambda name: (texts, texts, texts))
    monkeypatch.setattr(training_free, "COUNTS", (1, 2))
    training_free.measure(rows)
    made = rows.read()
    assert len(made) == 2 * 2 * len(training_free.METHODS)
    rows.path.write_text(json.dumps(made[:5]))
    training_free.measure(rows)
    assert sorted(map(str, rows.read())) == sorted(map(str, made))


@torch.no_grad()
def test_a_row_of_this_package_is_its_merged_model(llama, texts):
    """It has stand-ins that were measured, which do better than means, and the model stays as it was."""
    calibrated = training_free.Calibrated(llama, texts, texts)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    whole, (model, stand_ins) = training_free.hidden_states(llama, texts), training_free._eas(calibrated, [3])
    assert stand_ins == {}
    assert [hasattr(layer.self_attn, "q_proj") for layer in model.model.layers] == [True, True, True, False]
    means = training_free.divergence(texts, whole, *training_free._means(calibrated, [3]))[0]
    assert 0 < training_free.divergence(texts, whole, model, {})[0] < means
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert sorted(calibrated.growth) == [0, 1, 2, 3]


def test_table_and_picture_of_anything_there_is(tmp_path):
    rows = [{"text": "Python source", "method": "deepest, zeros", "skipped": 8, "kl": 4.6, "kl_se": 0.1}]
    assert "| deepest, zeros |  | 4.600 ± 0.100 |  |  |" in training_free.summarise(rows)
    training_free.draw(rows, tmp_path / "free.png")
    assert (tmp_path / "free.png").stat().st_size > 10_000
