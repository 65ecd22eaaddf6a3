"""llama.cpp computes what the merged model computes, and splits text as its tokenizer does."""

import json

import pytest
import torch
from peft import get_peft_model
from real_data import load_model, load_tokenizer, movie_reviews
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import tiny
from zoo.exports import BPE, MODELS, TEXT, byte_level, merged, quietly, sentencepiece, split, with_bos

from peft_eas import EASConfig
from peft_eas.export import gguf_file


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_llama_cpp_computes_what_the_merged_model_computes(name, use_bias, llama_cpp, tmp_path):
    model, tokenizer = merged(name, use_bias=use_bias, **BPE), byte_level()
    quietly(model, tmp_path / "out", "gguf", tokenizer)
    engine = llama_cpp(tmp_path / "out")
    for seed in range(3):
        ids = tiny.inputs("llama", rows=1, length=40, padding=None, seed=seed)["input_ids"]
        expected = model(ids).logits[0, -1].log_softmax(-1)
        assert (engine.log_probabilities(ids[0].tolist(), 390) - expected).abs().max() < 2e-3
    generated = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)[0, 40:]
    assert engine.generate(ids[0].tolist(), 20) == generated.tolist()


@pytest.mark.parametrize("skip", tiny.SKIP_SETS.values(), ids=tiny.SKIP_SETS)
@torch.no_grad()
def test_llama_cpp_skips_any_layer(skip, llama_cpp, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = merged(skip=skip, **BPE)
    quietly(model, tmp_path / "out", "gguf", byte_level())
    ids = tiny.inputs("llama", rows=1, length=40, padding=None)["input_ids"]
    expected = model(ids).logits[0, -1].log_softmax(-1)
    found = llama_cpp(tmp_path / "out").log_probabilities(ids[0].tolist(), 390)
    assert (found - expected).abs().max() < 2e-3
    left = {
        int(t.name.split(".")[1]) for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors if "attn_" in t.name
    }
    assert left == set(range(6)) - {i for i in skip if i}


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.05), ("bfloat16", 0.3), ("q8_0", 0.3)])
@torch.no_grad()
def test_smaller_dtypes_are_close(dtype, most, llama_cpp, tmp_path):
    model = merged(**BPE)
    sizes = []
    for kind in ("float32", dtype):
        quietly(model, tmp_path / kind, "gguf", byte_level(), dtype=kind)
        sizes.append((tmp_path / kind / "model.gguf").stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]
    ids = tiny.inputs("llama", rows=1, length=40, padding=None)["input_ids"]
    expected = model(ids).logits[0, -1].log_softmax(-1)
    found = llama_cpp(tmp_path / dtype).log_probabilities(ids[0].tolist(), 390)
    assert 0 < (found - expected).abs().max() < most


def llama3(ignore_merges=True):
    return byte_level(split(gguf_file.LLAMA3), use_regex=False, ignore_merges=ignore_merges, template=with_bos())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("gpt-2", lambda: byte_level()),
        ("gpt-2", lambda: byte_level(template=with_bos(eos=True))),
        ("smollm", lambda: byte_level(pre_tokenizers.Digits(individual_digits=True))),
        ("llama-bpe", llama3),
        ("qwen2", lambda: byte_level(split(gguf_file.QWEN2), use_regex=False)),
    ],
)
def test_llama_cpp_splits_text_as_the_tokenizer_does(name, make, llama_cpp, tmp_path):
    tokenizer = make()
    assert gguf_file._pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    quietly(merged(**BPE), tmp_path / "out", "gguf", tokenizer)
    engine = llama_cpp(tmp_path / "out")
    for text in (TEXT, TEXT[::-1], "", "a", " leading", "12345 6789"):
        assert engine.tokenize(text) == tokenizer(text).input_ids
    messages = [{"role": "user", "content": "Hi."}]
    template = tokenizer.apply_chat_template(messages, tokenize=False)
    assert engine.post("/apply-template", messages=messages)["prompt"] == template


@pytest.mark.parametrize("metaspace", [True, False])
@pytest.mark.parametrize("prepend", [True, False])
def test_llama_cpp_merges_as_sentencepiece_tokenizers_do(prepend, metaspace, llama_cpp, tmp_path):
    tokenizer = sentencepiece(prepend, metaspace)
    quietly(merged(vocab_size=len(tokenizer)), tmp_path / "out", "gguf", tokenizer)
    engine = llama_cpp(tmp_path / "out")
    # transformers' Metaspace, unlike SentencePiece, puts no space before a text that begins with one
    backwards = TEXT[::-1] if not (metaspace and prepend) else TEXT[::-1].lstrip()
    for text in (TEXT, backwards, "a", "12345 6789"):
        assert engine.tokenize(text) == tokenizer(text).input_ids


