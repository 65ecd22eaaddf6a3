"""examples/llava_scienceqa.py and lavin_scienceqa.py from their first line to their last, and what they read."""

import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import lavin_model
import lavin_scienceqa
import llava_scienceqa
import made
import paper
import pytest
import torch
import vqa
from peft import get_peft_model
from real_data import COLORS, SHAPES
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_eas import EASConfig

SCRIPTS = {"llava": llava_scienceqa, "lavin": lavin_scienceqa}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.made_scienceqa(tmp_path_factory.mktemp("scienceqa"))


@pytest.fixture
def copied(folder, tmp_path):
    """A folder to break, and a function that changes one question of it."""
    shutil.copytree(folder, tmp_path / "data")
    file = tmp_path / "data" / "problems.json"

    def change(**settings):
        problems = json.loads(file.read_text())
        problems["18"] |= settings
        file.write_text(json.dumps({n: {k: v for k, v in p.items() if v != "gone"} for n, p in problems.items()}))

    return tmp_path / "data", change


# The whole scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCRIPTS)
def ran(request, tmp_path_factory):
    """The script's name, what it printed, and the folder of the merged model."""
    out = tmp_path_factory.mktemp(request.param)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", ["script.py", "--tiny", "--output", str(out)])
        SCRIPTS[request.param].main()
    return request.param, printed.getvalue(), out


def test_what_is_merged_saved_and_loaded_says_what_was_trained(ran):
    name, printed, out = ran
    for what in ("merging", "saving and loading"):
        assert float(re.search(rf"Largest difference that {what} makes to a logit.*: (\S+)", printed)[1]) < 1e-4
    skipped = json.loads(re.search(r"EAS skips (\[.*\]), out of 6", printed)[1])
    report = json.loads((out / "report.json").read_text())
    config = json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert (
        ("import lavin_model\n" in card)
        == ("LavinForConditionalGeneration is no class of" in card)
        == (name == "lavin")
    )
    assert ("trust_remote_code=True" in card) == (name == "llava")
    assert len(skipped) == 2
    assert report["skip_layers"] == config["eas"]["attentions"][0]["skip"] == skipped


def test_the_table_is_what_the_merged_model_answers_alone(ran, folder):
    name, printed, out = ran
    header, *rows = printed.split("== Merging, testing and timing\n")[1].splitlines()
    names = ["base", "EAS, not merged", "EAS, merged"]
    if name == "lavin":
        names = ["adapters in every layer", *names]
    assert [re.split(r"\s{2,}", row)[0] for row in rows[: len(names)]] == names
    cells = dict(zip(header.split(), re.split(r"\s{2,}", rows[len(names) - 1])[1:], strict=False))
    problems = paper.read_scienceqa(folder, "test")
    model, processor = AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    right = []
    for problem in problems:  # without padding
        image = paper.load_image(problem.image) if problem.image else None
        text = f"{'<image> ' if image else ''}{problem.prompt} The answer is"
        with torch.no_grad():
            logits = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1]
        letters = processor.tokenizer.convert_tokens_to_ids([*"ABCDEFGH"[: len(problem.choices)]])
        right.append(logits[letters].argmax().item() == problem.answer)
    assert float(cells["Avg"]) == pytest.approx(100 * sum(right) / len(right), abs=0.01)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_wrong_with_the_data_is_said_before_training(name, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["script.py", "--tiny", "--splits", "train", "val", "test", "--output", str(tmp_path)]
    )
    with pytest.raises(paper.DataError, match=r"pid_splits.json has no split 'val'; it has train, minival, test\."):
        SCRIPTS[name].main()


def test_a_checkpoint_of_another_model_is_refused(monkeypatch, tmp_path, folder):
    tower, llama = str(tmp_path / "tower"), str(tmp_path / "llama")
    made.tiny_tower().save_pretrained(tower)
    made.tiny_language_model(made.tiny_tokenizer()).save_pretrained(llama)
    for name, options, message in (
        ("llava", ["--model", llama], r"llama is a model of the type 'llama'; 'llava' is needed"),
        ("lavin", ["--vision-tower", llama], r"llama is .* 'llama'; 'clip' or 'clip_vision_model' is needed"),
        ("lavin", ["--vision-tower", tower, "--language-model", tower], r"'clip_vision_model'; 'llama' is needed"),
    ):
        monkeypatch.setattr("sys.argv", ["script.py", "--data", str(folder), "--output", str(tmp_path), *options])
        with pytest.raises(paper.DataError, match=message):
            SCRIPTS[name].main()


