"""Sentence Transformers: encoding and training with EAS adapters, in a decoder and in BERT."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel
from zoo import tiny

from peft_eas import EASConfig

pytest.importorskip("sentence_transformers", minversion="6.0")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

PROPAGATIONS = ("none", "mean")
SKIPPED = [0, 2]
TEXTS = ["w1 w2 w3", "w5", "w7 w9 w11 w20 w33", "w3 w2 w1"]


def bert():
    torch.manual_seed(0)
    settings = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(BertConfig(**settings, **dropout, initializer_range=0.15)).eval()


BASES = {"llama": lambda: tiny.model("llama").model, "bert": bert}
OUTPUTS = {"llama": "layers.{}.self_attn.o_proj", "bert": "encoder.layer.{}.attention.output.dense"}
both_bases = pytest.mark.parametrize("name", BASES)
both_ways = pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
each_propagation = pytest.mark.parametrize("propagation", PROPAGATIONS)


def encoder(folder, name):
    base = BASES[name]()
    base.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    transformer = Transformer(str(folder / "base"))
    return SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean")], device="cpu")


def adapt(model, way, propagation):
    config = EASConfig(skip_layers=SKIPPED, propagation=propagation, task_type="FEATURE_EXTRACTION")
    if way == "add_adapter":
        model.add_adapter(config)
    else:
        model[0].model = get_peft_model(model[0].model, config)
    return model


def by_hand(model, texts):
    """Means over the tokens of each text alone."""
    ids = [torch.tensor([[int(word[1:]) + 3 for word in text.split()]]) for text in texts]
    return torch.cat([model(input_ids=i).last_hidden_state.mean(dim=1) for i in ids])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def encode(model):
    return model.encode(TEXTS, batch_size=3, convert_to_tensor=True)


@each_propagation
@both_ways
@both_bases
def test_a_new_adapter_leaves_nothing_of_skipped_attentions(tmp_path, name, way, propagation):
    base = BASES[name]()
    for index in SKIPPED:
        output = base.get_submodule(OUTPUTS[name].format(index))
        output.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.no_grad():
        expected = by_hand(base, TEXTS)
    close(encode(adapt(encoder(tmp_path, name), way, propagation)), expected)


@each_propagation
@both_ways
@both_bases
def test_training_and_merging(tmp_path, name, way, propagation):
    model = adapt(encoder(tmp_path, name), way, propagation)
    tiny.shake(model)
    inner = model[0].model
    rows = {"a": TEXTS, "b": TEXTS[::-1], "score": [1.0, 0.0, 0.0, 1.0]}
    with torch.no_grad():
        found = torch.cosine_similarity(by_hand(inner, rows["a"]), by_hand(inner, rows["b"]))
    expected = torch.nn.functional.mse_loss(found, torch.tensor(rows["score"])).item()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned
    assert all("eas_" in n for n in learned)
    arguments = Arguments(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-4, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=CosineSimilarityLoss(model)
    )
    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == learned
    encoded = encode(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    close(encode(SentenceTransformer(str(tmp_path / "adapter"), device="cpu")), encoded)
    if way == "add_adapter":  # there is no PeftModel, which knows how to merge
        inner = PeftModel.from_pretrained(BASES[name](), tmp_path / "adapter")
    model[0].model = inner.merge_and_unload()
    close(encode(model), encoded)
    model.save_pretrained(str(tmp_path / "merged"))
    close(encode(SentenceTransformer(str(tmp_path / "merged"), device="cpu")), encoded)


@each_propagation
@both_bases
@torch.no_grad()
def test_forward_is_what_a_call_gives(tmp_path, name, propagation):
    """Sentence Transformers call `forward` itself, which passes by hooks."""
    model = get_peft_model(BASES[name](), EASConfig(skip_layers=SKIPPED, propagation=propagation)).eval()
    tiny.shake(model)
    inputs = tiny.inputs("llama", padding="right")
    unmerged = model.base_model.model
    expected = unmerged(**inputs).last_hidden_state
    assert torch.equal(unmerged.forward(**inputs).last_hidden_state, expected)
    merged = model.merge_and_unload()
    close(merged.forward(**inputs).last_hidden_state, expected)
    assert torch.equal(merged.forward(**inputs).last_hidden_state, merged(**inputs).last_hidden_state)
