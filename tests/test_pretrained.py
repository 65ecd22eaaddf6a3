"""The main job on a real pretrained model and real text: SmolLM2-135M-Instruct, movie reviews."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from PIL import ImageColor
from real_data import VISUAL_ANSWERS, collator, load_model, load_tokenizer, movie_reviews, tokenise, visual_questions
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from vqa import descriptions

from peft_eas import EASConfig

pytestmark = pytest.mark.pretrained
SKIP = [0, 6, 7, 8, 12, 17, 22, 29]


@pytest.fixture(scope="module")
def smollm2():
    return load_model(), load_tokenizer()


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """A few steps of the stock Trainer; the model, its folder, and what it had computed."""
    base, tokenizer = smollm2
    path = tmp_path_factory.mktemp("smollm2")
    train, held_out = movie_reviews(32, 8)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), EASConfig(skip_layers=SKIP, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        str(path / "run"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=tokenise(train, tokenizer), data_collator=collator(tokenizer)).train()
    model.eval().save_pretrained(path / "adapter")
    prompts = tokenizer([review.prompt for review in held_out], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompts).logits
    tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    return model, path, prompts, logits, tokens


def test_generation_with_and_without_cache(trained):
    model, _, prompts, _, tokens = trained
    assert torch.equal(model.generate(**prompts, max_new_tokens=8, do_sample=False, use_cache=False), tokens)


def test_an_adapter_of_a_pretrained_model_reloads(trained, smollm2):
    _, path, prompts, logits, _ = trained
    loaded = PeftModel.from_pretrained(copy.deepcopy(smollm2[0]), path / "adapter").eval()
    assert loaded.skip_layers == SKIP
    with torch.no_grad():
        torch.testing.assert_close(loaded(**prompts).logits, logits, rtol=0, atol=0)


@torch.no_grad()
def test_merging_saving_and_loading_in_a_new_process(trained, smollm2):
    model, path, prompts, logits, tokens = trained
    kept = prompts["attention_mask"].bool()
    merged = copy.deepcopy(model).merge_and_unload()
    error = (merged(**prompts).logits - logits)[kept].abs().max()
    double = copy.deepcopy(model).double()  # layer 0 is skipped without a measured stand-in, which enlarges rounding
    some = {name: value[:3] for name, value in prompts.items()}  # doubles take long
    exact = double(**some).logits[kept[:3]]
    assert error <= 5 * (logits[:3][kept[:3]] - exact).abs().max()
    assert error <= 1e-3 * logits[kept].abs().max()
    assert (double.merge_and_unload()(**some).logits[kept[:3]] - exact).abs().max() <= 1e-6 * exact.abs().max()
    del double
    assert torch.equal(merged.generate(**prompts, max_new_tokens=8, do_sample=False), tokens)
    # 8 of 30 attentions and as many norms fewer, biases of attentions and FFNs and stand-ins more
    base = smollm2[0]
    attention = sum(p.numel() for p in base.model.layers[0].self_attn.parameters()) + 576
    biases, maps, norms = 22 * (576 + 2 * 192) + 30 * 2 * 1536 + 8 * 576, 8 * 2 * 32 * 576, 8 * 576
    added = biases + maps + norms
    assert base.num_parameters() - merged.num_parameters() == 8 * attention - added

    def kv_bytes(model):
        layers = model(**prompts, use_cache=True).past_key_values.layers
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if t is not None)

    assert kv_bytes(merged) * 30 == kv_bytes(base) * 22

    merged.save_pretrained(path / "merged")
    torch.save({"prompts": dict(prompts), "tokens": tokens}, path / "expected.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(path / "merged")!r}, trust_remote_code=True)
assert "peft_eas" not in sys.modules and "peft" not in sys.modules
saved = torch.load({str(path / "expected.pt")!r})
assert torch.equal(model.generate(**saved["prompts"], max_new_tokens=8, do_sample=False), saved["tokens"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reloaded = AutoModelForCausalLM.from_pretrained(path / "merged")
    torch.testing.assert_close(reloaded(**prompts).logits, merged(**prompts).logits, rtol=0, atol=0)


def test_dropping_one_attention_costs_what_was_measured_before(smollm2):
    """An untrained PIA is "attention output = 0": the losses of docs/method.md, here in their order of magnitude."""
    base, tokenizer = smollm2
    reviews = movie_reviews(0, 16)[1]
    batch = tokenizer([review.text for review in reviews], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = get_peft_model(copy.deepcopy(base), EASConfig(skip_layers=[])).eval()
    losses = {}
    with torch.no_grad():
        for layer in (None, 0, 7, 8):
            model.set_skip_layers([] if layer is None else [layer])
            losses[layer] = model(**batch, labels=labels).loss.item()
    assert abs(losses[7] - losses[None]) < 0.1
    assert abs(losses[8] - losses[None]) < 0.1
    assert losses[0] > losses[None] + 0.3


def test_trained_on_four_bits_and_merged(smollm2, tmp_path, unpacked):
    pytest.importorskip("bitsandbytes")
    stock, tokenizer = smollm2
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        stock.name_or_path, quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert base.get_memory_footprint() < 0.35 * stock.get_memory_footprint()
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)  # without layer 0, which enlarges rounding where it has no measured stand-in
    model = get_peft_model(base, EASConfig(skip_layers=SKIP[1:], task_type="CAUSAL_LM"))
    train, held_out = movie_reviews(8, 4)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=tokenise(train, tokenizer), data_collator=collator(tokenizer)).train()
    prompts = tokenizer([review.prompt for review in held_out], padding=True, return_tensors="pt")
    kept = prompts["attention_mask"].bool()
    with torch.no_grad():
        expected = model.eval()(**prompts).logits
        merged = model.merge_and_unload()
        error = (merged(**prompts).logits - expected)[kept].abs().max()
    assert error <= 1e-4 * expected[kept].abs().max()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert stock.num_parameters() > merged.num_parameters()


def test_the_questions_are_about_the_images_that_they_come_with():
    questions = visual_questions("test")
    assert len(questions) == 9673
    assert {question.image.size for question in questions} == {(64, 64)}
    assert {question.answer for question in questions} == set(VISUAL_ANSWERS)
    described = descriptions(questions)
    assert len(described) == 880
    for image, (color, _shape) in described:  # backgrounds are pale
        rgb = ImageColor.getrgb("lime" if color == "green" else color)
        assert rgb in {found for _, found in image.getcolors(64 * 64)}
