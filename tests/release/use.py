"""Train a tiny Llama for one step with EAS, merge it, save it, and load it where peft_eas is not imported.

python use.py FOLDER, in an environment that has peft_eas and what it needs, and nothing else.
"""

import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_eas

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/merged", trust_remote_code=True)
assert "peft_eas" not in sys.modules and "peft" not in sys.modules
ids, logits = torch.load(folder + "/expected.pt")
assert torch.equal(model(ids).logits, logits)
"""


def main(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_hidden_layers=4, **sizes))
    ids = torch.randint(3, 97, (2, 12))
    config = peft_eas.EASConfig(skip_layers=[1, 2], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    peft_eas.initialize_eas_weights(model, [{"input_ids": ids}])

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()

    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids, labels=ids)
        assert trained.loss < before
        merged = model.merge_and_unload()
        logits = merged(ids).logits
    torch.testing.assert_close(logits, trained.logits, rtol=1e-4, atol=1e-4)

    merged.save_pretrained(folder / "merged")
    torch.save((ids, logits), folder / "expected.pt")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "merged")(ids).logits, logits)
    subprocess.run([sys.executable, "-c", RELOAD, str(folder)], check=True)
    print(f"peft_eas {peft_eas.__version__} of {Path(peft_eas.__file__).parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
