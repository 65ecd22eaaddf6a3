"""The model card: its numbers against what models have and do, its metadata, and whose text is never touched."""

import os
import subprocess
import sys

import attacks
import damage
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from zoo import families, tiny

from peft_eas import EASConfig, card, model_card, skip_attentions, work
from peft_eas.card import layer_picture, write_card
from peft_eas.checks import shown
from peft_eas.runtime.eas_record import Record
from peft_eas.work import base_of, count, on_meta

SKIP = [0, 3]


def merge(base, skip=SKIP, name="me/base", **settings):
    config = EASConfig(skip_layers=skip, **dict(r=4, r_pia=8) | settings)
    base.name_or_path = name
    merged = get_peft_model(base, config).merge_and_unload().eval()
    merged.name_or_path = ""
    return merged


@pytest.fixture
def merged():
    return merge(tiny.model("llama"))


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """What is on the hub: `{name: metadata}`. All else can't be reached."""
    cards = {}

    def model_info(name, timeout):
        if name not in cards:
            raise ConnectionError(name)
        return type("Info", (), {"card_data": ModelCardData(**cards[name])})

    monkeypatch.setattr(card, "model_info", model_info)
    card._read_card_once.cache_clear()
    return cards


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_base_is_known_from_the_merged_model(family):
    base = tiny.model(family)
    expected = count(on_meta(base))
    merged = merge(base)
    assert count(base_of(merged)) == expected
    assert not base_of(merged).config.get_text_config(decoder=True).to_dict().get("per_layer_config")
    assert expected.parameters == tiny.model(family).num_parameters()
    assert count(on_meta(merged)).parameters == merged.num_parameters()


@pytest.mark.parametrize("skip", [SKIP, [1, 2, 5]], ids=str)
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "llava"])
def test_operations_are_those_of_the_formula(family, skip):
    """Two for each weight of a matrix and token, and four for each value of a query and pair of tokens."""
    merged, tokens = merge(tiny.model(family), skip, use_bias=False), 128
    for model, attentions in ((tiny.model(family), 6), (merged, 6 - len(skip))):
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        weights += sum(p.numel() for n, p in model.named_parameters() if n.endswith(("stand_in.down", "stand_in.up")))
        expected = 2 * tokens * weights + attentions * 4 * (4 * 8) * tokens**2
        counted = count(on_meta(model)).prefill[tokens]
        assert counted == pytest.approx(expected, rel=1e-3)  # rotations are matrix products, too
    assert count(base_of(merged)).prefill == count(on_meta(tiny.model(family))).prefill


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
def test_layers_that_are_alike_are_counted_once(family, monkeypatch):
    """With the same sums as when all run, as they have to in Gemma 4, where they hand keys on to one another."""
    model = on_meta(merge(families.tiny_model(family), [1]))
    (layer,) = {type(layer) for layer in model.get_decoder().layers}
    forward, runs = layer.forward, []
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    counted, ran = count(model), len(runs)
    monkeypatch.setattr(work, "_each_kind_once", work._each)
    assert count(model) == counted
    assert counted.prefill
    layers = 2 * len(model.get_decoder().layers)  # one reads a text, and one fills a cache
    assert len(runs) - ran == layers
    assert ran > layers if family == "gemma4_text" else ran == 4  # of two kinds


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gpt2", "olmo2", "minicpm3"])
def test_bytes_of_the_kv_cache_are_those_of_a_cache(family):
    known = family in tiny.FAMILIES
    merged = merge(tiny.model(family) if known else families.tiny_model(family), [0, 2])
    cache = DynamicCache()
    merged(input_ids=torch.arange(7)[None] + 3, past_key_values=cache, use_cache=True)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert sum(t.numel() * t.element_size() // t.shape[-2] for t in tensors) == count(on_meta(merged)).kv_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_can_not_be_counted_is_left_out(dtype):
    """Routing to experts needs values; in bfloat16, some implementations run without, and count for nothing."""
    merged = merge(families.tiny_model("mixtral").to(dtype), [0, 2])
    text = model_card(merged).text
    assert "| parameters |" in text
    assert "operations to read" not in text


def test_numbers_in_the_text(merged):
    text = model_card(merged).text
    old, new = tiny.model("llama").num_parameters(), merged.num_parameters()
    assert f"| parameters | {old:,} | {new:,} | {new / old:.3f} |" in text
    assert f"| KV cache, bytes a token | {6 * 2 * 16 * 4:,} | {4 * 2 * 16 * 4} | 0.667 |" in text
    assert "operations to read 128 tokens" in text  # the most that it takes
    assert "2 of its 6 attentions" in text
    assert "  0 .##.## 5\n" in text
    assert "Skipped: 0, 3." in text
    assert card._short(134_515_008) == "134.5 M"


def test_picture_of_layers():
    assert layer_picture({0, 41}, range(42)) == ["  0 ." + 39 * "#" + " 39", " 40 #. 41"]
    assert layer_picture({3}, [1, 3, 4]) == ["  0 -#-.# 4"]


def test_a_model_that_skips_first_does_not_claim_a_training():
    data = [tiny.inputs("llama")]
    smaller = skip_attentions(tiny.model("llama"), data, skip_layers=[1, 4], stand_in="mean")
    text = model_card(smaller).text
    assert "without 2 of its 6 attentions, which" in text
    assert "`skip_attentions` of peft_eas" in text
    assert "`stand_in='mean'`" in text
    assert "their stand-ins measured" in text
    assert "ine-tuned" not in text
    assert "`r=" not in text
    smaller.config.eas["config"]["stand_in"] = "[x](http://x)"
    smaller.config.eas = Record.parse(smaller.config.eas).written()
    assert "http://x" not in model_card(smaller).text  # what a file says is no Markdown here


# Metadata -------------------------------------------------------------------------------------------------------------


def test_metadata(merged, hub):
    hub["me/base"] = dict(license="mit", language="en", tags=["base"], datasets=["base/data"])
    result = EvalResult("text-generation", "me/reviews", "Reviews", "accuracy", 0.908)
    made = model_card(merged, "me/model", datasets=["me/reviews"], eval_results=[result], measured={"prefill": 1.13})
    again = ModelCard(str(made))  # the hub's library reads what it writes
    assert again.data.to_dict() == made.data.to_dict()
    assert made.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "me/base",
        "base_model_relation": "finetune",
        "license": "mit",
        "language": "en",
        "datasets": ["me/reviews"],
        "tags": ["eas", "attention-skipping"],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "model",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "Reviews", "type": "me/reviews"},
                        "metrics": [{"type": "accuracy", "value": 0.908}],
                    }
                ],
            }
        ],
    }
    assert "| text-generation | Reviews | accuracy | 0.908 |" in made.text
    assert "| prefill | 1.13 |" in made.text
    assert "`r=4`, `r_pia=8`" in made.text
    assert "over other tokens" not in made.text
    assert "over other tokens" in model_card(merge(tiny.model("llama"), propagation="mean")).text


