"""The command line, on a tiny model in a folder."""

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path

import attacks
import damage
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    TrainingArguments,
)
from zoo import tiny

from peft_eas import EASConfig, cli, model_card, score_attentions, skip_attentions


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"w{i} w{2 * i} w{3 * i}", "completion": f" w{10 + i % 2}"} for i in range(4, 28)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    options = "--num-skip 2 --search-steps 6 --max_steps 14 --per_device_train_batch_size 4 --report_to none --use_cpu"
    command = ["train", str(base), str(data), "--search-data", str(data), "--output_dir", str(out), *options.split()]
    assert cli.main([*command, "--save_strategy", "steps", "--save_steps", "2"]) == 0
    return out


def fails(capsys, *argv, code=1):
    capsys.readouterr()
    assert cli.main([str(a) for a in argv]) == code
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return streams.err.strip().splitlines()[-1]


def test_score(base, data, capsys):
    assert cli.main(["score", str(base), str(data), "--examples", "6", "--json", "--method", "loss"]) == 0
    streams = capsys.readouterr()
    assert "Trying attentions: 100%" in streams.err
    scores = {int(k): v for k, v in json.loads(streams.out).items()}
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in data.read_text().splitlines()[:6]]
    ids = torch.tensor([tokenizer(r["prompt"]).input_ids + tokenizer(r["completion"]).input_ids + [2] for r in rows])
    labels = ids.clone()
    labels[:, :3] = -100
    expected = score_attentions(tiny.model("llama"), [{"input_ids": ids, "labels": labels}], method="loss")
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert list(scores) == sorted(scores, key=scores.get)
    assert cli.main(["score", str(base), str(data)]) == 0
    streams = capsys.readouterr()
    assert "Measuring attentions: 100%" in streams.err
    assert re.search(r"Trying sets: [1-9]\d*set ", streams.err)
    lines = streams.out.splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["layer", "growth"]


def test_skip(base, data, tmp_path, capsys):
    out = tmp_path / "smaller"
    assert cli.main(["skip", str(base), str(data), str(out), "--num-skip", "3", "--r-pia", "4", "--examples", "8"]) == 0
    said, progress = capsys.readouterr()
    assert re.search(r"Measuring attentions: [1-9]\d*batch ", progress)  # of those that are skipped, after the scores
    rows = [json.loads(line) for line in data.read_text().splitlines()[:8]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(r["prompt"]).input_ids + tokenizer(r["completion"]).input_ids + [2] for r in rows])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = skip_attentions(tiny.model("llama"), [batch], num_skip=3, r_pia=4)
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.config.eas["attentions"] == expected.config.eas["attentions"]
    torch.testing.assert_close(saved(**batch).logits, expected(**batch).logits)
    assert f"without the attentions of {saved.config.eas['attentions'][0]['skip']}" in said
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert "taken out by `skip_attentions`" in ModelCard.load(out / "README.md").text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["smaller"]
    assert "is not an empty folder" in fails(capsys, "skip", base, data, out)
    others = ["--skip-layers", "0", "3", "--stand-in", "zero"]
    assert cli.main(["skip", str(base), str(data), str(tmp_path / "other"), *others]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "other").config.eas["attentions"][0]["skip"] == [0, 3]
    for wrong, message in (("--num-skip=auto", "needs a search"), ("--num-skip=7", "more than the 6 attentions")):
        assert message in fails(capsys, "skip", base, data, tmp_path / "none", wrong)
    assert not (tmp_path / "none").exists()


