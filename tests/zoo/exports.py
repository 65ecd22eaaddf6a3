"""Merged models that engines may run, and tokenizers that they may know."""

from __future__ import annotations

import warnings

import numpy as np
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import peft_eas
from peft_eas import EASConfig
from zoo import tiny

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


TEXT = (
    "The film's plot isn't THE BEST; I've seen 3, 33, 333 and 33333 better ones!? We'RE sure they'll agree...\n\n"
    "  Two  spaces,\ttabs\t\tand a line\r\n break. Ünïcödé: naïve café, нещо на Български, 我想在apple工作, កាន់តែ, 🚀 "
    "🦙'''``\"\"[(<=>)]---___ e\u0301 ½ ² Ⅷ ١٢٣ \u00a0non-breaking\u2003em    "
)


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