def test_parts_that_exist_are_put_together(tmp_path):
    """As the default of LaVIN: a tower, and a language model, each with its weights; every fourth layer is seen."""
    tower, llama = made.tiny_tower(8), made.tiny_language_model(made.tiny_tokenizer())
    tower.save_pretrained(tmp_path / "tower")
    llama.save_pretrained(tmp_path / "llama")
    made.tiny_tokenizer().save_pretrained(tmp_path / "llama")
    args = SimpleNamespace(
        tiny=False, small=False, seed=0, vision_tower=tmp_path / "tower", language_model=tmp_path / "llama"
    )
    model, _ = lavin_scienceqa.pretrained(args)
    assert model.config.vision_layers == (4, 8)
    for part, original in ((model.model.vision_tower, tower), (model.model.language_model, llama.model)):
        for name, value in original.state_dict().items():
            assert torch.equal(part.state_dict()[name][: len(value)] if value.dim() else value, value), name


# ScienceQA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(choices=[]), r"`answer` is \d, which is none of its 0 `choices`"),
        (dict(answer=9), r"`answer` is 9, which is none of its \d `choices`"),
        (dict(answer="A"), r"`answer` is 'A'"),
        (dict(question="gone"), r"it has no 'question'"),
        (dict(grade="college"), r"`grade` 'college'"),
        (dict(subject="alchemy"), r"`subject` is 'alchemy'"),
        (dict(image="image.png", split="val"), r"its image .*images.val.18.image\.png is missing"),
    ],
    ids=str,
)
def test_a_question_that_is_not_as_published_is_refused(copied, settings, message):
    data, change = copied
    change(**settings)
    with pytest.raises(paper.DataError, match=rf"problems\.json, question 18: .*{message}"):
        paper.read_scienceqa(data, "minival")


def test_files_that_are_not_there_or_not_readable_are_named(copied):
    data, _ = copied
    splits = json.loads((data / "pid_splits.json").read_text())
    (data / "pid_splits.json").write_text(json.dumps(splits | {"val": ["99"]}))
    with pytest.raises(paper.DataError, match=r"problems\.json, question 99: .*no '99'"):
        paper.read_scienceqa(data, "val")
    image = next(problem.image for problem in paper.read_scienceqa(data, "train") if problem.image)
    image.write_bytes(b"GIF89a")
    with pytest.raises(paper.DataError, match=rf"{re.escape(str(image))} can't be read as an image"):
        paper.load_image(image)
    (data / "problems.json").write_text("{")
    with pytest.raises(paper.DataError, match=r"problems\.json is not JSON"):
        paper.read_scienceqa(data, "train")
    with pytest.raises(paper.DataError, match=r"There is no .*nowhere.problems\.json"):
        paper.read_scienceqa(data / "nowhere", "train")


def test_categories_are_those_of_scienceqa(folder):
    """By the rows of the files, as ScienceQA's own evaluation has them."""
    rows = json.loads((folder / "problems.json").read_text())
    names = json.loads((folder / "pid_splits.json").read_text())["train"]
    right = torch.arange(len(names)) % 3 == 0
    members = {
        "NAT": lambda row: row["subject"] == "natural science",
        "SOC": lambda row: row["subject"] == "social science",
        "LAN": lambda row: row["subject"] == "language science",
        "TXT": lambda row: row["hint"] != "",
        "IMG": lambda row: row["image"] is not None,
        "NO": lambda row: row["hint"] == "" and row["image"] is None,
        "G1-6": lambda row: row["grade"] in [f"grade{i}" for i in range(1, 7)],
        "G7-12": lambda row: row["grade"] in [f"grade{i}" for i in range(7, 13)],
        "Avg": lambda row: True,
    }
    expected = {}
    for category, belongs in members.items():
        chosen = [bool(good) for good, name in zip(right, names, strict=True) if belongs(rows[name])]
        expected[category] = f"{100 * sum(chosen) / len(chosen):.2f}"
    assert paper.by_category(right, paper.read_scienceqa(folder, "train")) == expected
    some = [problem for problem in paper.read_scienceqa(folder, "train") if problem.image]
    assert paper.by_category(torch.ones(len(some)).bool(), some)["IMG"] == "100.00"
    assert "TXT" not in paper.by_category(torch.ones(len(some)).bool(), some)


@pytest.mark.parametrize("name", SCRIPTS)
def test_batches_are_prompts_images_and_labels_for_the_responses(folder, name):
    args = {"llava": (vqa.put_together,), "lavin": (lavin_model.put_together, (1, 2))}[name]
    tokenizer = made.tiny_tokenizer()
    _, processor = args[0](made.tiny_tower(), made.tiny_language_model(tokenizer), tokenizer, *args[1:])
    problems = paper.read_scienceqa(folder, "train")[:6]
    batch = llava_scienceqa.collate(problems, processor)
    places = {"llava": 4, "lavin": 2}[name]  # patches, or layers
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [places * bool(problem.image) for problem in problems]
    assert len(batch["pixel_values"]) == sum(bool(problem.image) for problem in problems)
    assert (batch["attention_mask"] == 0).any()
    for ids, mask, labels, problem in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], problems, strict=True
    ):
        because = f" BECAUSE: {problem.explanation}" if problem.explanation else ""
        words = f"The answer is {'ABCDEFGH'[problem.answer]} .{because} </s>".split()
        expected = tokenizer.convert_tokens_to_ids(words)
        assert labels[labels != -100].tolist() == expected
        assert ids[labels != -100].tolist() == expected
        assert labels[-len(expected) :].tolist() == expected
        told = tokenizer.decode(ids[mask.bool() & (labels == -100) & (ids != image)])
        assert f"Question: {problem.question} Context: {problem.hint or 'N/A'} Options: (A)" in " ".join(told.split())
    texts = [problem for problem in problems if not problem.image]
    assert "pixel_values" not in llava_scienceqa.collate(texts, processor)


