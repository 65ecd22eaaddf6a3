"""Let a merged vision-language model answer in a process that has no peft_eas: `python elsewhere.py FOLDER BATCHES`.

BATCHES is a file of `torch.save` with a list of batches; the logits of their last tokens, `(rows, vocabulary)`, take
its place.
"""

import sys

import torch
from transformers import AutoModelForImageTextToText

if __name__ == "__main__":
    sys.modules["peft_eas"] = None  # as where it isn't installed; the folder has the code that the model needs
    folder, batches = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = [model(**batch, logits_to_keep=1).logits[:, -1] for batch in torch.load(batches)]
    torch.save(torch.cat(logits), batches)
