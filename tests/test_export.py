"""Exports, read by others: a reader of nemotron-nas checkpoints written from vLLM's rules, and llama.cpp itself."""

import functools
import json
import subprocess
import sys
import urllib.request
import warnings

import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from real_data import load_model, load_tokenizer, movie_reviews
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from zoo import tiny

import peft_eas
from peft_eas import EASConfig, cli
from peft_eas.export import gguf_file, nemotron_nas, onnx_file
from peft_eas.export.llama_shape import LlamaShape

FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 6}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "tied, rope of llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "biases of its own": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "attention biases of its own": ("llama", {"attention_bias": True}),
    "large heads, size 512": ("llama", {"head_dim": 16, "intermediate_size": 512}),
    "mistral": ("mistral", FULL),
    "qwen2": ("qwen2", FULL),
}


def merged(name="llama", skip=(2, 5), use_bias=True, stand_in="mean", **changes):
    family, own = MODELS[name]
    config = EASConfig(skip_layers=list(skip), propagation="none", use_bias=use_bias, stand_in=stand_in, r=4, r_pia=4)
    model = get_peft_model(tiny.model(family, changes=own | changes), config)
    tiny.shake(model)
    return model.merge_and_unload().eval()


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft_eas.export(*args, **kwargs)


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# nemotron-nas
# ----------------------------------------------------------------------------------------------------------------------


