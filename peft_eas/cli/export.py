"""`peft-eas export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..export import FORMATS, export
from .shared import load_model, tokenizers

HELP = "write a merged model for vLLM, SGLang and TensorRT-LLM, for llama.cpp, or as ONNX"
EXAMPLES = """\
  peft-eas export merged merged-vllm --format nemotron-nas
  peft-eas export merged merged-gguf --format gguf --dtype q8_0
  peft-eas export merged merged-onnx --format onnx"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="folder or hub name of a merged model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for what is written; must be new or empty")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--dtype", help="float32, bfloat16, float16, or for gguf q8_0 (default: that of the model)")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="for gguf: llama.cpp's name, if it isn't recognised")


def run(args: argparse.Namespace) -> None:
    tokenizer = next(tokenizers([args.dir]), None)
    if tokenizer is None:
        print(f"There is no tokenizer in {args.dir}.", file=sys.stderr)
    export(load_model(args.dir), args.out, args.format, tokenizer, args.dtype, args.pre_tokenizer)
    files = sorted(args.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{args.out}: {', '.join(file.name for file in files)} ({size / 1e6:.1f} MB)")