def test_the_answer_is_the_likeliest_letter_of_the_choices(folder):
    tokenizer = made.tiny_tokenizer()
    problems = [problem for problem in paper.read_scienceqa(folder, "train") if len(problem.choices) == 3][:4]
    logits = torch.zeros(4, len(tokenizer))
    said = [(problem.answer + off) % 3 for problem, off in zip(problems, (0, 1, 0, 2), strict=True)]
    for row, letter in enumerate(said):
        logits[row, tokenizer.convert_tokens_to_ids("ABC"[letter])] = 1
        logits[row, tokenizer.convert_tokens_to_ids("D")] = 2  # there is no such choice
        logits[row, tokenizer.convert_tokens_to_ids("shape")] = 3
    right = llava_scienceqa.right_answers(logits, problems, SimpleNamespace(tokenizer=tokenizer))
    assert right.tolist() == [True, False, True, False]


def test_times_are_ratios_of_the_same_round(monkeypatch):
    clock = iter([0, 9, 0, 9, 0, 2, 0, 1, 0, 4, 0, 4, 0, 6, 0, 2])  # one round to warm up, and three
    monkeypatch.setattr(paper.time, "perf_counter", lambda: next(clock))
    calls = []
    cells = paper.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, samples=2, rounds=3)
    assert calls == ["a", "b"] * 4
    assert cells["a"] == {"ms/sample": "2000.0", "speed": "1.00x [1.00, 1.00]"}
    assert cells["b"]["ms/sample"] == "1000.0"
    assert cells["b"]["speed"].startswith("2.00x [1.00, 3.00")


# LaVIN ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lavin():
    torch.manual_seed(0)
    tokenizer = made.tiny_tokenizer()
    model, processor = lavin_model.put_together(
        made.tiny_tower(3), made.tiny_language_model(tokenizer), tokenizer, (1, 3)
    )
    return model.eval(), processor


def test_an_image_is_the_class_tokens_of_some_layers_in_front_of_the_text(lavin):
    """Against the language model, given by hand what two linears make of the tower's states."""
    model, processor = lavin
    picture = made.drawing("red", "circle", 32)
    batch = processor(images=[picture], text=["<image> what color is it?"], return_tensors="pt")
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        first, _, second = model.model.projector
        tokens = torch.cat([second(torch.nn.functional.silu(first(states[i][:, 0]))) for i in (1, 3)])
        ids = batch["input_ids"][0]
        assert (ids == model.config.image_token_id).tolist()[:2] == [True, True]
        text = model.get_input_embeddings()(ids[2:])
        hidden = model.model.language_model(inputs_embeds=torch.cat([tokens, text])[None]).last_hidden_state
        torch.testing.assert_close(model(**batch).logits, model.lm_head(hidden))
        assert len(model(**batch, logits_to_keep=1).logits[0]) == 1
    with pytest.raises(ValueError, match=r"1 images have 2 tokens, and `input_ids` 0 places for them"):
        model(input_ids=ids[None, 2:], pixel_values=batch["pixel_values"])


def test_it_generates_with_a_cache_as_without_and_merged_as_before(lavin):
    model, processor = lavin
    problems = [made.drawing(color, shape, 32) for color, shape in zip(COLORS, SHAPES, strict=False)]
    texts = ["<image> what color is it?", "<image> it is a red circle what shape is it?", "<image> what"]
    batch = processor(images=problems, text=texts, padding=True, return_tensors="pt")
    model = get_peft_model(model, EASConfig(skip_layers=[1, 4], init_weights=False, task_type="CAUSAL_LM")).eval()
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    grown = dict(batch)
    for _ in range(5):  # by hand, with the images
        with torch.no_grad():
            said = model(**grown).logits[:, -1:].argmax(-1)
        grown["input_ids"] = torch.cat([grown["input_ids"], said], 1)
        grown["attention_mask"] = torch.cat([grown["attention_mask"], torch.ones_like(said)], 1)
    expected = grown["input_ids"]
    for use_cache in (False, True):
        assert torch.equal(model.generate(**batch, **options, use_cache=use_cache), expected)
    with torch.no_grad():
        logits = model(**batch).logits
        merged = model.merge_and_unload()
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(merged(**batch).logits[kept], logits[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(**batch, **options), expected)
