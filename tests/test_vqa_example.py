"""examples/vqa.py from its first line to its last, with a tiny model and a handful of images that are drawn here."""

import argparse
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
import vqa
from peft import get_peft_model
from PIL import Image, ImageDraw
from real_data import COLORS, SHAPES, VisualQuestion
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_eas import EASConfig

TEXTS = ("what color is the shape?", "what shape is in the image?", "is there a red shape?", "is there not a circle?")
TOKENS = 16  # of an image
VOCABULARY = 1000  # the ids of the prompt that speeds are measured with are below it


def drawing(color, shape):
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    if shape == "triangle":
        draw.polygon([(32, 10), (10, 54), (54, 54)], fill=color)
    else:
        {"circle": draw.ellipse, "rectangle": draw.rectangle}[shape]([12, 12, 52, 52], fill=color)
    return image


def questions(split):
    made = []
    for i, (color, shape) in enumerate(itertools.product(COLORS[split == "test" :: 2], SHAPES)):
        answers = (color, shape, "yes" if color == "red" else "no", "no" if shape == "circle" else "yes")
        image = drawing(color, shape)
        made += [VisualQuestion(i, image, text, answer) for text, answer in zip(TEXTS, answers, strict=True)]
    return made


def tokenizer():
    text = " ".join((*TEXTS, *vqa.VISUAL_ANSWERS, "Answer:", *(f"w{i}" for i in range(VOCABULARY))))
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(text.split())][:VOCABULARY]
    words = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture
def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    torch.manual_seed(1)
    model, processor = vqa.put_together(CLIPVisionModel(vision), language_model(), tokenizer())
    return model.eval(), processor


@pytest.fixture
def tiny_world(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_EAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vqa, "load_model", language_model)
    monkeypatch.setattr(vqa, "load_tokenizer", tokenizer)
    monkeypatch.setattr(vqa, "visual_questions", questions)


