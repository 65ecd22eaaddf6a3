"""Every row of the table of families, on a tiny random model: what works is written to docs/supported-models.md.

python tests/matrix.py              # all rows, and the page
python tests/matrix.py gpt2 phi3    # these rows, on the screen
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from checks import CHECKS, applies, run
from zoo.audio_language import SOUNDS
from zoo.families import EXAMPLES, whole_models
from zoo.vision_language import IMAGES

from peft_eas import FAMILIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "supported-models.md"


def kind(model_type: str) -> str:
    """The section of the page that a family belongs to."""
    if model_type in EXAMPLES:
        return EXAMPLES[model_type].section
    if model_type in SOUNDS:
        return "Audio-language models"
    if FAMILIES[model_type].decoder is not None or model_type in IMAGES:
        return "Vision-language models"
    if any("experts" in name for row in FAMILIES[model_type].attentions for name in row.ffn_inputs):
        return "Mixtures of experts"
    return "Decoders"


def page(results: dict[str, dict[str, str]]) -> str:
    """docs/supported-models.md."""
    lines = [
        "# Supported models",
        "",
        f"What `make supported-models` found with transformers {transformers.__version__} and torch "
        f"{torch.__version__.split('+')[0]}: each family as a tiny random model. The columns:",
        "",
        *(f"- **{name}**: {check.__doc__.strip().splitlines()[0]}" for name, check in CHECKS.items()),
        "",
        "An empty cell: there is nothing to check; of prefix, parts and packing, that the base model does not do it,",
        "either.",
        "",
        "A family that is not here: see [Families](usage.md#families).",
        "",
        "Of models that have layers without attention, the attentions of the others are skipped; of vision-language",
        "and audio-language models, those of the language model. Left alone are the first attention of each list of",
        "T5 and its kin, which has the relative positions of all; the first self-attention of decoders with",
        "cross-attentions, which says how long the KV cache is, and those of GLM-MoE-DSA, MiniMax and RecurrentGemma;",
        "the attentions of Gemma 3n and Gemma 4 that share keys and values with others; in Zamba, the first with each",
        "set of weights; in Nemotron-H, attentions that no FFN follows; in ERNIE 4.5 VL, those of layers without",
        "shared experts; the cross-attentions of IDEFICS; the first of WavLM, which has the relative positions of",
        "all; the vision towers of ALIGN, BridgeTower, Florence-2, ModernVBERT and vision-text-dual-encoders, and the",
        "audio tower of CLAP; the encoders of BigBird-Pegasus, Pegasus-X, LongT5 with local attentions, and of models",
        "that are an encoder and a decoder of other families.",
        "",
        "Kosmos-2 and 2.5 are tried without padding, which they count as tokens where there is a KV cache; FastVLM",
        "without images and its own vision tower, which needs timm; DeepSeek-OCR 2 without images, which are at least",
        "145 tokens each.",
    ]
    failures = []
    sections = ["Decoders", "Mixtures of experts", "Vision-language models", "Audio-language models"]
    sections += dict.fromkeys(example.section for example in EXAMPLES.values())
    for section in sections:
        rows = {model_type: result for model_type, result in results.items() if kind(model_type) == section}
        lines += ["", f"## {section} ({len(rows)})", "", f"| model type | {' | '.join(CHECKS)} |"]
        lines += [f"|{'---|' * (len(CHECKS) + 1)}"]
        for model_type, result in sorted(rows.items()):
            marks = []
            for name, error in result.items():
                if error:
                    failures.append(f"- `{model_type}`, {name}: {error}")
                shown = "✗" if error else "✓" if applies(name, model_type) else " "
                marks.append(shown)
            lines.append(f"| `{model_type}` | {' | '.join(marks)} |")
    if failures:
        lines += ["", "## What does not work", "", *failures]
    return "\n".join(lines) + "\n"


def main() -> None:
    transformers.logging.set_verbosity_error()
    results = {}
    for model_type in sys.argv[1:] or whole_models():
        results[model_type] = run(model_type)
        wrong = {name: error for name, error in results[model_type].items() if error}
        print(model_type, wrong or "ok", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(results), encoding="utf-8")
        print(f"{len(results)} families: {PAGE}")


if __name__ == "__main__":
    main()
