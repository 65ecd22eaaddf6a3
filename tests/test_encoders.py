"""Encoders, cross-attentions and encoder-decoders: formulas, names, pooling, search. Each family: see checks.py."""

import json
import subprocess
import sys

import checks
import pytest
import reference
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from zoo import families, sizes

from peft_eas import (
    FAMILIES,
    Attentions,
    EASCallback,
    EASConfig,
    Family,
    cli,
    model_card,
    plot_search,
    register_family,
    score_attentions,
)
from peft_eas.families import find_layers
from peft_eas.layer import EASLayer
from peft_eas.runtime.eas_record import Record

# Formulas -------------------------------------------------------------------------------------------------------------


def stock(model_type):
    return families.tiny_model(model_type).double()


def zero(module):
    module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))


def leaves(module, attention, mask, p, others=None):
    """`module` writes the output of `attention`, in whose place something is left; `mask` is of what it looks at."""
    read = {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: read.update(z=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )

    def left(module, args, output):
        z = read["z"]
        tokens = None if others is None else others()
        allowed = mask() if callable(mask) else mask[:, None].expand(-1, z.shape[1], -1)
        return reference.left(z, p, allowed, tokens)

    module.register_forward_hook(left)


def before(linear, function):
    linear.register_forward_pre_hook(lambda module, args: (function(args[0]),))


def run(model, model_type):
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in families.tiny_inputs(model_type).items()}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("settings", [dict(), dict(propagation="none"), dict(use_bias=False, scaling=0.5)], ids=str)
def test_an_encoder_computes_the_formulas(settings):
    """A skipped attention leaves a mean over all tokens that are not padding; the residual stream is not adapted."""
    adapted = families.adapted("bert", **settings)
    config, parameters = adapted.peft_config["default"], reference.by_module(adapted)
    mask = families.tiny_inputs("bert")["attention_mask"].bool()
    model = stock("bert")
    for index, layer in enumerate(model.bert.encoder.layer):
        name, attention = f"bert.encoder.layer.{index}", layer.attention
        p = parameters[f"{name}.attention"]
        if index in config.skip_layers:
            leaves(attention.output.dense, attention, mask, p)
        else:
            for linear in (attention.self.query, attention.self.key, attention.self.value):
                before(linear, lambda z, p=p: reference.adapt(z, p, config))
        before(layer.intermediate.dense, lambda z, p=parameters[f"{name}.intermediate"]: reference.adapt(z, p, config))
    expected = run(model, "bert").float()
    torch.testing.assert_close(checks.logits(adapted, "bert"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(), dict(propagation="none"), dict(use_bias=False, scaling=0.5)], ids=str)
def test_a_decoder_with_cross_attentions_computes_the_formulas(settings):
    """A cross-attention looks at the encoder's tokens, the decoder's own at those before."""
    adapted = families.adapted("bart", **settings)
    config, parameters = adapted.peft_config["default"], reference.by_module(adapted)
    inputs = families.tiny_inputs("bart")
    source, target = inputs["attention_mask"].bool(), torch.ones_like(inputs["decoder_input_ids"])
    model, read, both = stock("bart"), {}, 0
    model.model.encoder.register_forward_hook(lambda module, args, output: read.update(output=output[0]))

    def adapt(linears, p):
        for linear in linears:
            before(linear, lambda z: reference.adapt(z, p, config))

    for stack in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model.model, stack).layers):
            name, own = f"model.{stack}.layers.{index}", layer.self_attn
            skips = [f"{stack}.{index}.{kind}" in config.skip_layers for kind in ("self", "cross")]
            p = parameters[f"{name}.self_attn"]
            if skips[0]:
                looks = source if stack == "encoder" else lambda: reference.causal(target)
                leaves(own.out_proj, own, looks, p)
            else:
                adapt((own.q_proj, own.k_proj, own.v_proj), p)
            if stack == "decoder":
                cross, p = layer.encoder_attn, parameters[f"{name}.encoder_attn"]
                if skips[1]:
                    leaves(cross.out_proj, cross, source, p, lambda: read["output"])
                else:
                    adapt((cross.q_proj,), p)
            adapt((layer.fc1,), parameters[f"{name}.fc1"])
            both += all(skips)
    assert both
    expected = run(model, "bart").float()
    torch.testing.assert_close(checks.logits(adapted, "bart"), expected, rtol=1e-5, atol=1e-5)