def test_the_whole_example(tiny_world, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    options = "--num-skip 2 --image-epochs 2 --train-examples 24 --search-examples 4 --batch-size 2"
    monkeypatch.setattr("sys.argv", ["vqa.py", *options.split(), "--held-out-examples", "16", "--output", str(out)])
    vqa.main()
    printed = capsys.readouterr().out

    # the table: two of six attentions are gone
    rows = {name: printed.split(f"\n{name}  ")[1].split() for name in ("base", "LoRA, merged", "EAS, merged")}
    kv = {name: int(row[4].replace(",", "")) for name, row in rows.items()}
    assert kv["base"] == kv["LoRA, merged"] == 6 * 2 * 2 * 8 * 4
    assert kv["EAS, merged"] == 4 * 2 * 2 * 8 * 4
    # ... what can be had without images, and how the answers of EAS and LoRA differ
    train, held_out = (vqa.affirmative(questions(split)) for split in ("train", "test"))
    held_out = vqa.random.Random(0).sample(held_out, 16)
    assert f"\nno image {vqa.blind_accuracy(train, held_out):19.3f}\n" in printed
    alone = [
        int(n) for n in re.search(r"EAS alone is right on (\d+) questions,\nLoRA alone on (\d+)\.", printed).groups()
    ]
    difference = float(rows["EAS, merged"][0]) - float(rows["LoRA, merged"][0])
    assert alone[0] - alone[1] == pytest.approx(16 * difference, abs=0.02)

    # what was saved is what was fine-tuned from the saved start: the tower as it was, the projector trained further
    (start,) = (tmp_path / "cache").iterdir()
    before = AutoModelForImageTextToText.from_pretrained(start)
    merged = AutoModelForImageTextToText.from_pretrained(out)
    assert type(merged).__name__ == "EASLlavaForConditionalGeneration"
    # what is skipped is what the search found, by its defaults
    report = json.loads((out / "report.json").read_text())
    assert merged.config.eas["attentions"][0]["skip"] == report["skip_layers"]
    assert len(report["skip_layers"]) == 2
    assert report["settings"]["warm_start"] == "growth"
    assert sorted(report["start"]) == list(range(6))
    for name, value in before.model.vision_tower.state_dict().items():
        assert torch.equal(merged.model.vision_tower.state_dict()[name], value)
    for name, value in before.model.multi_modal_projector.state_dict().items():
        assert not torch.equal(merged.model.multi_modal_projector.state_dict()[name], value)
    # and the start has the language model, whose vocabulary is one token longer
    for name, value in language_model().model.state_dict().items():
        assert torch.equal(before.model.language_model.state_dict()[name][: len(value)], value)

    # the answers of the example are those of the merged model without cache and padding, image by image
    processor = AutoProcessor.from_pretrained(out)
    asked = [line for line in printed.splitlines() if line.startswith(TEXTS)]
    assert len(asked) == 12
    for line, question in zip(asked, held_out, strict=False):
        inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
        output = merged.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert line.removeprefix(question.text).strip().startswith(answer)
        assert ("wrong: " in line) == (answer != question.answer)
    with Image.open(out / "answers.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 8

    # the second time, the start is there already
    monkeypatch.setattr(vqa, "make_llava", lambda *args: pytest.fail("made again"))
    assert vqa.starting_point(questions("train"), vqa.parse_args()) == start


def test_the_projector_learns_at_a_tenth_of_the_rate(llava):
    """As AdamW's first step is, which is the rate for each number that has a gradient."""
    config = EASConfig(skip_layers=[1], modules_to_save=[vqa.PROJECTOR], task_type="CAUSAL_LM")
    model = get_peft_model(llava[0], config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {vqa.PROJECTOR in name for name in trained} == {True, False}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = vqa.slow_projector(model, 1e-2)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in trained.items():
        rate = 1e-3 if vqa.PROJECTOR in name else 1e-2
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, rate), atol=1e-6, rtol=1e-3)


def test_batches_have_an_image_in_each_prompt_and_labels_for_the_answer_alone(llava):
    model, processor = llava
    some = questions("train")[1:4]
    batch = vqa.collate(some, processor)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ((batch["input_ids"] == image_token).sum(-1) == TOKENS).all()
    assert (batch["attention_mask"] == 0).any(), "no row is padded"
    total = 0.0
    columns = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    for ids, mask, labels, question in zip(*columns, some, strict=True):
        answer = processor.tokenizer(f"{question.answer} </s>").input_ids
        assert labels[labels != -100].tolist() == answer
        assert ids[mask.bool()].tolist()[-len(answer) :] == answer
        prompt = processor(images=question.image, text=question.prompt, return_tensors="pt")
        assert ids[mask.bool()].tolist()[: -len(answer)] == prompt["input_ids"][0].tolist()
        with torch.no_grad():
            for token in answer:
                total -= F.log_softmax(model(**prompt).logits[0, -1], dim=-1)[token].item()
                prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[token]])], dim=-1)
                prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(total / (batch["labels"] != -100).sum().item(), rel=1e-5)


def test_what_questions_and_answers_say_of_an_image():
    told = {
        (("what color is the shape?", "red"), ("is there a circle?", "yes")): ("red", "circle"),
        (("what is the color of the circle?", "teal"),): ("teal", "circle"),
        (("what is the blue shape?", "triangle"),): ("blue", "triangle"),
        (("is there not a green shape?", "no"), ("is no rectangle present?", "no")): ("green", "rectangle"),
        (("is there a red shape?", "no"), ("what shape is present?", "circle")): None,
        (("does the image not contain a red shape?", "yes"), ("is a triangle present?", "yes")): None,
    }
    asked = []
    images = [drawing("red", "circle") for _ in told]
    for i, pairs in enumerate(told):
        asked += [VisualQuestion(i, images[i], text, answer) for text, answer in pairs]
    expected = [(images[i], words) for i, words in enumerate(told.values()) if words is not None]
    found = vqa.descriptions(asked)
    assert [words for _, words in found] == [words for _, words in expected]
    assert all(image is other for (image, _), (other, _) in zip(found, expected, strict=True))


