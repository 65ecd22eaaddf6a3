"""What tests/test_hub.py lets other processes do, which have a hub in their environment.

python tests/hub_client.py push|load|load_remote_code FOLDER
"""

import re
import sys
from pathlib import Path

import torch

INPUTS = {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(3))}


def outputs(model):
    model.eval()
    with torch.no_grad():
        forward = model(**INPUTS, output_hidden_states=True)
    tokens = model.generate(**INPUTS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {"logits": forward.logits, "hidden": forward.hidden_states[-1], "tokens": tokens}


def push(folder):
    """Push a base model, and twice an adapter and what it merges to; then the merged model in other ways."""
    from huggingface_hub import create_repo, create_tag, upload_file, upload_folder, whoami
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from zoo import tiny

    from peft_eas import EASConfig, cli

    assert whoami()["name"] == "me"
    tokenizer = tiny.tokenizer()
    tiny.model("llama").push_to_hub("me/base")
    tokenizer.push_to_hub("me/base")
    card = b"---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\n---\nText.\n"
    upload_file(repo_id="me/base", path_in_repo="README.md", path_or_fileobj=card)
    done = {}
    for attempt, seed, skip in ("first", 2, [0, 3]), ("second", 5, [0, 2]):
        base = AutoModelForCausalLM.from_pretrained("me/base")
        model = get_peft_model(base, EASConfig(skip_layers=skip, r_pia=8, task_type="CAUSAL_LM"))
        tiny.shake(model, seed)
        done[attempt] = {"unmerged": outputs(model), "adapter commit": model.push_to_hub("me/adapter").oid}
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload()
        done[attempt] |= {
            "merged": outputs(merged),
            "merged commit": merged.push_to_hub("me/merged", tags=[attempt]).oid,
        }
    create_tag("me/merged", tag="v1", revision=done["first"]["merged commit"])
    tokenizer.push_to_hub("me/merged")
    merged.push_to_hub("me/sharded", max_shard_size="40KB", revision="small")
    create_repo("me/written")
    upload_file(repo_id="me/written", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\nText.\n")
    merged.push_to_hub("me/written")
    create_repo("me/adapter-folder")
    upload_folder(repo_id="me/adapter-folder", folder_path=folder / "adapter")
    assert cli.main(["merge", "me/adapter", str(folder / "merged")]) == 0
    create_repo("me/merged-folder")
    upload_folder(repo_id="me/merged-folder", folder_path=folder / "merged")
    torch.save(done, folder / "pushed.pt")


def load(folder):
    """Load everything with peft_eas."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    from peft_eas import cli

    done = torch.load(folder / "pushed.pt")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    loaded = {"adapter": outputs(PeftModel.from_pretrained(base, "me/adapter"))}
    base = AutoModelForCausalLM.from_pretrained("me/base")
    first = done["first"]["adapter commit"]
    loaded["first adapter"] = outputs(PeftModel.from_pretrained(base, "me/adapter", revision=first))
    loaded["auto"] = outputs(AutoPeftModelForCausalLM.from_pretrained("me/adapter"))
    loaded["adapter-folder"] = outputs(AutoPeftModelForCausalLM.from_pretrained("me/adapter-folder"))
    loaded["merged"] = outputs(AutoModelForCausalLM.from_pretrained("me/merged"))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "w{i} w{2 * i}", "completion": " w{i}"}}\n' for i in range(8)))
    assert cli.main(["score", "me/base", str(rows)]) == 0
    options = ["--skip-layers", "1", "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    assert cli.main(["train", "me/base", str(rows), "--output_dir", str(folder / "trained"), *options]) == 0
    torch.save(loaded, folder / "loaded.pt")


def load_remote_code(folder):
    """Load the merged models where neither peft_eas nor PEFT can be imported."""
    sys.modules.update({"peft_eas": None, "peft": None})
    from huggingface_hub import hf_hub_download
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    done = torch.load(folder / "pushed.pt")
    loaded = {}
    for name, revision in (
        ("merged", "main"),
        ("merged", done["first"]["merged commit"]),
        ("merged", "v1"),
        ("sharded", "small"),
        ("merged-folder", "main"),
    ):
        model = AutoModelForCausalLM.from_pretrained(f"me/{name}", revision=revision, trust_remote_code=True)
        loaded[name, revision] = outputs(model)
    with torch.no_grad():
        decoder = AutoModel.from_pretrained("me/merged", trust_remote_code=True).eval()
        loaded["decoder"] = decoder(**INPUTS).last_hidden_state
    card = Path(hf_hub_download("me/merged-folder", "README.md")).read_text()
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace('"..."', '"me/merged-folder"'), names := {})
    loaded["by its card", "main"] = outputs(names["model"])
    for name in ("merged", "merged-folder"):
        loaded[name, "tokens"] = AutoTokenizer.from_pretrained(f"me/{name}")("w1 w2 w3").input_ids
    try:
        AutoModelForCausalLM.from_pretrained("me/merged")
    except ValueError as error:
        loaded["refusal"] = str(error)
    torch.save(loaded, folder / "loaded_remote_code.pt")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
