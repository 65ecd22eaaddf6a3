"""LaVIN-EAS, one of the paper's three systems: fine-tune LaVIN for ScienceQA without 12 of its 32 attentions.

What it does, with `python examples/lavin_scienceqa.py --data FOLDER`, where ScienceQA has been unpacked:

1. puts LaVIN together (`lavin_model.py`, a class that comes from outside): Llama, CLIP, and a new bottleneck between;
2. fine-tunes it with adapters in every layer, and no attention skipped, as LaVIN is: what the paper compares with;
3. fine-tunes EAS for as many steps, while a search finds the attentions to skip;
4. merges EAS, tests all, and times them side by side: an answer of 32 tokens to one question at a time;
5. saves the merged model with its processor, loads both, and answers the questions again.

`--small` does it with what arrives in packages: SmolLM2-135M, a small tower that first learns to see, and easy-VQA in
ScienceQA's format; in about 25 minutes of one CPU core. `--tiny` is for trying it: a random model and made questions.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import lavin_model
import made
import paper
import torch
import transformers
from llava_scienceqa import asking, compare, fine_tune, letter_logits, parser, questions
from real_data import DownloadError, cached, load_model, load_tokenizer, visual_questions
from sentiment import step
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    ProcessorMixin,
)
from vqa import descriptions, learn_to_see

from peft_eas import EASCallback, EASConfig

SMALL = dict(examples=[1200, 128, 400], learning_rate=1e-3, epochs=1, batch_size=8, r=16, timing_examples=4)
TINY = dict(num_skip=2, r=4, r_pia=4, epochs=2, batch_size=4, learning_rate=1e-3, timing_examples=1)


def make_small(target: Path, scratch: Path, seed: int) -> None:
    """LaVIN of SmolLM2 and a tower of six layers, which learns, with the bottleneck, to say what is in an image."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, image_size=48, patch_size=16
    )
    model, processor = lavin_model.put_together(
        CLIPVisionModel(vision), load_model(), load_tokenizer(), layers=(1, 2, 3, 4, 5, 6)
    )
    see = argparse.Namespace(image_epochs=20, seed=seed, output=scratch)
    described = descriptions(visual_questions("train"))
    learn_to_see(model, model.model.get_image_features, processor, described, see)
    model.save_pretrained(target)
    processor.save_pretrained(target)


def pretrained(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LaVIN, and its processor."""
    torch.manual_seed(args.seed)
    if args.tiny:
        tokenizer = made.tiny_tokenizer()
        return lavin_model.put_together(made.tiny_tower(), made.tiny_language_model(tokenizer), tokenizer, (1, 2))
    if args.small:
        folder = cached(f"smollm2-lavin-{args.seed}", lambda *folders: make_small(*folders, args.seed))
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    paper.check_type(args.vision_tower, "clip", "clip_vision_model")
    paper.check_type(args.language_model, "llama")
    tower = CLIPVisionModel.from_pretrained(args.vision_tower)
    every_fourth = tuple(range(4, tower.config.num_hidden_layers + 1, 4))
    language_model = AutoModelForCausalLM.from_pretrained(args.language_model)
    return lavin_model.put_together(
        tower, language_model, AutoTokenizer.from_pretrained(args.language_model), every_fourth
    )


def main() -> None:
    options = parser("Fine-tune LaVIN for ScienceQA with EAS: without some of its attentions.")
    options.add_argument("--language-model", default="huggyllama/llama-7b", help="hub name or folder of a Llama")
    options.add_argument("--vision-tower", default="openai/clip-vit-large-patch14", help="that of a CLIP vision model")
    options.set_defaults(r=8, r_pia=32, learning_rate=1.1e-3, batch_size=32)  # LaVIN-EAS's
    args = paper.parse(options, SMALL, TINY)
    transformers.logging.disable_progress_bar()  # those of loading; the Trainer's stays
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    with step("Loading model and questions"):
        train, search, test = questions(args)
        base, processor = pretrained(args)
        common = dict(r=args.r, r_pia=args.r_pia, scaling=1.0, modules_to_save=["projector"], task_type="CAUSAL_LM")

    with step("Fine-tuning with adapters in every layer, as LaVIN has them"):
        every = fine_tune(copy.deepcopy(base), EASConfig(skip_layers=[], **common), train, processor, args)

    with step("Fine-tuning EAS, and searching"):
        config = EASConfig(num_skip=args.num_skip, **common)
        # from the deepest, as the authors' sets are: before it has learned the task, the model says little of its needs
        finder = EASCallback(search, warm_start="depth")
        eas = fine_tune(copy.deepcopy(base), config, train, processor, args, [finder])
        print(f"EAS skips {eas.skip_layers}, out of {base.config.text_config.num_hidden_layers} attentions")

    with step("Merging, testing and timing"):
        merged = copy.deepcopy(eas).merge_and_unload()  # merging works in place
        models = {
            "adapters in every layer": every,
            "base": base.to(merged.device).eval(),
            "EAS, not merged": eas,
            "EAS, merged": merged,
        }
        logits = compare(models, test, processor, args)

    with step(f"Saving the merged model to {args.output}, loading it, and answering again"):
        merged.save_pretrained(args.output)
        processor.save_pretrained(args.output)
        loaded = AutoModelForImageTextToText.from_pretrained(args.output, device_map=merged.device).eval()
        batches = asking(test, AutoProcessor.from_pretrained(args.output), args.batch_size)
        difference = (letter_logits(loaded, batches) - logits).abs().max()
        print(f"Largest difference that saving and loading makes to a logit: {difference:.1e}")


if __name__ == "__main__":
    try:
        main()
    except (paper.DataError, DownloadError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