def test_an_attention_that_looks_both_ways_computes_the_formulas():
    """LXMERT's words look at regions, then regions at words; the one adapter serves both."""
    adapted = families.adapted("lxmert", skip_layers=["cross.1.cross", "cross_vision.1.self"])
    config, parameters = adapted.peft_config["default"], reference.by_module(adapted)
    inputs = families.tiny_inputs("lxmert")
    words, regions = inputs["attention_mask"].bool(), inputs["visual_attention_mask"].bool()
    assert not words.all()
    assert not regions.all()
    model = stock("lxmert")
    for name, module in model.named_modules():
        p = parameters.get(name)
        if name.endswith("x_layers.1.visual_attention"):
            calls = []  # the words' and the regions'

            def remember(module, args, kwargs, calls=calls):
                calls.append((args[0], args[1]))

            def left(module, args, output, calls=calls, p=p):
                z, others = calls[-1]
                mask = regions if others.shape[1] == regions.shape[1] else words
                return reference.left(z, p, mask[:, None].expand(-1, z.shape[1], -1), others)

            module.register_forward_pre_hook(remember, with_kwargs=True)
            module.output.dense.register_forward_hook(left)
        elif name.endswith("x_layers.1.visn_self_att"):
            leaves(module.output.dense, module, regions, p)
        elif p and name.endswith(("intermediate", "_inter")):
            before(module.dense, lambda z, p=p: reference.adapt(z, p, config))
        elif p:  # an attention that stays: its queries, and those keys and values of the same tokens
            core = module.att if hasattr(module, "att") else module.self
            linears = [core.query] if hasattr(module, "att") else [core.query, core.key, core.value]
            for linear in linears:
                before(linear, lambda z, p=p: reference.adapt(z, p, config))
    assert words.shape != regions.shape
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs).question_answering_score.float()
    torch.testing.assert_close(checks.logits(adapted, "lxmert"), expected, rtol=1e-5, atol=1e-5)


# Names ----------------------------------------------------------------------------------------------------------------


def test_indices_and_names_mean_the_same():
    by_index = get_peft_model(families.tiny_model("bert"), EASConfig(skip_layers=[1, 2]))
    by_name = get_peft_model(families.tiny_model("bert"), EASConfig(skip_layers=["encoder.2.self", 1]))
    assert by_index.skip_layers == by_name.skip_layers == by_name.peft_config["default"].skip_layers == [1, 2]
    by_name.set_skip_layers(["encoder.0.self"])
    assert by_name.skip_layers == [0]
    decoder = get_peft_model(families.tiny_model("llama"), EASConfig(skip_layers=["decoder.3.self"]))
    assert decoder.skip_layers == [3]


def test_names_where_indices_are_not_enough():
    names = ["encoder.0.self", "decoder.2.self", "decoder.2.cross", "decoder.3.cross"]
    model = get_peft_model(families.tiny_model("bart"), EASConfig(skip_layers=names[::-1]))
    assert model.skip_layers == names
    assert model.model.model.decoder.layers[2].encoder_attn.gates == {"default": True}
    assert model.model.model.decoder.layers[3].self_attn.gates == {"default": False}


@pytest.mark.parametrize(
    ("model_type", "skip_layers", "message"),
    [
        ("bart", [1], r"names \[1\], but the attentions of this model are \['encoder\.0\.self', "),
        ("bert", [1, "encoder.9.self"], r"\['encoder\.9\.self'\].*\[0, 1, 2, 3\], also called 'encoder\.0\.self' to"),
        ("t5", ["encoder.0.self"], r"'encoder\.0\.self'.*can be skipped .*'encoder\.1\.self'"),
        ("bart", ["decoder.0.self"], r"names \['decoder\.0\.self'\]"),
        ("llama", ["decoder.1.cross"], r"decoder\.1\.cross"),
    ],
)
def test_attentions_that_are_not_there_are_refused(model_type, skip_layers, message):
    model = families.tiny_model(model_type)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, EASConfig(skip_layers=skip_layers))
    assert [name for name, _ in model.named_modules()] == before


def test_encoders_as_decoders_are_refused():
    config = BertConfig(**sizes.TEXT, is_decoder=True)
    bart = families.EXAMPLES["bart"].config()
    for model in (BertLMHeadModel(config), BartForCausalLM(bart)):
        with pytest.raises(ValueError, match="`is_decoder=True`"):
            get_peft_model(model, EASConfig())