def test_train_searches_and_saves_an_adapter(base, adapter):
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    report = json.loads((adapter / "report.json").read_text())
    assert loaded.skip_layers == report["skip_layers"]
    assert len(report["skip_layers"]) == 2
    assert report["held_out"] == "search_dataset"
    assert (report["warmup"], report["settle"], report["seed"]) == (1, 7, 42)
    arguments = torch.load(adapter / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.learning_rate == 1e-3
    assert AutoTokenizer.from_pretrained(adapter).eos_token == "<eos>"
    assert {"eas", "attention-skipping"} < set(ModelCard.load(adapter / "README.md").data.tags)


def test_merge(base, adapter, tmp_path, capsys):
    out = tmp_path / "deeper" / "merged"
    assert cli.main(["merge", str(adapter), str(out), "--base", str(base)]) == 0
    assert "without the attentions of" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    inputs = tiny.inputs("llama")
    torch.testing.assert_close(merged(**inputs).logits, unmerged(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert sorted(p.name for p in out.parent.iterdir()) == ["merged"]
    assert "is not an empty folder" in fails(capsys, "merge", adapter, out)
    # the adapter says where its base is
    assert cli.main(["merge", str(adapter), str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == torch.bfloat16


def test_merge_of_a_vision_language_model(base, tmp_path, capsys):
    """With its processor, which comes before a tokenizer alone."""
    model = tiny.model("llava")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<image>", special_tokens=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model.save_pretrained(tmp_path / "base")
    LlavaProcessor(images, tokenizer, patch_size=4).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, EASConfig(skip_layers=[1, 4]))
    tiny.shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "adapter"), str(out), "--base", str(tmp_path / "base")]) == 0
    assert "without the attentions of [1, 4]" in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(out)
    inputs = tiny.inputs("llava")
    expected = adapted.eval()(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, LlavaProcessor)
    assert processor.image_processor.crop_size["height"] == 8
    assert processor.tokenizer.eos_token == "<eos>"


def test_merge_with_a_frozen_context(base, data, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "frozen"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), EASConfig(skip_layers=[1], propagation="mean"))
    tiny.shake(adapted)
    adapted.save_pretrained(adapter)
    assert cli.main(["merge", str(adapter), str(out), "--freeze-context", str(data)]) == 0
    assert "context frozen to the mean of 120 tokens: loss" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert [(s["rank"], s["mean_rank"]) for s in merged.config.eas["attentions"][0]["stand_ins"]] == [(0, 0)]
    said = _said(capsys, "inspect", out)
    assert "say nothing of other tokens" in said
    assert "leave a constant" in said
    assert "There is no file" in fails(capsys, "merge", adapter, tmp_path / "x", "--freeze-context", "none.jsonl")
    assert not (tmp_path / "x").exists()