def test_what_is_not_known_is_left_out(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in (None, "base", "/elsewhere/base"):
        data = model_card(merge(tiny.model("llama"), name=name)).data.to_dict()
        assert set(data) == {"library_name", "pipeline_tag", "tags"}
    with pytest.raises(ValueError, match="elsewhere"):
        model_card(merge(tiny.model("llama")), base_model="/elsewhere/base")
    assert model_card(merge(tiny.model("llama"), name=None), base_model="me/other").data.base_model == "me/other"


@pytest.mark.parametrize(
    ("auto", "family", "task"),
    [
        (AutoModelForSequenceClassification, "llama", "text-classification"),
        (AutoModel, "qwen3", "feature-extraction"),
        (None, "llava", "image-text-to-text"),
        (None, "gemma3_text", "text-generation"),
    ],
)
def test_task(auto, family, task):
    base = tiny.model(family) if auto is None else auto.from_config(tiny.config(family))
    made = model_card(merge(base))
    assert made.data.pipeline_tag == task
    assert ("KV cache" in made.text) == (auto is None)


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize(
    ("link", "expected"),
    [("LICENSE.md", "https://huggingface.co/me/base/blob/main/LICENSE.md"), ("https://a.b/c", "https://a.b/c")],
)
def test_the_license_of_the_base(hub, tmp_path, where, link, expected):
    license = dict(license="other", license_name="their-own", license_link=link)
    merged = merge(tiny.model("llama"))
    if where == "hub":
        hub["me/base"] = license
    else:
        merged.config.name_or_path = merged.name_or_path = str(tmp_path)
        ModelCard(f"---\n{ModelCardData(**license).to_yaml()}\n---\n").save(tmp_path / "README.md")
        if link == "LICENSE.md":  # in a folder that nobody else has
            expected = None
    data = model_card(merged).data
    assert (data.license, data.license_name, data.license_link) == ("other", "their-own", expected)


def test_a_card_that_cannot_be_read_stops_nothing(tmp_path):
    merged = merge(tiny.model("llama"))
    merged.name_or_path = str(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert model_card(merged).data.license is None


def test_only_merged_models_have_one():
    with pytest.raises(ValueError, match="not merged by peft_eas"):
        model_card(tiny.model("llama"))


def test_a_model_that_is_saved_has_its_card(merged, tmp_path):
    merged.save_pretrained(tmp_path)
    assert ModelCard(written(tmp_path)).text.startswith(model_card(merged).text)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_card(again).data.to_dict() == model_card(merged).data.to_dict()
    written(tmp_path, "Mine.")
    again.save_pretrained(tmp_path)
    assert written(tmp_path) == "Mine."


@pytest.mark.parametrize("given", ["", "import peft_eas\n"])
def test_what_it_says_of_loading_asks_for_nothing(merged, tmp_path, given):
    """Where `peft_eas` is installed and where it is not imported, on a terminal that nobody answers at."""
    merged.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    code = written(tmp_path).split("## Loading")[1].split("```")[1].removeprefix("python\n")
    code = given + code.replace('"..."', repr(str(tmp_path))) + "print(type(model).__name__, tokenizer('a').input_ids)"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("EASLlamaForCausalLM ["), done.stdout  # no question in front of it


# Whose text it is -----------------------------------------------------------------------------------------------------


def template(**metadata):
    """transformers' card of a model that it knows nothing about."""
    text = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    return str(ModelCard.from_template(ModelCardData(library_name="transformers", **metadata), model_description=text))


def written(folder, text=None):
    path = folder / "README.md"
    if text is not None:
        path.write_text(text, encoding="utf-8", newline="")
    return path.read_text(encoding="utf-8")


def test_an_unedited_card_is_replaced(merged, tmp_path):
    write_card(merged, tmp_path)
    first = written(tmp_path)
    write_card(merged, tmp_path)
    assert written(tmp_path) == first
    other = merge(tiny.model("llama"), skip=[1])
    write_card(other, tmp_path, "me/other")
    expected = model_card(other, "me/other")
    assert written(tmp_path).startswith(str(expected))
    # however it was stored meanwhile
    written(tmp_path, first.replace("\n", "\r\n"))
    write_card(other, tmp_path, "me/other")
    assert ModelCard(written(tmp_path)).data.to_dict() == expected.data.to_dict()
    assert "me/other" in written(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("## Limits", "Mine.\n\n## Limits"),
        lambda text: text.replace("# base with EAS", "# Mine"),
        lambda text: text + "Mine.\n",
        lambda text: text.replace("base_model: me/base", "base_model: me/mine"),
        lambda text: "# Mine\n",
        lambda text: "---\nlicense: [\n---\n",
        lambda text: template().replace("### Direct Use", "### Direct Use\n\nMine."),
    ],
)
def test_what_somebody_wrote_is_kept(merged, tmp_path, edit, caplog):
    write_card(merged, tmp_path)
    edited = edit(written(tmp_path))
    assert edited != written(tmp_path)
    written(tmp_path, edited)
    write_card(merge(tiny.model("llama"), skip=[1]), tmp_path)
    assert written(tmp_path) == edited
    assert "README.md is kept" in caplog.text


@pytest.mark.parametrize("text", ["", "---\nlicense: mit\n---\n", template(tags=["sft"])])
def test_a_card_that_says_nothing_is_replaced(merged, tmp_path, hub, text):
    hub["me/base"] = dict(license="other", license_name="their-own")
    written(tmp_path, text)
    write_card(merged, tmp_path)
    made = ModelCard(written(tmp_path))
    assert "2 of its 6 attentions" in made.text
    assert "More Information Needed" not in made.text
    assert ("sft" in made.data.tags) == ("sft" in text)
    own_license = ("mit", None) if "license: mit" in text else ("other", "their-own")
    assert (made.data.license, made.data.license_name) == own_license


def test_what_somebody_chose_before_there_was_a_card_is_kept(merged, tmp_path):
    written(tmp_path, "---\npipeline_tag: text-classification\n---\n")
    for _ in range(2):
        write_card(merged, tmp_path)
        made = ModelCard(written(tmp_path))
        assert made.data.pipeline_tag == "text-classification"
        assert "2 of its 6 attentions" in made.text


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(card, "model_info", lambda name, timeout: asked.append(name) or 1 / 0)
    for _ in range(2):
        assert model_card(merge(tiny.model("llama"))).data.license is None
    assert asked == ["me/base"]


def test_metadata_that_somebody_added_is_kept(merged, tmp_path, hub):
    hub["me/base"] = dict(license="other", license_name="their-own", language="en")
    write_card(merged, tmp_path)
    made = ModelCard(written(tmp_path))
    made.data.tags.append("mine")
    made.data["thumbnail"] = "mine.png"
    made.save(tmp_path / "README.md")
    # the license is still that of the base, so of another base it is another
    hub["you/base"] = dict(license="apache-2.0")
    write_card(merge(tiny.model("llama"), name="you/base"), tmp_path)
    made = ModelCard(written(tmp_path))
    assert made.data.tags == ["eas", "attention-skipping", "mine"]
    assert (made.data.base_model, made.data["thumbnail"]) == ("you/base", "mine.png")
    assert (made.data.license, made.data.license_name, made.data.language) == ("apache-2.0", None, None)
    # until somebody chooses one
    made.data.license = "mit"
    made.save(tmp_path / "README.md")
    for _ in range(2):
        write_card(merged, tmp_path)
        made = ModelCard(written(tmp_path))
        assert (made.data.base_model, made.data.license, made.data.license_name) == ("me/base", "mit", None)


# Files that somebody changed ------------------------------------------------------------------------------------------

WRONG = ["", "\n# Title", "<script>alert(1)</script>", "../..", "a/b/c", "me/base\n", "x" * 200, 5, None]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_can_not_be_a_repository_is_not_named(merged, wrong):
    merged.config.eas["config"]["base_model"] = wrong
    damage.sign(merged.config.eas)
    made = model_card(merged)
    assert made.data.base_model is None
    assert made.text.startswith("\n# llama with EAS\n\nA `llama` model, fine-tuned")
    for argument in ("repo_id", "base_model"):
        if wrong is not None:
            with pytest.raises(ValueError, match=r"[Rr]epo"):
                model_card(merged, **{argument: wrong})


@pytest.mark.parametrize(
    "wrong", [*(w for w in WRONG if w != 5), "\x1b[2J", "`](x)|", 10**400, float("nan")], ids=shown
)
def test_nothing_of_a_changed_record_gets_into_a_card_as_it_is(merged, wrong):
    for key in ("r", "router", "scaling", "use_bias", "<script>", "groups"):
        merged.config.eas["config"] |= {key: wrong}
        damage.sign(merged.config.eas)
        text = model_card(merged).text
        assert text.count("\n# ") == 1
        assert "<script>" not in text
        assert "\x1b" not in text
        assert ("`EASConfig` with" in text) == (key == "<script>")
        merged.config.eas["config"] = {"r": 4}
    merged.config.eas["config"] = wrong
    with pytest.raises(ValueError, match=r"`eas\.config` in config\.json must be a dict"):
        model_card(merged)


def test_words_of_others_are_words(merged, tmp_path):
    odd = "a\n# b | <script> [c](d) `e` \x1b[2J"
    result = EvalResult(odd, odd, odd, odd, 0.5)
    card = model_card(merged, eval_results=[result], measured={odd: 1.5})
    assert card.text.count("\n# ") == 1
    assert r"| a # b \| \<script\> \[c\](d) \`e\` \\x1b\[2J | 1.50 |" in card.text
    assert "<script>" not in card.text


def test_a_base_model_s_odd_card_is_no_reason_for_none(hub, tmp_path):
    hub["me/base"] = dict(license=["mit"], language="en", license_link=5)
    merged = merge(tiny.model("llama"))
    assert model_card(merged).data.license is None
    hub["me/other"] = dict(license="mit", license_link=5)
    assert model_card(merge(tiny.model("llama"), name="me/other")).data.license == "mit"


def test_a_full_disk_leaves_the_card_that_was_there(merged, tmp_path):
    write_card(merged, tmp_path)
    before = attacks.contents(tmp_path)
    moments = []
    for moment, failed in attacks.full_disks(tmp_path, lambda: write_card(merged, tmp_path, "me/other")):
        moments.append(moment)
        assert failed
        assert attacks.contents(tmp_path) == before
    assert [moment.split()[0] for moment in moments] == ["open", "write", "replace"]