def test_attentions_whose_adapter_could_not_be_folded_have_none():
    """DeBERTa-v2's project positions, too: skipped as others are, the first included."""
    model = families.adapted("deberta-v2", skip_layers=[0, 2])
    adapted = {name.split(".layer.")[1] for name, _ in model.named_parameters() if ".eas_" in name}
    of_attentions = sorted(name for name in adapted if ".attention." in name)
    names = ("constant", "down", "mean_down", "mean_up", "up")
    assert of_attentions == [f"{i}.attention.eas_stand_in.default.{name}" for i in (0, 2) for name in names]
    of_ffns = {name.split(".eas_")[0] for name in adapted.difference(of_attentions)}
    assert of_ffns == {f"{i}.intermediate" for i in range(4)}


@pytest.mark.parametrize("model_type", ["bert", "bart"])
def test_a_frozen_context(model_type):
    """Of one row, in which all tokens look at all: the encoder computes what it did."""
    model, inputs = families.adapted(model_type, stand_in="mean"), families.tiny_inputs(model_type)
    alone = {name: value[:1] for name, value in inputs.items()}
    assert alone["attention_mask"].all()
    before = checks.logits(model, model_type, alone)
    moved = model.freeze_context([alone])
    after = checks.logits(model, model_type, alone)
    assert (moved.logits_moved < 1e-5) == torch.allclose(after, before, atol=1e-5) == (model_type == "bert")
    checks.close(checks.logits(model.merge_and_unload(), model_type, alone), after)


def test_unload_leaves_the_base_model():
    """The hook in front of the core of BERT's attention goes, too."""
    for model_type in ("bert", "bart"):
        model = families.adapted(model_type)
        expected = checks.logits(families.tiny_model(model_type), model_type)
        with model.disable_adapter():
            torch.testing.assert_close(checks.logits(model, model_type), expected, rtol=0, atol=0)
        torch.testing.assert_close(checks.logits(model.unload(), model_type), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["bert", "bart", "bridgetower", "t5"])
def test_merge_adapter_and_back(model_type):
    model = families.adapted(model_type)
    expected = checks.logits(model, model_type)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    checks.close(checks.logits(model, model_type), expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(checks.logits(model, model_type), expected, rtol=0, atol=0)
    model.merge_adapter()
    checks.close(checks.logits(model.merge_and_unload(), model_type), expected)


def test_a_row_with_cross_attentions_from_outside(tmp_path):
    """As in docs/usage.md."""

    class Config(BartConfig):
        model_type = "own_seq2seq"

    class Model(BartForConditionalGeneration):
        config_class = Config

    AutoConfig.register("own_seq2seq", Config)
    AutoModelForSeq2SeqLM.register(Config, Model)
    common = dict(attention_norms=(), ffn="fc1", ffn_inputs=("",))
    decoder = dict(stack="decoder", layers="decoder.layers", **common)
    cross = Attentions(
        **decoder, attention="encoder_attn", attention_inputs=("q_proj",), context="key_value_states",
        context_inputs=("k_proj", "v_proj"),
    )  # fmt: skip
    own = Attentions(**decoder, answers=True, keeps_first=True)
    encoder = Attentions(stack="encoder", layers="encoder.layers", causal=False, **common)
    register_family(Family("own_seq2seq", (encoder, own, cross)))
    try:
        torch.manual_seed(0)
        base = Model(Config(**sizes.SEQ2SEQ)).eval()
        model = get_peft_model(base, EASConfig(skip_layers=["encoder.1.self", "decoder.2.cross"], init_weights=False))
        expected = checks.logits(model.eval(), "bart")
        merged = model.merge_and_unload()
        checks.close(checks.logits(merged, "bart"), expected)
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert isinstance(loaded, Model)
        checks.close(checks.logits(loaded.eval(), "bart"), expected)
    finally:
        FAMILIES.pop("own_seq2seq")


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [[1], [1, 2], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("model_type", ["bart", "whisper"])
def test_cached_is_uncached_whatever_of_the_decoder_is_skipped(model_type, skip):
    """The length of the KV cache is that of the first layer, whose self-attention always stays."""
    names = [f"decoder.{i}.self" for i in skip] + [f"decoder.{i}.cross" for i in (0, *skip[1:])]
    model = get_peft_model(families.tiny_model(model_type), EASConfig(skip_layers=names)).eval()
    inputs = {k: v for k, v in families.tiny_inputs(model_type).items() if not k.startswith("decoder_")}
    for beams in (1, 3):
        settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams)
        expected = model.generate(**inputs, use_cache=False, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, **settings), expected)


