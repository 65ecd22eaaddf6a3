"""GGUF files of llama.cpp's architecture `deci`: a Llama whose layers differ in numbers of heads and sizes of FFNs."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .llama_shape import ELSEWHERE, LlamaShape, llama_shape

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

FILE = "model.gguf"
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""`{dtype: (type of a tensor, type of a file)}`, as the package `gguf` names them. Norms and biases are float32."""

GPT2 = "GPT-2's regular expression"
DIGIT = "digits one by one"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PRE_TOKENIZERS = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((QWEN2,), False): "qwen2",
}
"""`{(how text is split before BPE, whether whole words skip the merges): llama.cpp's name for it}`."""

ROPE_TYPES = ("default", "linear", "llama3")
"""Kinds of rotary embedding that only change the frequencies, once and for all."""


def write_gguf(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | None,
    pre_tokenizer: str | None,
) -> None:
    """Write `model.gguf` into `folder`. Tensors are converted one at a time.

    Raises:
        ValueError: if llama.cpp has no way to say what the model or its tokenizer does.
        ImportError: if the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("The format 'gguf' needs the package `gguf`: pip install 'peft_eas[export]'.") from None
    shape = llama_shape(model)
    dtype = dtype or str(shape.tensors["model.norm.weight"].dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"The format 'gguf' has no dtype {dtype!r}: choose from {', '.join(DTYPES)}.")
    if tokenizer is None:
        raise ValueError(
            "A GGUF file has the tokenizer in it: give `tokenizer`, such as `AutoTokenizer.from_pretrained(base)`."
        )
    tensor_type, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(folder / FILE, "deci")
    try:
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, shape)
        _add_tokenizer(writer, tokenizer, shape.config.vocab_size, pre_tokenizer)
        _write_tensors(writer, shape, gguf.GGMLQuantizationType[tensor_type])
    finally:
        writer.close()


def _add_shape(writer: GGUFWriter, shape: LlamaShape) -> None:
    config, layers = shape.config, len(shape.attention)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length([config.intermediate_size] * layers)
    writer.add_head_count([config.num_attention_heads if has else 0 for has in shape.attention])
    writer.add_head_count_kv([config.num_key_value_heads if has else 0 for has in shape.attention])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors
# ----------------------------------------------------------------------------------------------------------------------


def _write_tensors(writer: GGUFWriter, shape: LlamaShape, wanted: GGMLQuantizationType) -> None:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(shape.attention))
    tensors: dict[Any, tuple[str, torch.Tensor]] = {
        names.get_name(name, (".weight", ".bias")): (name, tensor) for name, tensor in shape.tensors.items()
    }
    factors = _rope_factors(shape)
    if factors is not None:
        tensors["rope_freqs.weight"] = ("rope_freqs", factors)

    def kind(tensor: torch.Tensor) -> GGMLQuantizationType:
        if tensor.dim() == 1:
            return gguf.GGMLQuantizationType.F32
        fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0  # quantised in blocks
        return wanted if fits else gguf.GGMLQuantizationType.F16

    no_dtype: Any = None  # the kind says it all
    for place, (_, tensor) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kind(tensor)]
        writer.add_tensor_info(place, tensor.shape, no_dtype, tensor.numel() // block * size, kind(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, tensor in tensors.values():
        writer.write_tensor_data(_data(shape, source, tensor, kind(tensor)))


def _data(shape: LlamaShape, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    import gguf

    tensor = tensor.to("cpu", torch.float32)
    if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
        # the rotary embedding of `deci` turns neighbouring components together; transformers' turns those half a head
        # apart
        halves = tensor.unflatten(0, (-1, 2, shape.head_dim // 2))
        tensor = halves.transpose(1, 2).flatten(0, 2)
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} has values that float16 can't hold: give `dtype='bfloat16'` or `dtype='float32'`.")
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


def _rope_factors(shape: LlamaShape) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies by, `(head_dim / 2,)`, if by anything."""
    kind = shape.rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"Rotary embeddings of the type {kind!r} can't be exported to GGUF; {', '.join(ROPE_TYPES)} can. If no "
            "sequences longer than in pretraining are needed, change `model.config.rope_parameters` and export again."
        )
    if kind == "default":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](shape.config, torch.device("cpu"))
    plain = shape.rope["rope_theta"] ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    return plain / frequencies


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def _add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, pre_tokenizer: str | None
) -> None:
    import gguf

    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so there is no tokenizer.json to read: load "
            "it by `AutoTokenizer.from_pretrained(base_model, use_fast=True)`."
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ValueError(
            f"The tokenizer is of the kind {spec['model']['type']}; only BPE can be exported to GGUF. {ELSEWHERE}"
        )
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {max(tokens)}, but the model only {vocab_size} embeddings: give the "
            "tokenizer that the model was trained with."
        )
    texts = [tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    is_sentencepiece = spec["model"].get("byte_fallback", False)
    if is_sentencepiece and pre_tokenizer is not None:
        raise ValueError("A tokenizer like SentencePiece's has no pre-tokenizer: leave `pre_tokenizer` out.")
    if is_sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_has_space_prefix(spec))
        scores = _scores(spec["model"])
        writer.add_token_scores([scores.get(text, 0.0) for text in texts])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or _pre_tokenizer(spec))
        writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    added = tokenizer.added_tokens_decoder
    kinds = []
    for index, text in enumerate(texts):
        if index not in tokens:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            if is_sentencepiece and index == tokenizer.unk_token_id:
                kinds.append(gguf.TokenType.UNKNOWN)
            else:
                kinds.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        elif is_sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kinds.append(gguf.TokenType.BYTE)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    for kind in ("bos", "eos", "unk", "sep", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(ids[-1:] == [tokenizer.eos_token_id])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text into words."""
    key = (_splits(spec["pre_tokenizer"]), spec["model"].get("ignore_merges", False))
    normalizer = (spec["normalizer"] or {}).get("type", "NFC")  # llama.cpp leaves text as it is
    if key in PRE_TOKENIZERS and normalizer == "NFC":
        return PRE_TOKENIZERS[key]
    raise ValueError(
        f"The way in which this tokenizer splits text is not one of those that are recognised "
        f"({', '.join(PRE_TOKENIZERS.values())}): {json.dumps(spec['pre_tokenizer'])}, normalizer "
        f"{json.dumps(spec['normalizer'])}. If llama.cpp has a name for it (src/llama-vocab.cpp), give it as "
        "`pre_tokenizer`."
    )


def _splits(part: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer of tokenizer.json does, step by step; steps that aren't known as they are."""
    part = part or {}
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(step for inner in parts for step in _splits(inner))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (GPT2,) if use_regex else ()
        case {"type": "Digits", "individual_digits": True}:
            return (DIGIT,)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
    return (json.dumps(part),)


def _has_space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    normalizer, pre_tokenizer = spec["normalizer"], spec["pre_tokenizer"] or {}
    if pre_tokenizer == {} and normalizer in (space, {"type": "Sequence", "normalizers": [space]}):
        return False
    if pre_tokenizer == {} and normalizer == {"type": "Sequence", "normalizers": [prefix, space]}:
        return True
    if normalizer is None and pre_tokenizer.get("type") == "Metaspace" and not pre_tokenizer.get("split", True):
        return pre_tokenizer["prepend_scheme"] != "never"
    raise ValueError(
        f"This tokenizer falls back to bytes like SentencePiece's, but treats spaces in a way that llama.cpp doesn't: "
        f"normalizer {json.dumps(normalizer)}, pre-tokenizer {json.dumps(pre_tokenizer)}. {ELSEWHERE}"
    )


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """Scores by which SentencePiece's algorithm, which llama.cpp has, merges what the list of merges says.

    That algorithm joins any two pieces that make a piece; the best piece first. A list of merges says which pairs, and
    in which order: it has to name them all, and those that make the same piece one after the other.
    """
    merges = [tuple(pair) for pair in model["merges"]]
    order = [piece for piece, _ in groupby(first + second for first, second in merges)]
    vocab, known = model["vocab"], set(merges)
    pairs = ((text[:i], text[i:]) for text in set(order) for i in range(1, len(text)))
    if len(order) > len(set(order)) or any(a in vocab and b in vocab and (a, b) not in known for a, b in pairs):
        raise ValueError(
            "This tokenizer falls back to bytes like SentencePiece's, but its merges can't be those of a SentencePiece "
            f"model, the only ones of this kind that llama.cpp knows. {ELSEWHERE}"
        )
    return {piece: -float(rank) for rank, piece in enumerate(order, start=1)}
