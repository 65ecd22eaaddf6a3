"""A real llama.cpp."""

import json
import subprocess
import sys
import urllib.request

import torch

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