# Saving ---------------------------------------------------------------------------------------------------------------

WITHOUT_PACKAGE = """
import sys, torch
sys.modules["peft_eas"] = None
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[2])
torch.save(model(**inputs).logits, sys.argv[3])
"""


def test_a_merged_model_loads_without_the_package(tmp_path):
    merged = families.adapted("bart").merge_and_unload()
    expected = checks.logits(merged, "bart")
    merged.save_pretrained(tmp_path / "merged")
    torch.save(families.tiny_inputs("bart"), tmp_path / "inputs")
    files = [str(tmp_path / name) for name in ("merged", "inputs", "logits")]
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *files], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_what_is_said_of_a_merged_model(tmp_path, capsys):
    adapted = families.adapted("bart")
    names = adapted.skip_layers
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    assert Record.read(merged.config.eas).skipped == names
    merged.save_pretrained(tmp_path / "merged")
    card = str(model_card(merged))
    assert f"{len(names)} of its 12 attentions" in card
    assert "decoder, cross\n  0 .#.. 3" in card
    for folder in ("adapter", "merged"):
        assert cli.main(["inspect", str(tmp_path / folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["skip_layers"] == names


@pytest.mark.parametrize("model_type", ["bart", "vit", "lxmert"])
def test_the_command_line_merges_them(model_type, tmp_path, capsys):
    families.tiny_model(model_type).save_pretrained(tmp_path / "base")
    adapted = families.adapted(model_type)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = checks.logits(adapted, model_type)
    folders = [str(tmp_path / name) for name in ("adapter", "merged")]
    assert cli.main(["merge", *folders, "--base", str(tmp_path / "base")]) == 0, capsys.readouterr().err
    merged = families.auto_class(model_type).from_pretrained(folders[1]).eval()
    assert type(merged).__name__.startswith("EAS")
    checks.close(checks.logits(merged, model_type), expected)


@pytest.mark.parametrize("model_type", ["bart", "lxmert"])
def test_nothing_is_left_of_a_deleted_adapter(model_type):
    """Not of the further PIAs before a FFN either."""
    model = families.adapted(model_type)
    expected = checks.logits(model, model_type)
    names = set(model.state_dict())
    model.add_adapter("other", EASConfig(skip_layers=model.skip_layers[:1], init_weights=False))
    model.set_adapter("other")
    assert (checks.logits(model, model_type) - expected).abs().max() > 1e-3
    model.delete_adapter("other")
    assert set(model.state_dict()) == names
    pias = [module for module in model.modules() if isinstance(module, EASLayer)]
    assert not [pia for pia in pias if "other" in pia.eas_config]
    torch.testing.assert_close(checks.logits(model, model_type), expected, rtol=0, atol=0)


# Search ---------------------------------------------------------------------------------------------------------------


def batches(count):
    rows = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 90, (7,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)[:4]})
    return rows


def test_a_search_over_names(tmp_path):
    """Among self- and cross-attentions of both lists, by a stock Trainer; what is saved resumes and is loaded."""

    def trainer(**settings):
        model = get_peft_model(families.tiny_model("t5"), EASConfig(num_skip=4, task_type="SEQ_2_SEQ_LM"))
        args = Seq2SeqTrainingArguments(
            tmp_path, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_steps=4, logging_steps=1, **settings,
        )  # fmt: skip
        search = EASCallback(batches(6), warmup_steps=1, search_steps=6, interval=2, num_candidates=2)
        return Seq2SeqTrainer(model, args, train_dataset=batches(20), callbacks=[search]), search

    whole, search = trainer(max_steps=9)
    whole.train()
    places = [key for key, place in find_layers(families.tiny_model("t5")).items() if place.is_skippable]
    report = search.report
    assert report["layers"] == places
    assert report["skip_layers"] == whole.model.skip_layers == whole.model.peft_config["default"].skip_layers
    assert len(report["skip_layers"]) == 4
    plot_search(report)
    logged = [entry for entry in whole.state.log_history if "eas/skip_layers/1" in entry]
    assert [logged[0][f"eas/skip_layers/{m}"] for m in range(1, 5)] == [
        places.index(name) for name in report["rounds"][0]["skip_layers"]
    ]
    resumed, again = trainer(max_steps=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (again.report["order"], again.report["rounds"]) == (report["order"], report["rounds"])
    assert again.report["skip_layers"] == report["skip_layers"]
    whole.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(families.tiny_model("t5"), tmp_path / "adapter").eval()
    assert loaded.skip_layers == report["skip_layers"]
    expected = checks.logits(whole.model.eval(), "t5")
    torch.testing.assert_close(checks.logits(loaded, "t5"), expected, rtol=0, atol=0)
    checks.close(checks.logits(loaded.merge_and_unload(), "t5"), expected)


def test_the_deepest_of_each_list_come_first():
    model = get_peft_model(families.tiny_model("lxmert"), EASConfig(num_skip=2))
    layers = find_layers(families.tiny_model("lxmert"))
    assert [layers[key].depth for key in ("text.1.self", "cross_text.2.self")] == [1 / 2, 2 / 3]
    assert model.skip_layers == []


@pytest.mark.parametrize("model_type", ["bert", "bart"])
def test_scores_by_loss_are_those_of_dropping_by_hand(model_type):
    example = families.EXAMPLES[model_type]
    batch = families.tiny_inputs(model_type) | example.labels
    batch.pop("decoder_input_ids", None)
    scores = score_attentions(families.tiny_model(model_type), [batch], method="loss")
    layers = find_layers(families.tiny_model(model_type))
    assert scores.keys() == layers.keys()
    with torch.no_grad():
        whole = families.tiny_model(model_type)(**batch).loss
        for key, place in layers.items():
            model, seen = families.tiny_model(model_type), []
            *_, projection = (m for m in model.get_submodule(place.attention).modules() if isinstance(m, nn.Linear))
            handle = projection.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            model(**batch)
            handle.remove()
            kept = batch["attention_mask"].bool()
            if isinstance(key, str) and key.startswith("decoder"):
                kept = batch["labels"] != -100
                if key.endswith("self"):  # the first token looks at itself alone
                    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, 1:]], dim=1)
            mean = seen[0][kept].mean(dim=0)
            projection.register_forward_hook(lambda module, args, output, mean=mean: torch.zeros_like(output) + mean)
            assert scores[key] == pytest.approx(float(model(**batch).loss - whole), abs=1e-5)