def deci_logits(folder, ids):
    """What vLLM's `DeciLMForCausalLM` computes: layers from `block_configs`, every weight by name, none left over."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert len(config.block_configs) == config.num_hidden_layers
    weights = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}

    def linear(name, z, sizes, bias):
        weight = weights.pop(f"{name}.weight")
        assert weight.shape == sizes
        return F.linear(z, weight, weights.pop(f"{name}.bias") if bias else None)

    def norm(name, z):
        return F.rms_norm(z, z.shape[-1:], weights.pop(f"{name}.weight"), config.rms_norm_eps)

    embeddings = weights.pop("model.embed_tokens.weight")
    z, residual = F.embedding(ids, embeddings), None
    d, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    rotary = LlamaRotaryEmbedding(config)(z, torch.arange(ids.shape[1])[None])
    for index, block in enumerate(config.block_configs):
        layer = f"model.layers.{index}"
        if not block.attention.no_op:
            residual = z if residual is None else z + residual
            z = norm(f"{layer}.input_layernorm", residual)
            kv_heads = heads // block.attention.n_heads_in_group
            counts, bias = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}, config.attention_bias
            q, k, v = (
                linear(f"{layer}.self_attn.{name}", z, (n * head_dim, d), bias).unflatten(-1, (n, head_dim))
                for name, n in counts.items()
            )
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary)
            out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).flatten(2)
            z = linear(f"{layer}.self_attn.o_proj", out, (d, heads * head_dim), bias)
        assert residual is not None, "vLLM and SGLang break on a layer 0 without attention"
        residual = z + residual
        z = norm(f"{layer}.post_attention_layernorm", residual)
        size = int(2 * block.ffn.ffn_mult * d / 3)
        size, bias = size if size % 256 == 0 else size + 256 - size % 256, config.mlp_bias
        gate = linear(f"{layer}.mlp.gate_proj", z, (size, d), bias)
        up = linear(f"{layer}.mlp.up_proj", z, (size, d), bias)
        z = linear(f"{layer}.mlp.down_proj", F.silu(gate) * up, (d, size), bias)
    z = norm("model.norm", z + residual)
    logits = F.linear(z, embeddings if config.tie_word_embeddings else weights.pop("lm_head.weight"))
    assert not weights, f"vLLM has no place for {list(weights)}"
    return logits


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nemotron_nas_computes_what_the_merged_model_computes(name, use_bias, tmp_path):
    model, ids = merged(name, use_bias=use_bias), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, False, True] * 2
    assert config["attention_bias"] is (
        use_bias or name in ("biases of its own", "attention biases of its own", "qwen2")
    )
    assert config["mlp_bias"] is True  # what stands in for the attentions of layers 2 and 5
    model = merged(name, use_bias=use_bias, stand_in="zero")
    quietly(model, tmp_path / "without", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "without", ids), model(ids).logits) < 1e-5
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert config["mlp_bias"] is (use_bias or name == "biases of its own")


@pytest.mark.parametrize("skip", tiny.SKIP_SETS.values(), ids=tiny.SKIP_SETS)
@torch.no_grad()
def test_nemotron_nas_skips_any_layer(skip, tmp_path):
    model, ids = merged(skip=skip), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5
    blocks = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).block_configs
    assert [index for index, block in enumerate(blocks) if block.attention.no_op] == [i for i in skip if i]


@pytest.mark.parametrize(
    ("hidden", "size"), [(576, 1536), (896, 4864), (2048, 5632), (4096, 11008), (4096, 14336), (8192, 28672)]
)
def test_the_engines_formula_gives_the_size_of_real_models(hidden, size):
    config = tiny.config("llama")
    config.update({"hidden_size": hidden, "intermediate_size": size})
    shape = LlamaShape(config, {"rope_type": "default", "rope_theta": 1e4}, 8, {}, (True,))
    (block,) = nemotron_nas._config(shape, "float32", False, False, size)["block_configs"]
    for mult in (block["ffn"]["ffn_mult"], round(block["ffn"]["ffn_mult"], 6)):  # some round it
        assert -(-int(2 * mult * hidden / 3) // 256) * 256 == size


def test_the_configuration_survives_saving(tmp_path):
    quietly(merged(), tmp_path / "out", "nemotron-nas", dtype="bfloat16")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.model_type, config.dtype) == ("nemotron-nas", torch.bfloat16)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.block_configs == config.block_configs
    assert again.rope_parameters == config.rope_parameters


def test_large_models_are_sharded(tmp_path, monkeypatch):
    save = functools.partial(nemotron_nas.save_torch_state_dict, max_shard_size="50KB")
    monkeypatch.setattr(nemotron_nas, "save_torch_state_dict", save)
    model, ids = merged(), tiny.inputs("llama", padding=None)["input_ids"]
    quietly(model, tmp_path / "out", "nemotron-nas")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    with torch.no_grad():
        assert relative_error(deci_logits(tmp_path / "out", ids), model(ids).logits) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# gguf
# ----------------------------------------------------------------------------------------------------------------------

TEXT = (
    "The film's plot isn't THE BEST; I've seen 3, 33, 333 and 33333 better ones!? We'RE sure they'll agree...\n\n"
    "  Two  spaces,\ttabs\t\tand a line\r\n break. Ünïcödé: naïve café, нещо на Български, 我想在apple工作, កាន់តែ, 🚀 "
    "🦙'''``\"\"[(<=>)]---___ e\u0301 ½ ² Ⅷ ١٢٣ \u00a0non-breaking\u2003em    "
)


SERVER = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port, params.verbosity = 512, 1, 0, 0, -1
params.warmup = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


class LlamaCpp:
    """A real llama.cpp with a model in it, in a process of its own: one CPU thread, keys and values in float32."""

    def __init__(self, folder):
        command = [sys.executable, "-c", SERVER, str(folder / "model.gguf")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = next((line.strip() for line in self.process.stdout if line.startswith("http")), None)
        assert self.address, f"llama.cpp does not load {folder}"

    def post(self, path, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def tokenize(self, text):
        return self.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def log_probabilities(self, ids, vocab_size):
        """Of the token that follows `ids`: `(vocab_size,)`."""
        body = dict(prompt=ids, n_predict=1, n_probs=vocab_size, cache_prompt=False)
        # what is sampled makes no difference to the probabilities, but half of a character would not be reported
        answer = self.post("/completion", **body, logit_bias=[[self.tokenize("a")[-1], 1000.0]])
        found = torch.full((vocab_size,), torch.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def generate(self, ids, count):
        body = dict(prompt=ids, n_predict=count, temperature=0, cache_prompt=False, return_tokens=True)
        return self.post("/completion", **body)["tokens"]


@pytest.fixture
def llama_cpp():
    """`llama_cpp(folder)` is a running llama.cpp."""
    pytest.importorskip("xllamacpp")  # there are no wheels for some platforms
    running = []

    def run(folder):
        running.append(LlamaCpp(folder))
        return running[-1]

    yield run
    for server in running:
        server.process.kill()
        server.process.communicate()


def byte_level(*before, use_regex=True, ignore_merges=False, normalizer=None, template=None):
    """A byte-level BPE tokenizer, trained on `TEXT`; `before` splits text before GPT-2's regular expression does."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet)
    )
    raw.post_processor = template
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
    )  # fmt: skip


def with_bos(eos=False):
    template = "<bos> $A <eos>" if eos else "<bos> $A"
    return processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])


