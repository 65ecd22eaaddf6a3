"""Pushing to a hub and loading by name: each process starts with an empty cache, as another machine does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def client(folder):
    """Runs a function of tests/hub_client.py in a process that knows of no hub but `client.hub`."""
    with HubServer() as hub:

        def run(function):
            environment = os.environ | hub.env(folder / f"home of {function}")
            command = [sys.executable, Path(__file__).with_name("hub_client.py"), function, folder]
            result = subprocess.run(
                command, env=environment, text=True, capture_output=True, check=False, stdin=subprocess.DEVNULL
            )
            assert result.returncode == 0, result.stderr[-4000:]

        run.hub = hub
        yield run


@pytest.fixture(scope="module")
def pushed(client, folder):
    client("push")
    return torch.load(folder / "pushed.pt")


@pytest.fixture(scope="module")
def loaded(client, folder, pushed):
    client("load")
    return torch.load(folder / "loaded.pt")


@pytest.fixture(scope="module")
def loaded_remote_code(client, folder, pushed):
    client("load_remote_code")
    return torch.load(folder / "loaded_remote_code.pt")


def same(actual, expected):
    """Bit for bit."""
    return all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_two_attempts_differ(pushed):
    assert not same(pushed["first"]["unmerged"], pushed["second"]["unmerged"])
    assert not same(pushed["first"]["merged"], pushed["second"]["merged"])


@pytest.mark.parametrize("name", ["adapter", "auto", "adapter-folder"])
def test_an_adapter_loads_by_name(pushed, loaded, name):
    assert same(loaded[name], pushed["second"]["unmerged"])


def test_an_older_adapter_loads_by_revision(pushed, loaded):
    assert same(loaded["first adapter"], pushed["first"]["unmerged"])


def test_a_merged_model_loads_by_name_with_peft_eas(pushed, loaded):
    assert same(loaded["merged"], pushed["second"]["merged"])


@pytest.mark.parametrize("name", ["merged", "merged-folder", "by its card"])
def test_a_merged_model_loads_by_name_without_peft_eas(pushed, loaded_remote_code, name):
    assert same(loaded_remote_code[name, "main"], pushed["second"]["merged"])


def test_a_sharded_model_loads_from_its_branch(pushed, loaded_remote_code):
    assert same(loaded_remote_code["sharded", "small"], pushed["second"]["merged"])


def test_an_older_merged_model_loads_by_commit_and_by_tag(pushed, loaded_remote_code):
    for revision in (pushed["first"]["merged commit"], "v1"):
        assert same(loaded_remote_code["merged", revision], pushed["first"]["merged"])


def test_its_decoder_loads_without_peft_eas(pushed, loaded_remote_code):
    assert torch.equal(loaded_remote_code["decoder"], pushed["second"]["merged"]["hidden"])


def test_without_trust_loading_is_refused(loaded_remote_code):
    assert "me/merged" in loaded_remote_code["refusal"]
    assert "trust_remote_code=True" in loaded_remote_code["refusal"]


def test_the_tokenizer_comes_along(loaded_remote_code):
    for name in ("merged", "merged-folder"):
        assert loaded_remote_code[name, "tokens"] == [4, 5, 6]


def test_what_is_in_the_repositories(client, pushed):
    hub = client.hub
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files("me/adapter"))
    runtime = Path(__file__).parent.parent / "peft_eas" / "runtime"
    sources = {path.name: path.read_bytes() for path in runtime.glob("*.py") if path.name != "__init__.py"}
    sharded = hub.files("me/sharded", "small")
    for files in (hub.files("me/merged"), hub.files("me/merged-folder"), sharded):
        config = json.loads(files["config.json"])
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_eas.EASLlamaForCausalLM"
        assert {path: content for path, content in files.items() if path.endswith(".py")} == sources
    assert "tokenizer.json" in hub.files("me/merged")
    shards = set(json.loads(sharded["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1
    assert shards < set(sharded)
    assert "config.json" not in hub.files("me/sharded", "main")


def test_pefts_card_of_an_adapter(client, pushed):
    """`PeftModel.save_pretrained` writes it, and the hub takes it; pushing an adapter loses it, see docs/hub.md."""
    data = ModelCard(client.hub.files("me/adapter-folder")["README.md"].decode()).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "me/base", "text-generation")
    assert "base_model:adapter:me/base" in data.tags


def test_the_command_line_trains_over_a_base_model_of_the_hub(folder, loaded):
    config = json.loads((folder / "trained" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert config["skip_layers"] == [1]


def test_the_card_of_a_merged_folder(client, pushed):
    card = ModelCard(client.hub.files("me/merged-folder")["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("me/base", "finetune")
    assert (card.data.license, card.data.license_name) == ("other", "their-own")
    assert card.data.license_link == f"{client.hub.url}/me/base/blob/main/LICENSE"
    assert "0 .#.### 5" in card.text


def test_a_pushed_model_has_its_card(client, pushed):
    hub = client.hub
    first = ModelCard(hub.files("me/merged", pushed["first"]["merged commit"])["README.md"].decode())
    second = ModelCard(hub.files("me/merged", pushed["second"]["merged commit"])["README.md"].decode())
    assert "0 .##.## 5" in first.text
    assert "0 .#.### 5" in second.text
    for card in first, second:
        assert card.text.startswith("\n# me/merged\n")
        assert (card.data.base_model, card.data.license_name) == ("me/base", "their-own")
        assert "More Information Needed" not in card.text
    assert first.data.tags == ["eas", "attention-skipping", "first"]
    assert second.data.tags == ["eas", "attention-skipping", "first", "second"]
    assert hub.files("me/merged")["README.md"].decode() == str(second), "the tokenizer's push has changed it"
    assert "0 .#.### 5" in hub.files("me/sharded", "small")["README.md"].decode()


def test_a_card_that_somebody_wrote_is_kept_by_a_push(client, pushed):
    assert "config.json" in client.hub.files("me/written")
    assert client.hub.files("me/written")["README.md"] == b"---\nlicense: mit\n---\nText.\n"
