"""What models that hear need besides the common sizes, and how sounds are given to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from zoo.inputs import mel

GRANITE_SPEECH = dict(window_size=2, downsample_rate=1)
CONFORMER = dict(
    input_dim=8, hidden_dim=16, num_layers=2, context_size=4, max_pos_emb=4, conv_kernel_size=3, output_dim=4
)
PARTICULAR: dict[str, dict] = {
    "fun_asr_nano": dict(
        adaptor_config=dict(
            hidden_size=32, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, projector_hidden_size=16
        )
    ),
    "fun_asr_nano_encoder": dict(num_stacked_frames=1, num_timestamp_prediction_layers=1, fsmn_kernel_size=3),
    "glmasr_encoder": dict(intermediate_size=64),
    "granite_speech": GRANITE_SPEECH,
    "granite_speech_encoder": CONFORMER,
    "granite_speech_plus": GRANITE_SPEECH,
    "granite_speech_plus_encoder": CONFORMER,
    "qwen3_asr_encoder": dict(downsample_hidden_size=8),
    "vibevoice_acoustic_tokenizer_encoder": dict(
        num_filters=4, downsampling_ratios=[2, 2], depths=[1, 1, 1], vae_std=0.0
    ),
    "vibevoice_asr": dict(acoustic_tokenizer_chunk_size=8),
    "voxtral_encoder": dict(intermediate_size=64),
}
# how many tokens a sound is, and what says so
SOUNDS: dict[str, tuple[int, Callable[[], dict]]] = {
    "audioflamingo3": (4, partial(mel, 16, "input_features_mask")),
    "fun_asr_nano": (4, partial(mel, 4, "input_features_mask", bins_last=True)),
    "glmasr": (2, partial(mel, 16, "input_features_mask")),
    "granite_speech": (4, partial(mel, 4, bins_last=True)),
    "granite_speech_plus": (4, partial(mel, 4, bins_last=True)),
    "moss_transcribe_diarize": (2, partial(mel, 16, "input_features_mask", "padding_mask")),
    "musicflamingo": (4, partial(mel, 16, "input_features_mask")),
    "qwen2_audio": (4, partial(mel, 16, "feature_attention_mask")),
    "qwen3_asr": (2, partial(mel, 100, "input_features_mask", shown=16)),
    "vibevoice_asr": (
        2,
        lambda: {"input_values": torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(3))},
    ),
    "voxtral": (2, partial(mel, 16)),
}