def test_unknown_tokenizers_are_refused(tmp_path):
    model = merged(**BPE)

    def refused(match, tokenizer, model=model, **options):
        with pytest.raises(ValueError, match=match):
            quietly(model, tmp_path / "out", "gguf", tokenizer, **options)
        assert not list(tmp_path.iterdir())

    odd = byte_level(split(r"\d+|\D"))
    refused("If llama.cpp has a name for it .* `pre_tokenizer`", odd)
    refused("not one of those that are recognised", llama3(ignore_merges=False))
    refused("not one of those that are recognised", byte_level(normalizer=normalizers.Lowercase()))
    refused("give `tokenizer`", None)
    refused("only 99 embeddings", byte_level(), merged())
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    refused("of the kind WordLevel; only BPE", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    pieces = sentencepiece()
    spec = json.loads(pieces.backend_tokenizer.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][1:] + spec["model"]["merges"][:1]
    shuffled = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>")
    refused("can't be those of a SentencePiece model", shuffled, merged(vocab_size=len(pieces)))
    refused("leave `pre_tokenizer` out", pieces, merged(vocab_size=len(pieces)), pre_tokenizer="gpt-2")
    pieces.backend_tokenizer.normalizer = normalizers.Lowercase()
    refused("treats spaces in a way", pieces, merged(vocab_size=len(pieces)))
    quietly(model, tmp_path / "out", "gguf", odd, pre_tokenizer="qwen2")  # as the message says
    field = pytest.importorskip("gguf").GGUFReader(tmp_path / "out" / "model.gguf").get_field("tokenizer.ggml.pre")
    assert field.contents() == "qwen2"


def test_what_only_gguf_cannot_hold_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="type 'yarn' can't be exported"):
        quietly(merged(rope_parameters=yarn, **BPE), tmp_path / "out", "gguf", byte_level())
    large = merged(**BPE)
    with torch.no_grad():
        large.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has values.*dtype='bfloat16'"):
        quietly(large, tmp_path / "out", "gguf", byte_level(), dtype="float16")
    for format, match in (("nemotron-nas", "`pre_tokenizer` is for"), ("onnx", "neither `dtype` nor")):
        with pytest.raises(ValueError, match=match):
            quietly(merged(), tmp_path / "out", format, pre_tokenizer="gpt-2")
    assert not list(tmp_path.iterdir())


@pytest.mark.pretrained
@torch.no_grad()
def test_a_pretrained_model_in_llama_cpp(llama_cpp, tmp_path):
    """SmolLM2-135M without 8 of 30 attentions: the tokens of transformers on 20 prompts, and close probabilities."""
    config = EASConfig(skip_layers=[6, 7, 8, 12, 17, 21, 22, 29], stand_in="mean")
    model, tokenizer = get_peft_model(load_model(), config), load_tokenizer()
    tiny.shake(model, scale=0.01)
    model = model.merge_and_unload().eval()
    texts = [review.text for review in movie_reviews(0, 20)[1]]
    prompts = [tokenizer(text).input_ids for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    logits = torch.stack(out.logits, dim=1)
    margins = -logits.topk(2).values.diff().squeeze(-1)
    # how many prompts, and largest error of a log-probability: of float32, of rounding to float16 (transformers' own is
    # 0.08), of 8 bits
    for dtype, count, most in (("float32", 20, 1e-3), ("float16", 20, 0.1), ("q8_0", 5, 1.5)):
        quietly(model, tmp_path / dtype, "gguf", tokenizer, dtype=dtype)
        engine = llama_cpp(tmp_path / dtype)
        for index in range(count):
            assert engine.tokenize(texts[index]) == prompts[index]
            pairs = zip(engine.generate(prompts[index], 6), expected[index], strict=False)
            differ = next((at for at, (found, wanted) in enumerate(pairs) if found != wanted), None)
            assert differ is None or margins[index, differ] < 2 * most  # then either token is as good
        for index in range(3):
            error = engine.log_probabilities(prompts[index], 49152) - logits[index, 0].log_softmax(-1)
            assert error.abs().max() < most
