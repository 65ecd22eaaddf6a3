"""examples/meter_vqa.py from its first line to its last, and METER against a reference that is written down here."""

import contextlib
import io
import json
import os
import re
import sys
from types import SimpleNamespace

import meter_data
import meter_model
import meter_small
import meter_vqa
import pytest
import torch
from made import drawing
from meter_model import CheckpointError, MeterConfig
from paper import DataError, read_vqa, write_vqa
from peft import get_peft_model
from real_data import COLORS, SHAPES
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BridgeTowerConfig,
    BridgeTowerModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
)

import peft_eas

PUBLISHED = SimpleNamespace(
    vocab=50265, places=514, text=768, text_layers=12, text_inner=3072,
    vision=768, vision_layers=11, vision_inner=3072, patch=16, grid=36,
    width=768, layers=6, inner=3072, labels=3129,
)  # fmt: skip
TINY = SimpleNamespace(
    vocab=40, places=20, text=16, text_layers=2, text_inner=24,
    vision=24, vision_layers=2, vision_inner=48, patch=4, grid=3,
    width=32, layers=3, inner=40, labels=5,
)  # fmt: skip
HEADS = SimpleNamespace(text=2, vision=3, fusion=4)
TASKS = {"vqa": 1, "nlvr2": 2}  # and their images


# The authors' names ---------------------------------------------------------------------------------------------------