def sentencepiece(prepend=True, metaspace=False):
    """A tokenizer as transformers makes one of a SentencePiece model: all pairs that make a piece, by its score."""
    words = [w for w in TEXT.replace(" ", " ▁").split(" ") if w.isascii() or w.startswith("▁")]
    pieces = sorted({w[i:j] for w in words for i in range(len(w)) for j in range(i + 2, min(i + 6, len(w)) + 1)})
    np.random.default_rng(0).shuffle(pieces)
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({c for piece in pieces for c in piece})
    vocab = {piece: i for i, piece in enumerate([*specials, *pieces[:400], *letters])}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces[:400] for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab
    ]  # fmt: skip
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        scheme = "first" if prepend else "never"
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prepend else []
        raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


BPE = {"vocab_size": 390}  # a few more than the tokenizer has


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


# ----------------------------------------------------------------------------------------------------------------------
# onnx
# ----------------------------------------------------------------------------------------------------------------------


NEEDS_TORCH = pytest.mark.skipif(
    Version(torch.__version__) < Version(onnx_file.TORCH), reason=f"exporting ONNX needs torch {onnx_file.TORCH}"
)


@NEEDS_TORCH
@torch.no_grad()
def test_onnxruntime_computes_what_the_merged_model_computes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    family = "gemma3_text"  # sliding windows, norms everywhere
    small = {"num_hidden_layers": 3, "layer_types": tiny.MIXED[:3]}  # exporting a layer takes seconds
    model = get_peft_model(tiny.model(family, changes=small), EASConfig(skip_layers=[1]))
    tiny.shake(model)
    model, tokenizer = model.merge_and_unload().train(), byte_level()
    quietly(model, tmp_path / "out", "onnx", tokenizer)
    assert model.training
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for rows, length in ((3, 11), (1, 1), (5, 40)):
        inputs = tiny.inputs(family, rows=rows, length=length, padding="left" if rows == 3 else None)
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        kept = inputs["attention_mask"].bool()
        assert relative_error(torch.tensor(logits)[kept], model.eval()(**inputs).logits[kept]) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == tokenizer(TEXT).input_ids


# ----------------------------------------------------------------------------------------------------------------------
# Both
# ----------------------------------------------------------------------------------------------------------------------

LLAMAS = ["nemotron-nas", "gguf"]
FORMATS = [*LLAMAS, "onnx"]


def adapted(family="llama", **settings):
    model = get_peft_model(tiny.model(family), EASConfig(**dict(skip_layers=[1, 3]) | settings))
    tiny.shake(model)
    return model


@pytest.fixture
def refused(tmp_path):
    def check(format, match, model, **options):
        with pytest.raises(ValueError, match=match):
            quietly(model, tmp_path / "out", format, byte_level(), **options)
        assert not list(tmp_path.iterdir())

    return check


@pytest.mark.parametrize("format", FORMATS)
def test_what_no_format_can_hold_is_refused(format, refused, tmp_path):
    refused(format, "merge_and_unload", adapted())
    merged = adapted(propagation="mean").merge_and_unload()
    refused(format, r"mean over other tokens.*freeze_context.*propagation='none'", merged)
    refused(format, "reads more than text", adapted("llava").merge_and_unload())
    quantised = tiny.model("llama")
    quantised.config.quantization_config = {"quant_method": "gptq"}
    refused(format, "unquantised base", quantised)
    with pytest.raises(ValueError, match="`format` must be one of 'nemotron-nas', 'gguf', 'onnx', got 'tflite'"):
        peft_eas.export(tiny.model("llama"), tmp_path / "out", "tflite")


@pytest.mark.parametrize("format", LLAMAS)
def test_what_is_no_llama_is_refused(format, refused):
    for family, why in (("qwen3", "normalises queries"), ("gemma3_text", "has norms")):
        model = adapted(family).merge_and_unload()
        refused(format, f"{why}.*MistralForCausalLM.*'onnx'", model)
    head = AutoModelForSequenceClassification.from_config(tiny.config("llama"))
    refused(format, "LlamaForSequenceClassification can't be", head)
    for family in ("mistral", "qwen2"):
        model = adapted(family).merge_and_unload()
        refused(format, r"6 tokens back.*max_position_embeddings = 6", model)
    refused(format, "'gelu', but", merged(hidden_act="gelu"))
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    refused(format, "rotates a part", merged(rope_parameters=partial))
    refused(format, "no dtype 'int3'", merged(), dtype="int3")
    foreign = merged()
    foreign.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(8)
    refused(format, "no place for: model.layers.1.self_attn.q_norm.weight", foreign)


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


