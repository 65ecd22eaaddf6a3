"""One of two processes that take attentions out of a model, each with batches of its own; of `test_distributed.py`.

torchrun --nproc-per-node 2 distributed_skip.py OUT
"""

import os
import sys

import torch
from transformers import PreTrainedModel
from zoo import tiny

from peft_eas import skip_attentions


def stripped(batches: range) -> PreTrainedModel:
    """A model without two of its attentions, chosen and replaced by what these batches show."""
    return skip_attentions(tiny.model("llama"), [tiny.inputs("llama", seed=seed) for seed in batches], num_skip=2)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    model = stripped(range(2 * rank, 2 * rank + 2))
    torch.save(model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
    model.save_pretrained(f"{sys.argv[1]}/saved")
    os._exit(0)  # taking gloo's threads down in order hangs now and then