def test_tower_and_projector_learn_to_turn_images_into_words(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    torch.manual_seed(1)
    base = language_model()
    base.get_input_embeddings().weight.data *= 3
    model, processor = vqa.put_together(CLIPVisionModel(vision), base, tokenizer())
    before = {name: value.clone() for name, value in model.model.language_model.state_dict().items()}
    described = [(drawing(*words), words) for words in itertools.product(COLORS[1:5], SHAPES)]
    args = argparse.Namespace(output=tmp_path, seed=0, image_epochs=400)
    vqa.learn_to_see(model, vqa.patch_tokens(model), processor, described, args)
    for name, value in model.model.language_model.state_dict().items():
        assert torch.equal(value, before[name])

    # what the language model is given for an image, by the colours and shapes whose embeddings are nearest
    words = vqa.first_tokens(COLORS + SHAPES, processor.tokenizer)
    embeddings = model.get_input_embeddings().weight[words]
    given = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), hook:
        for image, named in described:
            batch = processor(images=image, text="<image>\nwhat", return_tensors="pt")
            model(**batch)
            tokens = given.pop()[batch["input_ids"] == model.config.image_token_id]
            nearest = words[torch.cdist(tokens, embeddings).argmin(-1)]
            assert processor.tokenizer.convert_ids_to_tokens(nearest) == list(named) * (TOKENS // 2)


def test_images_to_words_loss(llava):
    model, processor = llava
    words = vqa.first_tokens(COLORS + SHAPES, processor.tokenizer)
    pixels = processor.image_processor([drawing("red", "circle"), drawing("teal", "triangle")], return_tensors="pt")
    pixels = pixels["pixel_values"]
    labels = torch.tensor([[COLORS.index("red"), 8], [COLORS.index("teal"), 10]])
    with torch.no_grad():
        loss = vqa.ImagesToWords(model, vqa.patch_tokens(model), words)(pixels, labels)["loss"].item()
        tokens = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])
        embeddings = model.get_input_embeddings().weight[words]
    expected = 0.0
    for image in range(2):
        for position in range(TOKENS):
            distances = torch.stack([((tokens[image, position] - word) ** 2).sum() for word in embeddings])
            own = labels[image, position % 2]
            norm = (embeddings**2).sum() / len(embeddings)
            expected += (distances[own] / norm - torch.log_softmax(-distances, dim=0)[own]).item()
    assert loss == pytest.approx(expected / (2 * TOKENS), rel=1e-5)


def test_accuracy_and_loss(llava):
    _, processor = llava
    ask = questions("train")[:3]  # black, circle, no
    ids = [processor.tokenizer(q.answer).input_ids[0] for q in ask]
    logits = torch.zeros(3, len(processor.tokenizer))
    logits[0, ids[0]] = 2.0
    logits[0, processor.tokenizer("shape?").input_ids[0]] = 3.0  # likelier, but no answer
    logits[1, ids[1]] = 1.0
    logits[1, processor.tokenizer("triangle").input_ids[0]] = 1.5
    logits[2, ids[2]] = 1.0
    accuracy, loss = vqa.accuracy_and_loss(logits, processor.tokenizer, ask)
    assert accuracy == pytest.approx(2 / 3)
    expected = sum(row.logsumexp(-1) - row[i] for row, i in zip(logits, ids, strict=True)) / 3
    assert loss == pytest.approx(expected.item())


def test_affirmative_questions():
    texts = ("is there a circle?", "is there not a circle?", "is no circle present?", "what is the note?")
    asked = [SimpleNamespace(text=text) for text in texts]
    assert vqa.affirmative(asked) == [asked[0], asked[3]]


def test_accuracy_without_images():
    seen = [("a?", "yes"), ("a?", "yes"), ("a?", "no"), ("b?", "red")]
    train = [SimpleNamespace(text=text, answer=answer) for text, answer in seen]
    asked = [SimpleNamespace(text=t, answer=a) for t, a in [("a?", "yes"), ("a?", "no"), ("b?", "red"), ("c?", "no")]]
    assert vqa.blind_accuracy(train, asked) == 0.5