@torch.no_grad()
def test_windows_that_make_no_difference_are_none(tmp_path):
    ids = tiny.inputs("llama", padding=None)["input_ids"]
    for name, base, skip in (
        ("short", tiny.model("mistral", changes={"sliding_window": 16, "max_position_embeddings": 16}), [2]),
        ("all skipped", tiny.model("qwen2"), [0, 2, 4]),  # the sliding ones
    ):
        model = get_peft_model(base, EASConfig(skip_layers=skip)).merge_and_unload().eval()
        quietly(model, tmp_path / name, "nemotron-nas")
        assert relative_error(deci_logits(tmp_path / name, ids), model(ids).logits) < 1e-5


def test_warnings_name_what_an_engine_would_do_silently(tmp_path):
    for number, (settings, match) in enumerate(
        [
            (dict(), "TensorRT-LLM ignores all biases and SGLang those of FFNs"),
            (
                dict(name="attention biases of its own", use_bias=False, stand_in="zero"),
                "TensorRT-LLM ignores all biases, without",
            ),
            (dict(skip=[0], use_bias=False, stand_in="zero"), "Layer 0 has no attention.*KV cache"),
        ]
    ):
        with pytest.warns(UserWarning, match=match) as caught:
            peft_eas.export(merged(**settings), tmp_path / str(number), "nemotron-nas")
        assert {warning.filename for warning in caught if warning.category is UserWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft_eas.export(merged(use_bias=False, stand_in="zero"), tmp_path / "silent", "nemotron-nas")


@pytest.mark.parametrize("format", LLAMAS)
def test_an_export_is_whole_or_not_there(format, tmp_path):
    model, tokenizer = merged(**BPE), byte_level()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not an empty folder"):
        quietly(model, tmp_path / "full", format, tokenizer)
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # the disk is full in the middle of the weights
    try:
        with pytest.raises(Exception, match=r"too large|requested and .* written"):
            quietly(model, tmp_path / "out", format, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "deeper" / "empty").mkdir(parents=True)
    quietly(model, tmp_path / "deeper" / "empty", format, tokenizer)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["empty"]
    assert any((tmp_path / "deeper" / "empty").iterdir())


@pytest.mark.parametrize(
    ("format", "package"), [("gguf", "gguf"), pytest.param("onnx", "onnxscript", marks=NEEDS_TORCH)]
)
def test_what_a_format_needs_is_named(format, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"`{package}`: pip install 'peft_eas\[export\]'"):
        peft_eas.export(merged(**BPE), tmp_path / "out", format, byte_level())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_command(llama_cpp, tmp_path, capsys):
    model, tokenizer = merged(use_bias=False, **BPE), byte_level()
    model.save_pretrained(tmp_path / "merged")
    run = ["export", str(tmp_path / "merged")]
    assert cli.main([*run, str(tmp_path / "nas"), "--format", "nemotron-nas", "--dtype", "bfloat16"]) == 0
    assert "config.json, configuration_decilm.py, generation_config.json" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "nas", trust_remote_code=True).dtype == torch.bfloat16
    assert cli.main([*run, str(tmp_path / "gguf"), "--format", "gguf"]) == 1
    assert "give `tokenizer`" in capsys.readouterr().err.splitlines()[-1]
    tokenizer.save_pretrained(tmp_path / "merged")
    assert cli.main([*run, str(tmp_path / "gguf"), "--format", "gguf"]) == 0
    assert f"{tmp_path / 'gguf'}: model.gguf (" in capsys.readouterr().out
    ids = tiny.inputs("llama", rows=1, padding=None)["input_ids"]
    found = llama_cpp(tmp_path / "gguf").log_probabilities(ids[0].tolist(), 390)
    assert (found - model(ids).logits[0, -1].log_softmax(-1)).abs().max() < 2e-3
    assert cli.main([*run, str(tmp_path / "nas2"), "--format", "nemotron-nas"]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "nas2")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    settings = json.loads((tmp_path / "nas2" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no other name


# ----------------------------------------------------------------------------------------------------------------------
# A real model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.pretrained
@torch.no_grad()
def test_a_pretrained_model_in_llama_cpp(llama_cpp, tmp_path):
    """SmolLM2-135M without 8 of 30 attentions: the tokens of transformers on 20 prompts, and close probabilities."""
    config = EASConfig(skip_layers=[6, 7, 8, 12, 17, 21, 22, 29])
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
