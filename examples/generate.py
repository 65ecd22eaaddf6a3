"""Let a merged model, such as examples/sentiment.py saves, continue some prompts.

python examples/generate.py outputs/sentiment $'Review: Not bad at all.\\nSentiment:'
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_eas  # noqa: F401 - this is what lets transformers load merged models


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a merged model continue some prompts.")
    parser.add_argument("model", help="folder or hub name of a merged model")
    parser.add_argument("prompts", nargs="+", help="texts to continue, all in one batch")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model)
    batch = tokenizer(args.prompts, padding=True, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