def _said(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def test_merge_writes_a_card(base, adapter, tmp_path, capsys):
    """With the base model's license, and what the adapter's card says of data and results."""
    result = EvalResult("text-generation", "me/words", "Words", "accuracy", 0.5)
    about = ModelCardData(datasets=["me/words"], language="la", license="mit", eval_results=[result], model_name="a")
    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    ModelCard(f"---\n{about.to_yaml()}\n---\n").save(changed / "README.md")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    assert cli.main(["merge", str(changed), str(tmp_path / "out"), "--base", str(tmp_path / "base")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", "la", ["me/words"])
    assert card.data.eval_results == [result]
    assert card.data.base_model is None  # a folder
    assert str(tmp_path) not in str(card)
    assert "`r=16`, `r_pia=32`" in card.text
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    picture = re.search(r"0 [.#]{6} 5", capsys.readouterr().out)[0]
    assert picture in card.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.eas["config"]["r_pia"] == 32
    assert model_card(merged).data.license == "apache-2.0"


def test_inspect(base, adapter, tmp_path, capsys):
    skipped = json.loads((adapter / "report.json").read_text())["skip_layers"]
    assert cli.main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    for folder, kind in (
        (adapter, "adapter"),
        (adapter / "checkpoint-4", "adapter, set not"),
        (tmp_path / "merged", "merged"),
    ):
        assert cli.main(["inspect", str(folder), "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["kind"].startswith(kind)
        assert about["attentions"] == list(range(6))
        if kind != "adapter, set not":
            assert about["skip_layers"] == skipped
        with safe_open(next(folder.glob("*.safetensors")), "pt") as tensors:
            sizes = {name: tensors.get_tensor(name).numel() for name in tensors.keys()}  # noqa: SIM118
        assert about["parameters"] == sum(n for name, n in sizes.items() if not name.endswith("eas_skip"))
        assert cli.main(["inspect", str(folder)]) == 0
        printed = capsys.readouterr().out
        drawn = re.search(r"0 ([.#]{6}) 5", printed)[1]
        assert [i for i, mark in enumerate(drawn) if mark == "."] == about["skip_layers"]


def test_inspect_lists_layers_in_order(tmp_path, capsys):
    base = tiny.model("llama", changes=dict(num_hidden_layers=11))
    get_peft_model(base, EASConfig(skip_layers=[2, 10])).save_pretrained(tmp_path)
    about = json.loads(_said(capsys, "inspect", tmp_path, "--json"))
    assert (about["skip_layers"], about["attentions"]) == ([2, 10], list(range(11)))


def test_what_the_user_can_put_right_is_said_in_one_line(base, data, adapter, tmp_path, capsys):
    assert "There is no file" in fails(capsys, "score", base, tmp_path / "none.jsonl")
    assert "none" in fails(capsys, "score", tmp_path / "none", data)
    (tmp_path / "odd.jsonl").write_text('{"question": "w1"}\n')
    assert "has the columns ['question']" in fails(capsys, "score", base, tmp_path / "odd.jsonl")
    for odd, said in (
        ("", "it is empty"),
        ('{"text": "w1"}\n{"text"', "JSON"),
        ('{"text": "w1"}\n{"text": null}\n', "`text` of row 2 is no text, but None"),
        ('{"prompt": "w1", "completion": 1}\n', "`completion` of row 1 is no text, but 1"),
    ):
        (tmp_path / "odd.jsonl").write_text(odd)
        assert said in fails(capsys, "score", base, tmp_path / "odd.jsonl")
    (tmp_path / "text.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    train = ["train", base, tmp_path / "text.jsonl", "--output_dir", tmp_path / "out"]
    assert "`max_loss_increase`" in fails(capsys, *train, "--num-skip", "auto")
    assert "`--warm-start` is for a search" in fails(capsys, *train, "--skip-layers", "1", "--warm-start", "depth")
    assert "['--no_such_option', '1']" in fails(capsys, *train, "--no_such_option", "1")
    assert "adapter_config.json" in fails(capsys, "merge", tmp_path / "none", tmp_path / "out")
    assert "There is no folder" in fails(capsys, "inspect", tmp_path / "none")
    assert "not merged by peft_eas" in fails(capsys, "inspect", base)
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in fails(capsys, "inspect", tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:1000])
    assert "is damaged" in fails(capsys, "inspect", broken)
    for wrong in (["inspect"], ["score", str(base), str(data), "--examples", "0"], ["inspect", str(base), "--what"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2


def test_odd_data_and_arguments_are_refused(base, tmp_path, monkeypatch, capfd):
    """No exception, and nothing that a terminal takes for a command."""
    monkeypatch.chdir(tmp_path)
    seen = attacks.outcomes(attacks.wrong_data(tmp_path / "data", base))
    assert set(seen) == {"works", "refused"}
    assert seen["works"] == 4  # a BOM, a very long row twice, a line separator
    assert "\x1b" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("file", ["adapter_config.json", "report.json"])
def test_an_adapter_whose_files_were_changed_is_inspected_or_refused(adapter, file, tmp_path, capfd):
    seen = attacks.outcomes(attacks.changed_folders(tmp_path, adapter, file, lambda f: ["inspect", f], count=60))
    assert set(seen) <= {"works", "refused"}
    assert seen["works"] > 10
    assert seen["refused"] == 0 or file != "report.json"  # what is inspected is the adapter
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_merged_model_is_verified(base, adapter, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(adapter), str(merged)]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(merged), "--verify"]) == 0
    assert "verified     model.safetensors\n" in capsys.readouterr().out
    for _ in damage.flip_bits(merged / "model.safetensors", count=3):
        assert "model.safetensors" in fails(capsys, "inspect", merged, "--verify")
        assert cli.main(["inspect", str(merged)]) == 0
    assert "adapters have none" in fails(capsys, "inspect", adapter, "--verify")


def test_a_merged_model_whose_configuration_was_changed_is_inspected_or_refused(base, adapter, tmp_path, capfd):
    assert cli.main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    changed = attacks.changed_folders(tmp_path, tmp_path / "merged", "config.json", lambda f: ["inspect", f], count=40)
    assert set(attacks.outcomes(changed)) == {"works", "refused"}
    assert "\x1b" not in "".join(capfd.readouterr())


def changed(adapter, folder, **settings):
    """A copy of an adapter with another configuration."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_what_a_file_says_is_no_command_for_the_terminal(adapter, tmp_path, capsys):
    odd = changed(adapter, tmp_path / "odd", base_model_name_or_path="no\x1b[2J\nskips")
    assert [line.split()[0] for line in _said(capsys, "inspect", odd).splitlines()].count("skips") == 1
    assert cli.main(["inspect", str(odd)]) == 0
    assert cli.main(["merge", str(odd), str(tmp_path / "out")]) == 1
    streams = capsys.readouterr()
    assert "\x1b" not in streams.out + streams.err
    assert r"no\x1b[2J" in streams.out
    assert r"no\x1b[2J" in streams.err


def test_an_adapter_s_class_of_models_is_one(base, adapter, tmp_path, capsys):
    for number, name in enumerate(("pipeline", "TrainingArguments", "utils", "AutoConfig", "logging")):
        wrong = changed(adapter, tmp_path / str(number), task_type=None, auto_mapping={"base_model_class": name})
        said = fails(capsys, "merge", wrong, tmp_path / "out", "--base", base)
        assert f"names '{name}' as its `base_model_class`, which is no class of models" in said
    for number, given in enumerate(("x", ["pipeline"], {"base_model_class": ["pipeline"]}, {}), start=9):
        odd = changed(adapter, tmp_path / str(number), auto_mapping=given)
        assert cli.main(["merge", str(odd), str(tmp_path / f"out{number}"), "--base", str(base)]) == 0


def test_ranks_that_ask_for_all_memory_are_refused_before_anything_is_made(base, adapter, tmp_path, capsys):
    for rank, said in (
        (10**7, "`r_pia` must be an integer from 1 to 65536"),
        (2**16, "at most the model's hidden size"),
    ):
        wrong = changed(adapter, tmp_path / str(rank), r_pia=rank)
        tracemalloc.start()
        assert said in fails(capsys, "merge", wrong, tmp_path / "out", "--base", base)
        assert tracemalloc.get_traced_memory()[1] < 10**8
        tracemalloc.stop()


def test_a_report_that_is_none_is_left_out_with_a_warning(adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    for odd in ("", "null", '{"layers": 1}', "[]"):
        (tmp_path / "adapter" / "report.json").write_text(odd)
        assert cli.main(["inspect", str(tmp_path / "adapter")]) == 0
        streams = capsys.readouterr()
        assert "The search is left out" in streams.err
        assert "report.json is not the report of a search" in streams.err
        assert "skips        2 of 6" in streams.out


def test_text_without_prompts_trains(base, adapter, tmp_path, capsys):
    (tmp_path / "text.csv").write_text("text\n" + "".join(f"w{i} w{2 * i} w{i + 1}\n" for i in range(12)))
    options = "--skip-layers 1 4 --max_steps 2 --report_to none --use_cpu --learning_rate 0.002"
    command = ["train", str(base), str(tmp_path / "text.csv"), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*command, *options.split()]) == 0
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").skip_layers == [1, 4]
    assert not (tmp_path / "out" / "report.json").exists()
    capsys.readouterr()
    # that of an earlier training into the folder is not this one's
    (tmp_path / "out" / "report.json").write_text((adapter / "report.json").read_text())
    assert "search" not in json.loads(_said(capsys, "inspect", tmp_path / "out", "--json"))
    assert "search" in json.loads(_said(capsys, "inspect", adapter, "--json"))


def test_train_takes_every_setting(base, data, tmp_path, capsys):
    options = (
        "--skip-layers 1 3 --r 4 --r-pia 8 --groups 2 --router static --propagation mean --stand-in zero --dropout 0.1 "
        "--scaling 2 --no-use-bias --no-init-weights --target-modules .*(self_attn|mlp) --exclude-modules layers.5.mlp "
        "--layers-to-transform 0 1 2 3 5 --modules-to-save lm_head --max-steps 1 --report-to none --use-cpu"
    )
    assert cli.main(["train", str(base), str(data), "--output-dir", str(tmp_path), *options.split()]) == 0
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = dict(
        skip_layers=[1, 3], r=4, r_pia=8, groups=2, router="static", propagation="mean", stand_in="zero", dropout=0.1,
        scaling=2.0, use_bias=False, init_weights=False, target_modules=".*(self_attn|mlp)",
        exclude_modules=["layers.5.mlp"], layers_to_transform=[0, 1, 2, 3, 5], modules_to_save=["lm_head"],
    )  # fmt: skip
    assert {name: saved[name] for name in expected} == expected
    assert TrainingArguments(tmp_path).learning_rate != 1e-3
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == 1e-3
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in said for name in EASConfig.__annotations__)
    assert not EASConfig.__annotations__.keys() & {setting.name for setting in fields(TrainingArguments)}


def test_rows_that_are_left_out_are_counted(base, tmp_path, capsys):
    rows = [{"prompt": "w1 " * n, "completion": "w2"} for n in (2, 9, 3, 12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["score", str(base), str(tmp_path / "long.jsonl"), "--max-length", "6"]) == 0
    assert "2 of 4 rows left out" in capsys.readouterr().err


def test_help_has_examples(capsys):
    for command in ("score", "skip", "train", "merge", "export", "inspect"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"examples:\n  peft-eas {command} " in capsys.readouterr().out
    program = Path(sys.executable).with_name("peft-eas")
    failed = subprocess.run([str(program), "inspect", "nowhere"], text=True, capture_output=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.endswith("peft-eas inspect: error: There is no folder nowhere.\n")
    assert "Traceback" not in failed.stderr
