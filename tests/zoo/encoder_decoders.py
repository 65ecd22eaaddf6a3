"""Encoder-decoders, of texts, images and sounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import transformers
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedConfig

from zoo.encoders import hears
from zoo.example import Example
from zoo.inputs import answers, boxed_words, flattened, heard, pictured_sources, pixels, sounds, sources, waves
from zoo.sizes import IMAGE_TOKEN, NUM_LAYERS, PARAKEET, SEQ2SEQ, TEXT, VISION

T5 = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=NUM_LAYERS, num_heads=4, decoder_start_token_id=0,
    eos_token_id=None,
)  # fmt: skip
GEMMA = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48, max_position_embeddings=40, sliding_window=4, query_pre_attn_scalar=8,
)  # fmt: skip
LISTENER = dict(
    hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip


def translates(config: type, **sizes) -> Example:
    make = partial(config, **sizes or SEQ2SEQ)
    return Example("Encoder-decoders", AutoModelForSeq2SeqLM, make, sources, {"labels": answers()}, task="SEQ_2_SEQ_LM")


def interprets(config: type, model: type, inputs: Callable[[], dict]) -> Example:
    sizes = {k: v for k, v in SEQ2SEQ.items() if k != "d_model"} | dict(
        hidden_size=32, speech_encoder_layers=NUM_LAYERS, speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=48, feature_projection_input_dim=8, speech_encoder_layerdrop=0.0,
        t2u_encoder_layers=1, t2u_decoder_layers=1, t2u_encoder_ffn_dim=48, t2u_decoder_ffn_dim=48,
        t2u_encoder_attention_heads=4, t2u_decoder_attention_heads=4, conv_depthwise_kernel_size=3,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip
    return Example("Encoder-decoders", model, partial(config, **sizes), inputs, {"labels": answers()})


def transcribes(config: Callable[[], PreTrainedConfig]) -> Example:
    return Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq, config, lambda: heard() | {"decoder_input_ids": answers()},
        {"labels": answers()},
    )  # fmt: skip


EXAMPLES: dict[str, Example] = {
    "bart": translates(transformers.BartConfig),
    "bigbird_pegasus": translates(transformers.BigBirdPegasusConfig, **SEQ2SEQ, attention_type="original_full"),
    "blenderbot": translates(transformers.BlenderbotConfig),
    "blenderbot-small": translates(transformers.BlenderbotSmallConfig),
    "canary": transcribes(
        lambda: transformers.CanaryConfig(
            encoder_config=PARAKEET, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=None,
            decoder_start_token_id=2,
            decoder_config=LISTENER | dict(vocab_size=99, bos_token_id=1, eos_token_id=None, head_dim=8),
        )
    ),
    "cohere_asr": transcribes(
        lambda: transformers.CohereAsrConfig(
            encoder_config=PARAKEET, **LISTENER, vocab_size=99, bos_token_id=1, eos_token_id=None,
            decoder_start_token_id=2, head_dim=8,
        )
    ),
    "encoder-decoder": Example(
        "Encoder-decoders", transformers.EncoderDecoderModel,
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.BertConfig(**TEXT), transformers.BartConfig(**SEQ2SEQ), decoder_start_token_id=2,
            pad_token_id=0,
        ),
        sources, {"labels": answers()},
    ),
    "florence2": Example(
        "Encoder-decoders", AutoModelForImageTextToText,
        lambda: transformers.Florence2Config(
            text_config=SEQ2SEQ | dict(model_type="bart"), image_token_id=IMAGE_TOKEN,
            vision_config=dict(
                embed_dim=[8, 16], depths=[1, 1], num_heads=[2, 2], num_groups=[2, 2], patch_size=[3, 3],
                patch_stride=[4, 2], patch_padding=[1, 1], patch_prenorm=[False, True], window_size=2,
                projection_dim=32,
            ),
        ),
        pictured_sources, {"labels": answers()},
    ),
    "led": translates(
        transformers.LEDConfig, **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        attention_window=4, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40,
    ),
    "longt5": translates(
        transformers.LongT5Config, **T5, encoder_attention_type="transient-global", local_radius=3,
        global_block_size=2,
    ),
    "m2m_100": translates(transformers.M2M100Config),
    "marian": translates(transformers.MarianConfig),
    "mbart": translates(transformers.MBartConfig),
    "moonshine": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.MoonshineConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=NUM_LAYERS,
            decoder_num_hidden_layers=NUM_LAYERS, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
            encoder_num_key_value_heads=4, decoder_num_key_value_heads=4, decoder_start_token_id=1, pad_token_id=0,
            eos_token_id=None,
        ),
        lambda: waves(1500) | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "mt5": translates(transformers.MT5Config, **T5),
    "mvp": translates(transformers.MvpConfig),
    "nllb-moe": translates(
        transformers.NllbMoeConfig, **SEQ2SEQ, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        expert_capacity=8,
    ),
    "pegasus": translates(transformers.PegasusConfig),
    "pegasus_x": translates(transformers.PegasusXConfig, **SEQ2SEQ, num_global_tokens=2, block_size=4),
    "pix2struct": Example(
        "Encoder-decoders", AutoModelForImageTextToText,
        lambda: transformers.Pix2StructConfig(
            text_config=dict(
                vocab_size=99, hidden_size=32, d_kv=8, d_ff=48, num_layers=NUM_LAYERS, num_heads=4,
                decoder_start_token_id=0, eos_token_id=None, encoder_hidden_size=32,
            ),
            vision_config=dict(
                hidden_size=32, patch_embed_hidden_size=12, d_ff=48, d_kv=8, num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4, patch_size=2, seq_len=9,
            ),
        ),
        flattened, {"labels": answers()},
    ),
    "plbart": translates(transformers.PLBartConfig),
    "seamless_m4t": interprets(transformers.SeamlessM4TConfig, transformers.SeamlessM4TForTextToText, sources),
    "seamless_m4t_v2": interprets(  # in which convolutions read padding
        transformers.SeamlessM4Tv2Config, transformers.SeamlessM4Tv2ForSpeechToText,
        lambda: {"input_features": heard()["input_features"], "decoder_input_ids": answers()},
    ),
    "speech-encoder-decoder": Example(
        "Encoder-decoders", transformers.SpeechEncoderDecoderModel,
        lambda: transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            hears(transformers.Wav2Vec2Config, layerdrop=0.0).config(), transformers.MBartConfig(**SEQ2SEQ),
            decoder_start_token_id=2, pad_token_id=0,
        ),
        lambda: waves() | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "speech_to_text": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.Speech2TextConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
            input_feat_per_channel=20, input_channels=1, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=(3, 3),
            max_source_positions=40, max_target_positions=20,
        ),
        sounds, {"labels": answers()},
    ),
    "speecht5": Example(
        "Encoder-decoders", transformers.SpeechT5ForSpeechToText,
        lambda: transformers.SpeechT5Config(
            **{k: v for k, v in SEQ2SEQ.items() if k not in ("d_model", "max_position_embeddings")}, hidden_size=32,
            conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, max_text_positions=40,
            max_speech_positions=80, encoder_layerdrop=0.0, decoder_layerdrop=0.0, apply_spec_augment=False,
        ),
        lambda: waves() | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "switch_transformers": translates(
        transformers.SwitchTransformersConfig, **T5, num_decoder_layers=NUM_LAYERS, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, expert_capacity=8,
    ),
    "t5": translates(transformers.T5Config, **T5, feed_forward_proj="relu"),
    "t5gemma": Example(
        "Encoder-decoders", AutoModelForSeq2SeqLM,
        lambda: transformers.T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=99, eos_token_id=None),
        sources, {"labels": answers()}, task="SEQ_2_SEQ_LM",
    ),
    "udop": Example(
        "Encoder-decoders", transformers.UdopForConditionalGeneration,
        partial(transformers.UdopConfig, **T5, max_2d_position_embeddings=64, image_size=16, patch_size=8),
        lambda: sources() | {"bbox": boxed_words()["bbox"] / 64}, {"labels": answers()}, task="SEQ_2_SEQ_LM",
        checkpoints=False,
    ),
    "umt5": translates(transformers.UMT5Config, **T5),
    "vision-encoder-decoder": Example(
        "Encoder-decoders", transformers.VisionEncoderDecoderModel,
        lambda: transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**VISION),
            transformers.TrOCRConfig(
                vocab_size=99, d_model=32, decoder_layers=NUM_LAYERS, decoder_attention_heads=4, decoder_ffn_dim=48,
                max_position_embeddings=20, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                decoder_start_token_id=2, cross_attention_hidden_size=32,
            ),
            decoder_start_token_id=2, pad_token_id=0,
        ),
        lambda: pixels(16) | {"decoder_input_ids": answers()}, {"labels": answers()},
    ),
    "whisper": Example(
        "Encoder-decoders", AutoModelForSpeechSeq2Seq,
        lambda: transformers.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=10, max_target_positions=20, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        sounds, {"labels": answers()},
    ),
}  # fmt: skip