def test_scores_by_similarity():
    """Of BERT, between what its norm makes of the stream with and without the attention; of a cross-attention, of the
    stream that it adds to."""
    streams = {}
    model = families.tiny_model("bert")
    for index, layer in enumerate(model.bert.encoder.layer):
        attention = layer.attention.output

        def remember(module, args, output, index=index):
            streams[index] = module.LayerNorm.forward(args[1]), output

        attention.register_forward_hook(remember)
    inputs = families.tiny_inputs("bert")
    scores = score_attentions(model, [inputs], "similarity")
    assert list(scores) == list(streams)
    for index, (without, output) in streams.items():
        change = 1 - nn.functional.cosine_similarity(without, output, dim=-1)
        assert scores[index] == pytest.approx(float(change[inputs["attention_mask"].bool()].mean()), abs=1e-6)
    streams.clear()
    model = families.tiny_model("bart")
    for index, layer in enumerate(model.model.decoder.layers):

        def keep(module, args, output, index=index):
            streams[index] = args[0], output[0]

        layer.encoder_attn.register_forward_hook(keep)
    scores = score_attentions(model, [families.tiny_inputs("bart")], "similarity")
    assert len(streams) == 4
    for index, (stream, update) in streams.items():
        change = 1 - nn.functional.cosine_similarity(stream, stream + update, dim=-1)
        assert scores[f"decoder.{index}.cross"] == pytest.approx(float(change.mean()), abs=1e-6)


def test_auto_classes_load_merged_encoders(tmp_path):
    families.adapted("bert").merge_and_unload().save_pretrained(tmp_path)
    assert (
        type(AutoModelForSequenceClassification.from_pretrained(tmp_path)).__name__
        == "EASBertForSequenceClassification"
    )
    families.adapted("mt5").merge_and_unload().save_pretrained(tmp_path)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)).__name__ == "EASMT5ForConditionalGeneration"