def linear(name, out, size):
    return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def norm(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def bert_attention(name, width):
    shapes = norm(f"{name}.output.LayerNorm", width)
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= linear(f"{name}.{part}", width, width)
    return shapes


def bert_ffn(name, width, inner):
    dense = linear(f"{name}.intermediate.dense", inner, width) | linear(f"{name}.output.dense", width, inner)
    return dense | norm(f"{name}.output.LayerNorm", width)


def original(sizes, task):
    """Names and shapes of the parameters of the authors' model that is fine-tuned for a task."""
    s, images = sizes, TASKS[task]
    shapes = {
        "text_transformer.embeddings.word_embeddings.weight": (s.vocab, s.text),
        "text_transformer.embeddings.position_embeddings.weight": (s.places, s.text),
        "text_transformer.embeddings.token_type_embeddings.weight": (1, s.text),
        **norm("text_transformer.embeddings.LayerNorm", s.text),
        **linear("text_transformer.pooler.dense", s.text, s.text),
        "vit_model.visual.class_embedding": (s.vision,),
        "vit_model.visual.positional_embedding": (s.grid**2 + 1, s.vision),
        "vit_model.visual.conv1.weight": (s.vision, 3, s.patch, s.patch),
        **norm("vit_model.visual.ln_pre", s.vision),
        **norm("vit_model.visual.ln_post", s.vision),
        **linear("cross_modal_text_transform", s.width, s.text),
        **linear("cross_modal_image_transform", s.width, s.vision),
        "token_type_embeddings.weight": (1 + images, s.width),
        **linear("cross_modal_text_pooler.dense", s.width, s.width),
        **linear("cross_modal_image_pooler.dense", s.width, s.width),
    }
    for i in range(s.text_layers):
        layer = f"text_transformer.encoder.layer.{i}"
        shapes |= bert_attention(f"{layer}.attention", s.text) | bert_ffn(layer, s.text, s.text_inner)
    for i in range(s.vision_layers):
        layer = f"vit_model.visual.transformer.resblocks.{i}"
        shapes |= {f"{layer}.attn.in_proj_weight": (3 * s.vision, s.vision)}
        shapes |= {f"{layer}.attn.in_proj_bias": (3 * s.vision,)}
        shapes |= linear(f"{layer}.attn.out_proj", s.vision, s.vision)
        shapes |= norm(f"{layer}.ln_1", s.vision) | norm(f"{layer}.ln_2", s.vision)
        shapes |= linear(f"{layer}.mlp.c_fc", s.vision_inner, s.vision)
        shapes |= linear(f"{layer}.mlp.c_proj", s.vision, s.vision_inner)
    for i in range(s.layers):
        for kind in ("text", "image"):
            layer = f"cross_modal_{kind}_layers.{i}"
            shapes |= bert_attention(f"{layer}.attention", s.width) | bert_attention(f"{layer}.crossattention", s.width)
            shapes |= bert_ffn(layer, s.width, s.inner)
    head, size, labels = {"vqa": ("vqa", 2, s.labels), "nlvr2": ("nlvr2", 4, 2)}[task]
    head = f"{head}_classifier"
    shapes |= linear(f"{head}.0", 2 * s.width, size * s.width) | norm(f"{head}.1", 2 * s.width)
    return shapes | linear(f"{head}.3", labels, 2 * s.width)


def unused(sizes):
    """What a checkpoint of pretraining has besides."""
    s = sizes
    return {
        "text_transformer.embeddings.position_ids": (1, s.places),
        "vit_model.positional_embedding": (77, 8),
        "vit_model.token_embedding.weight": (50, 8),
        **norm("vit_model.ln_final", 8),
        **linear("mlm_score.transform.dense", s.width, s.width),
        **norm("mlm_score.transform.LayerNorm", s.width),
        "mlm_score.decoder.weight": (s.vocab, s.width),
        "mlm_score.bias": (s.vocab,),
        **linear("itm_score.fc", 2, 2 * s.width),
    }


def config(sizes, task):
    s = sizes
    return MeterConfig(
        text_config=RobertaConfig(
            vocab_size=s.vocab, max_position_embeddings=s.places, type_vocab_size=1, hidden_size=s.text,
            num_hidden_layers=s.text_layers, intermediate_size=s.text_inner, num_attention_heads=HEADS.text,
            layer_norm_eps=1e-5,
        ).to_dict(),
        vision_config=dict(
            hidden_size=s.vision, num_hidden_layers=s.vision_layers, intermediate_size=s.vision_inner,
            num_attention_heads=HEADS.vision, patch_size=s.patch, image_size=s.grid * s.patch,
        ),
        hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=HEADS.fusion, intermediate_size=s.inner,
        num_labels=s.labels if task == "vqa" else 2,
    )  # fmt: skip


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("task", TASKS)
def test_parameters_have_the_names_and_shapes_of_the_authors(task):
    assert shapes_of(meter_model.METER[task](config(TINY, task))) == original(TINY, task)


def test_the_default_configuration_is_that_of_the_published_model():
    with torch.device("meta"):
        published = MeterConfig(vision_config={"image_size": meter_model.IMAGE_SIZES["vqa"]}, num_labels=3129)
        assert shapes_of(meter_model.METER["vqa"](published)) == original(PUBLISHED, "vqa")
    assert (published.num_attention_heads, published.vision_config.num_attention_heads) == (12, 12)
    assert (published.vision_config.hidden_act, published.text_config.pad_token_id) == ("quick_gelu", 1)


# Checkpoints, and the reference ---------------------------------------------------------------------------------------


class Hyper(dict):
    """Stands for what Lightning pickles beside the weights; it can't be imported when a checkpoint is read."""

    __module__, __qualname__ = "pytorch_lightning.utilities.parsing", "AttributeDict"


def weights_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = 0.3 * torch.randn(shape, generator=generator)
        if re.search(r"(LayerNorm|ln_\w+|classifier\.1)\.weight", name):
            weights[name] += 1
    return weights


def save(weights, path, monkeypatch):
    module = SimpleNamespace(AttributeDict=Hyper)
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"):
            patch.setitem(sys.modules, name, module)
        torch.save({"epoch": 3, "state_dict": weights, "hyper_parameters": Hyper(config=Hyper(num_layers=6))}, path)
    return path


def questions(images):
    generator = torch.Generator().manual_seed(7)
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    size = TINY.grid * TINY.patch
    return ids, torch.randn(2, images, 3, size, size, generator=generator)


def reference(weights, ids, images, task):
    """The logits, from the definition of the model alone."""

    def apply(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normed(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def attend(q, k, v, heads, hidden=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def attention(name, x, y, heads, hidden, eps):
        seen = attend(
            *(apply(f"{name}.self.{n}", t) for n, t in (("query", x), ("key", y), ("value", y))), heads, hidden
        )
        return normed(f"{name}.output.LayerNorm", x + apply(f"{name}.output.dense", seen), eps)

    def ffn(name, x, eps):
        inner = apply(f"{name}.output.dense", F.gelu(apply(f"{name}.intermediate.dense", x)))
        return normed(f"{name}.output.LayerNorm", x + inner, eps)

    def text_of(ids):
        e = "text_transformer.embeddings"
        places = torch.where(hidden, 1, (~hidden).cumsum(-1) + 1)  # RoBERTa's begin after that of padding
        x = weights[f"{e}.word_embeddings.weight"][ids] + weights[f"{e}.position_embeddings.weight"][places]
        x = normed(f"{e}.LayerNorm", x + weights[f"{e}.token_type_embeddings.weight"][0], 1e-5)
        for i in range(TINY.text_layers):
            layer = f"text_transformer.encoder.layer.{i}"
            x = ffn(layer, attention(f"{layer}.attention", x, x, HEADS.text, hidden, 1e-5), 1e-5)
        return apply("cross_modal_text_transform", x)

    def image_of(pixels):
        v = "vit_model.visual"
        patches = pixels.unfold(2, TINY.patch, TINY.patch).unfold(3, TINY.patch, TINY.patch)  # (B, 3, y, x, p, p)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) @ weights[f"{v}.conv1.weight"].flatten(1).T
        first = weights[f"{v}.class_embedding"].expand(len(pixels), 1, -1)
        x = normed(f"{v}.ln_pre", torch.cat([first, patches], 1) + weights[f"{v}.positional_embedding"], 1e-5)
        for i in range(TINY.vision_layers):
            layer = f"{v}.transformer.resblocks.{i}"
            z = F.linear(
                normed(f"{layer}.ln_1", x, 1e-5),
                weights[f"{layer}.attn.in_proj_weight"],
                weights[f"{layer}.attn.in_proj_bias"],
            )
            x = x + apply(f"{layer}.attn.out_proj", attend(*z.chunk(3, -1), HEADS.vision))
            inner = apply(f"{layer}.mlp.c_fc", normed(f"{layer}.ln_2", x, 1e-5))
            x = x + apply(f"{layer}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
        return apply("cross_modal_image_transform", normed(f"{v}.ln_post", x, 1e-5))

    hidden = ids == 1
    types = weights["token_type_embeddings.weight"]
    pooled = []
    for number in range(TASKS[task]):
        x, y = text_of(ids) + types[0], image_of(images[:, number]) + types[1 + number]
        for i in range(TINY.layers):
            t, v = f"cross_modal_text_layers.{i}", f"cross_modal_image_layers.{i}"
            own = attention(f"{t}.attention", x, x, HEADS.fusion, hidden, 1e-12)
            new = ffn(t, attention(f"{t}.crossattention", own, y, HEADS.fusion, None, 1e-12), 1e-12)
            own = attention(f"{v}.attention", y, y, HEADS.fusion, None, 1e-12)
            y = ffn(v, attention(f"{v}.crossattention", own, x, HEADS.fusion, hidden, 1e-12), 1e-12)
            x = new
        pooled += [torch.tanh(apply(f"cross_modal_{n}_pooler.dense", t[:, 0])) for n, t in (("text", x), ("image", y))]
    head = f"{task}_classifier"
    z = F.gelu(normed(f"{head}.1", apply(f"{head}.0", torch.cat(pooled, -1)), 1e-5))
    return apply(f"{head}.3", z)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_the_authors_says_what_the_model_is_defined_to_say(task, attention, tmp_path, monkeypatch):
    weights = weights_of(original(TINY, task) | unused(TINY))
    path = save(weights, tmp_path / "meter.ckpt", monkeypatch)
    model = meter_model.METER[task](config(TINY, task)).eval()
    model.set_attn_implementation(attention)
    meter_model.load_meter_checkpoint(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    ids, images = questions(TASKS[task])
    labels = torch.rand(2, TINY.labels) if task == "vqa" else torch.tensor([1, 0])
    with torch.no_grad():
        output = model(ids, (ids != 1).long(), images[:, 0] if task == "vqa" else images, labels)
        expected = reference(weights, ids, images, task)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    if task == "vqa":
        own = -(labels * F.logsigmoid(expected) + (1 - labels) * F.logsigmoid(-expected)).sum(-1).mean()
    else:
        own = -expected.log_softmax(-1)[[0, 1], labels].mean()
    torch.testing.assert_close(output.loss, own)


def test_a_checkpoint_of_pretraining_gets_a_new_head_a_second_image_and_other_positions(tmp_path, monkeypatch):
    weights = weights_of(original(TINY, "vqa") | unused(TINY))
    weights = {name: value for name, value in weights.items() if "classifier" not in name}
    down = torch.arange(5.0)[:, None, None].expand(5, 5, TINY.vision)  # 5 x 5 patches; the values grow downwards
    place = "vit_model.visual.positional_embedding"
    weights[place] = torch.cat([torch.full((1, TINY.vision), 9.0), down.flatten(0, 1)])
    model = meter_model.METER["nlvr2"](config(TINY, "nlvr2"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    meter_model.load_meter_checkpoint(model, save(weights, tmp_path / "meter.ckpt", monkeypatch))
    after = model.state_dict()
    for name, value in after.items():
        if name.startswith("nlvr2_classifier"):
            assert torch.equal(value, before[name])
        elif name == place:
            assert torch.equal(value[0], torch.full((TINY.vision,), 9.0))
            grid = value[1:].unflatten(0, (3, 3))
            torch.testing.assert_close(grid, grid[:, :1, :1].expand_as(grid))
            assert grid[0, 0, 0] < 1 < grid[1, 0, 0] < 3 < grid[2, 0, 0]
            torch.testing.assert_close(grid[1, 0, 0], torch.tensor(2.0))
        elif name == "token_type_embeddings.weight":
            assert torch.equal(value, weights[name][[0, 1, 1]])
        else:
            assert torch.equal(value, weights[name]), name


def test_checkpoints_that_are_refused(tmp_path, monkeypatch):
    model = meter_model.METER["vqa"](config(TINY, "vqa"))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as info:
            meter_model.load_meter_checkpoint(model, path)
        assert str(path) in str(info.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    path = tmp_path / "none.ckpt"
    refused("There is no")
    path = tmp_path / "text.ckpt"
    path.write_text("not found")
    refused("can't be read as a checkpoint of PyTorch Lightning")
    path = tmp_path / "other.ckpt"
    torch.save({"model": {}}, path)
    refused("state_dict")
    weights = weights_of(original(TINY, "vqa"))
    del weights["cross_modal_text_layers.1.crossattention.self.key.bias"]
    path = save(weights, tmp_path / "incomplete.ckpt", monkeypatch)
    refused(r"missing: cross_modal_text_layers\.1\.crossattention\.self\.key\.bias")
    weights = weights_of(original(TINY, "vqa"))
    weights["cross_modal_text_pooler.dense.weight"] = torch.ones(4, 4)
    path = save(weights, tmp_path / "misshapen.ckpt", monkeypatch)
    refused(r"of other sizes: cross_modal_text_pooler\.dense\.weight \(4, 4\) instead of \(32, 32\)")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": weights_of(original(TINY, "vqa")), "callbacks": Bomb()}, path)
    with contextlib.suppress(CheckpointError):
        meter_model.load_meter_checkpoint(model, path)
    assert not (tmp_path / "run").exists()


def test_bridgetower_with_a_head_for_two_images(tmp_path):
    save_bridgetower(tmp_path)
    body = BridgeTowerModel.from_pretrained(tmp_path).eval()
    model = meter_model.load_model(tmp_path, "nlvr2", ["False", "True"])
    ids, mask = torch.tensor([[0, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.long)
    images = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        both = [body(ids, mask, pixel_values=images[:, i]).pooler_output for i in range(2)]
        expected = model.nlvr2_classifier(torch.cat(both, -1))
        torch.testing.assert_close(model(ids, mask, images).logits, expected)
        model.token_type_embeddings.weight[2] += torch.arange(64)  # a norm follows
        changed = (model(ids, mask, images).logits - expected).abs().max()
    assert changed > 1e-4
    torch.testing.assert_close(model.pooled(ids, mask, images[:, 0]), both[0])


def test_other_models_are_refused(tmp_path):
    BertConfig(hidden_size=32).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="is a bert: give a METER's"):
        meter_model.load_model(str(tmp_path / "bert"), "vqa", ["yes"])
    answers = [f"LABEL_{i}" for i in range(TINY.labels)]
    meter_model.METER["vqa"](config(TINY, "vqa")).save_pretrained(tmp_path / "meter")
    for task, others in (("nlvr2", answers), ("vqa", answers[::-1])):
        with pytest.raises(CheckpointError, match="is a METER for another task, or for other answers"):
            meter_model.load_model(tmp_path / "meter", task, others)
    assert type(meter_model.load_model(tmp_path / "meter", "vqa", answers)) is meter_model.METER["vqa"]


# The example ----------------------------------------------------------------------------------------------------------


def save_bridgetower(folder):
    torch.manual_seed(3)
    sizes = dict(vocab_size=99, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40)
    tower = BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
        text_config=dict(hidden_size=64, num_hidden_layers=6, **sizes),
        vision_config=dict(hidden_size=64, num_hidden_layers=6, patch_size=16, image_size=32),
    )  # fmt: skip
    BridgeTowerModel(tower).save_pretrained(folder)


@pytest.fixture(scope="module", params=["vqa", "nlvr2", "bridgetower"])
def example(request, tmp_path_factory):
    """One run with `--tiny`."""
    folder = tmp_path_factory.mktemp(request.param)
    task = "nlvr2" if request.param == "nlvr2" else "vqa"
    argv = ["meter_vqa.py", "--tiny", "--task", task, "--output", str(folder / "out")]
    if request.param == "bridgetower":
        save_bridgetower(folder / "start")
        argv += ["--model", str(folder / "start"), "--num-skip", "8"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", argv)
        patch.setattr("peft_eas.search.report.plot_search", lambda *args, **kwargs: None)  # half of the time
        meter_vqa.main()
    rows = re.findall(r"^(base|EAS, not merged|EAS, merged)  +(\S+) ± \S+ +(\S+) M +(\d+)", printed.getvalue(), re.M)
    return SimpleNamespace(
        name=request.param,
        task=task,
        out=folder / "out",
        printed=printed.getvalue(),
        rows={name: (float(score), float(size), int(left)) for name, score, size, left in rows},
        num_skip=8 if request.param == "bridgetower" else 10,
        start=folder / "start",
    )


def test_what_is_printed(example):
    sizes = {name: size for name, (_, size, _) in example.rows.items()}
    left = [count for _, _, count in example.rows.values()]
    assert left == [24, 24 - example.num_skip, 24 - example.num_skip]
    assert sizes["EAS, merged"] < sizes["base"] < sizes["EAS, not merged"]
    assert float(re.search(r"merging makes to a logit: (\S+)", example.printed)[1]) < 1e-5
    assert "The loaded model says the very same" in example.printed
    (skipped,) = re.findall(r"EAS skips (.*)", example.printed)
    report = json.loads((example.out / "report.json").read_text())
    assert skipped.split(", ") == report["skip_layers"]
    assert len(report["rounds"]) > 0


def test_what_is_saved(example):
    """The scores of the table are those of the model that is loaded, on questions that are read again."""
    merged = meter_vqa.AUTO[example.task].from_pretrained(example.out).eval()
    kind = "BridgeTower" if example.name == "bridgetower" else "Meter"
    kind += "ForVisualReasoning" if example.task == "nlvr2" else "ForVisualQuestionAnswering"
    assert type(merged).__name__ == f"EAS{kind}"
    kinds = merged.config.eas["attentions"]
    assert sum(len(record["skip"]) for record in kinds) == example.num_skip
    assert {record["layers"] for record in kinds if record["skip"]} <= {
        "cross_modal_text_layers",
        "cross_modal_image_layers",
    }
    answers = {"vqa": ["blue", "circle", "no", "rectangle", "red", "triangle", "yes"], "nlvr2": ["False", "True"]}
    assert [*merged.config.id2label.values()] == answers[example.task]
    test = meter_data.read(example.task, example.out / "tiny" / "data", meter_data.SPLITS[example.task][1])[:24]
    tokenizer = meter_vqa.AutoTokenizer.from_pretrained(example.out)
    collate = meter_data.Collator(tokenizer, answers[example.task], 32)
    right = []
    for question in test:  # one by one
        batch = collate([question])
        with torch.no_grad():
            answer = merged.config.id2label[merged(**batch).logits.argmax().item()]
        right.append(question.scores.get(answer, 0.0))
    assert 100 * sum(right) / len(right) == pytest.approx(example.rows["EAS, merged"][0], abs=0.01)


def test_what_is_trained(example):
    """Adapters are folded into the fusion layers; poolers and token types are trained; towers are as they were."""
    after = meter_vqa.AUTO[example.task].from_pretrained(example.out).state_dict()
    if example.name == "bridgetower":
        before = BridgeTowerModel.from_pretrained(example.start).state_dict()
    else:
        before = torch.load(example.out / "tiny" / "meter.ckpt", weights_only=True)["state_dict"]
    same = {name for name, value in before.items() if name in after and torch.equal(value, after[name])}
    trained = (
        "cross_modal_text_pooler",
        "cross_modal_image_pooler",
        "token_type_embeddings",
        "cross_modal_text_layers",
    )
    for name in before.keys() & after.keys():
        if name.startswith(("text_transformer", "vit_model", "text_model", "vision_model")):
            assert name in same
        if name.startswith(trained) and re.search(
            r"(query|intermediate\.dense|pooler\.dense|type_embeddings)\.w", name
        ):
            assert name not in same, name
    if example.task == "nlvr2":
        second = after["token_type_embeddings.weight"]
        assert not torch.equal(second[1], second[2])


def test_only_the_fusion_layers_have_attentions_to_skip():
    model = meter_model.METER["vqa"](config(TINY, "vqa"))
    names = [
        f"{stack}.{i}.{kind}" for stack in ("cross_text", "cross_image") for kind in ("self", "cross") for i in range(3)
    ]
    with pytest.raises(ValueError) as info:
        get_peft_model(model, peft_eas.EASConfig(skip_layers=["text.0.self"]))
    assert sorted(re.findall(r"'(cross_\S+?)'", str(info.value))) == sorted(names)


# Data -----------------------------------------------------------------------------------------------------------------


def test_clip_with_the_names_of_openai():
    """The tower of `--small` gives what transformers' CLIP gives."""
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=4)
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=12)).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower = meter_model.MeterVision(clip.config)
    tower.load_state_dict(meter_small.openai_names(clip))
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        hidden_states = clip(pixels).last_hidden_state
        (norm,) = (module for name, module in clip.named_modules() if name.endswith("post_layernorm"))
        torch.testing.assert_close(tower(pixels), norm(hidden_states), rtol=1e-4, atol=1e-5)


def test_batches(tmp_path):
    meter_data.write_tiny_data(tmp_path)
    meter_data.save_tiny_tokenizer(tmp_path)
    tokenizer = meter_vqa.AutoTokenizer.from_pretrained(tmp_path)
    test = meter_data.read("vqa", tmp_path, "val2014")
    batch = meter_data.Collator(tokenizer, ["no", "red", "yes"], 16)(test[3:6])
    assert [q.text for q in test[3:6]] == ["what color is it?", "what shape is it?", "is it red?"]
    assert batch["labels"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]  # a blue rectangle
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 4, 3]
    pairs = meter_data.read("nlvr2", tmp_path, "dev")
    batch = meter_data.Collator(tokenizer, ["False", "True"], 16)(pairs[:4])
    assert batch["pixel_values"].shape == (4, 2, 3, 16, 16)
    assert batch["labels"].tolist() == [int("True" in pair.scores) for pair in pairs[:4]]
    assert {key for pair in pairs for key in pair.scores} == {"False", "True"}


def vqa_files(folder):
    return (
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        folder / "v2_mscoco_val2014_annotations.json",
        folder / "val2014",
    )


def test_errors_of_data(tmp_path):
    row = dict(image=drawing(COLORS[1], SHAPES[0], 16), image_id=3, question="what?", answer="circle")
    write_vqa(tmp_path, "val2014", [row])
    questions, annotations, images = vqa_files(tmp_path)
    assert read_vqa(questions, annotations, images)[0].scores == {"circle": 1.0}
    with pytest.raises(DataError, match=r"There is no .*dev\.json"):  # a folder of another task
        meter_data.read("nlvr2", tmp_path, "dev")
    with pytest.raises(DataError, match=r"There is no .*train2014_annotations\.json"):
        meter_data.read("vqa", tmp_path, "train2014")
    (images / "COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match=r"val2014_questions\.json, question 0: its image .*000003\.jpg is missing"):
        meter_data.read("vqa", tmp_path, "val2014")
    for none in ([], [{"question_id": 0, "answers": []}]):
        annotations.write_text(json.dumps({"annotations": none}))
        with pytest.raises(DataError, match=r"question 0: .*annotations\.json has no answers to it"):
            meter_data.read("vqa", tmp_path, "val2014")
    (tmp_path / "dev.json").write_text("")
    with pytest.raises(DataError, match="has no sentences"):
        meter_data.read("nlvr2", tmp_path, "dev")
    meter_data.write_tiny_data(tmp_path)
    for image in (tmp_path / "images" / "dev").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"dev\.json, line 1: its image .*dev-0-0-img0\.png is missing"):
        meter_data.read("nlvr2", tmp_path, "dev")


def test_the_training_images_of_nlvr2_lie_in_numbered_folders(tmp_path):
    meter_data.write_tiny_data(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "train.json").read_text().splitlines()][:1]
    images = tmp_path / "images" / "train"
    (images / "7").mkdir()
    for side in (0, 1):
        (images / f"train-0-0-img{side}.png").rename(images / "7" / f"train-0-0-img{side}.png")
    (tmp_path / "train.json").write_text(json.dumps({**lines[0], "directory": 7}))
    (pair,) = meter_data.read("nlvr2", tmp_path, "train")
    assert [path.parent.name for path in pair.images] == ["7", "7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task vqa", "give --model and --data, or --small or --tiny"),
        ("--small --task nlvr2", "--small has questions for --task vqa alone"),
    ],
)
def test_options_that_do_not_go_together(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["meter_vqa.py", *options.split()])
    with pytest.raises(SystemExit):
        meter_vqa.parse_args()
    assert message in capsys.readouterr().err


def test_an_answer_is_worth_what_vqa_v2_says(tmp_path):
    """By how many of ten people gave it: 0.3, 0.6, 0.9, and 1 from four on."""
    row = dict(image=drawing(COLORS[1], SHAPES[0], 16), image_id=3, question="what?", answer="circle")
    write_vqa(tmp_path, "val2014", [row])
    questions, annotations = (tmp_path / f"v2_{name}_val2014_{kind}.json" for name, kind in (
        ("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")
    ))  # fmt: skip
    told = json.loads(annotations.read_text())
    people = ["Circle"] * 4 + ["ball"] * 3 + ["ring"] * 2 + ["dot"]
    told["annotations"][0]["answers"] = [{"answer": answer} for answer in people]
    annotations.write_text(json.dumps(told))
    (question,) = read_vqa(questions, annotations, tmp_path / "val2014")
    assert question.scores == {"circle": 1.0, "ball": 0.9, "ring": 0.6, "dot": 0.3}
