"""The README and docs/: what they show runs, and what they point to exists."""

import re
import runpy
from pathlib import Path

import pytest
from real_data import load_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"(?ms:^```.*?^```$)|(?m:^    .*$)", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"(?m:^#+ (.*)$)", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.search(r"(?m:^\.PHONY: (.*)$)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    assert {*re.findall(r"(?m:(?:^    |`)make ([\w-]+))", text)} <= {*targets}
    for script in re.findall(r"python ((?:examples|benchmarks|tests|docs)/\S+?\.py)", text):
        assert (ROOT / script).exists(), script


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_api_is_that_of_the_docstrings():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page, "`make api` writes it"


@pytest.mark.pretrained
def test_the_first_snippet_runs_as_it_is(tmp_path, monkeypatch, capsys):
    """With the tokenizer that it names, and a tiny model, as the hub may be out of reach."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    tokenizer = load_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=12, **sizes))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", {"HuggingFaceTB/SmolLM2-135M-Instruct": tokenizer}.get)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", {"HuggingFaceTB/SmolLM2-135M-Instruct": model}.get)
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"(?ms:^```python\n(.*?)^```$)", README)[1]
    exec(compile(snippet, "README.md", "exec"), {})
    assert "After 1041 comes" in capsys.readouterr().out
    monkeypatch.undo()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model-eas")
    assert sum(name.endswith("stand_in.constant") for name, _ in merged.named_parameters()) == 8
