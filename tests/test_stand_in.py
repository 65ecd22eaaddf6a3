"""Stand-ins: what a skipped attention leaves, how it is measured, and that nothing else changes."""

import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from zoo import families, tiny

from peft_eas import EASCallback, EASConfig, initialize_eas_weights
from peft_eas.stand_in import Moments, fill_stand_ins

SKIP = [0, 3, 4]


def tuned(family="llama", **settings):
    return get_peft_model(tiny.model(family), EASConfig(**dict(skip_layers=SKIP) | settings))


def stand_ins(model, adapter="default"):
    return {
        int(name.split(".layers.")[1].split(".")[0]): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f"eas_stand_in.{adapter}.constant" in name
    }


def means_by_hand(family, batches):
    """In float64, from what the stream is before and after each attention of a stock model."""
    model, seen = tiny.model(family).double(), {}
    norm = "pre_feedforward_layernorm" if family == "gemma3_text" else "post_attention_layernorm"
    layers = model.get_decoder().layers
    for i, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, 0): args[0]}))
        getattr(layer, norm).register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, 1): args[0]}))
    totals, count = torch.zeros(len(layers), model.config.get_text_config().hidden_size, dtype=torch.float64), 0
    for batch in batches:
        with torch.no_grad():
            model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        for row, mask in enumerate(batch["attention_mask"]):
            kept = mask.nonzero().flatten().tolist()[1:]  # without the first, which looks at itself alone
            count += len(kept)
            for i in range(len(layers)):
                totals[i] += (seen[i, 1] - seen[i, 0])[row, kept].sum(dim=0)
    return totals / count


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_they_are_the_means_of_what_attentions_add(family, padding):
    batches = [tiny.inputs(family, seed=seed, padding=padding) for seed in (1, 2)]
    model = tuned(family, stand_in="mean")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    initialize_eas_weights(model, batches)
    found, expected = stand_ins(model), means_by_hand(family, batches)
    assert list(found) == SKIP
    for index, value in found.items():
        torch.testing.assert_close(value.double(), expected[index], rtol=1e-4, atol=1e-6)
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all("eas_stand_in" in name for name in changed)
    assert len(changed) == len(SKIP)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("rank", [4, 32])
def test_a_linear_one_is_the_nearest_of_its_rank(rank):
    """By torch's own least squares, with rows for the ridge, and the singular vectors of what that predicts."""
    batches = [tiny.inputs("llama", rows=6, length=15, seed=seed, padding="left") for seed in (1, 2)]
    model, base, seen = tuned(r_pia=rank), tiny.model("llama").double(), {}
    initialize_eas_weights(model, batches)
    for index in SKIP:
        attention = base.model.layers[index].self_attn
        attention.register_forward_hook(
            lambda m, args, kwargs, output, i=index: seen.update({i: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
    tokens = {index: ([], []) for index in SKIP}
    for batch in batches:
        with torch.no_grad():
            base(**batch)
        for row, mask in enumerate(batch["attention_mask"]):
            for place in mask.nonzero().flatten().tolist()[1:]:
                for index, (read, added) in seen.items():
                    tokens[index][0].append(read[row, place])
                    tokens[index][1].append(added[row, place])
    adapted = model.get_base_model().model.layers
    for index, pair in tokens.items():
        z, a = map(torch.stack, pair)
        (count, size), z_mean, a_mean = z.shape, z.mean(dim=0), a.mean(dim=0)
        ridge = 2 * size / count * (z - z_mean).square().mean()
        rows = torch.cat([z - z_mean, (count * ridge).sqrt() * torch.eye(size, dtype=z.dtype)])
        wanted = torch.cat([a - a_mean, torch.zeros(size, size, dtype=z.dtype)])
        whole = torch.linalg.lstsq(rows, wanted).solution
        kept = torch.linalg.svd(rows @ whole).Vh[:rank]
        expected = whole @ kept.T @ kept
        attention = adapted[index].self_attn
        down, up, constant = (
            getattr(attention.eas_stand_in["default"], name).detach().double() for name in ("down", "up", "constant")
        )
        torch.testing.assert_close((up @ down).T, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(constant, a_mean - z_mean @ expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_wide_map_misses_no_more_than_the_nearest_of_its_rank(decay):
    """Its directions are iterated for, which is inexact where they matter alike; the oracle takes them all."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(3000, 300, generator=generator, dtype=torch.float64) + 5
    added = read @ torch.randn(300, 300, generator=generator, dtype=torch.float64)
    added = added * torch.arange(1, 301) ** -decay + torch.randn(3000, 300, generator=generator)
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:  # of a GPU, which has random numbers of its own
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
        fit = Moments.of(added, read).fit(16)
    assert torch.equal(torch.get_rng_state(), state)
    left = (added - fit.constant - read @ (fit.maps[1] @ fit.maps[0]).T).square().sum()
    about, wanted = read - read.mean(0), added - added.mean(0)
    ridge = 2 * 300 / 3000 * about.square().mean()
    whole = torch.linalg.solve(about.T @ about / 3000 + ridge * torch.eye(300), about.T @ wanted / 3000)
    kept = torch.linalg.eigh(wanted.T @ about @ whole).eigenvectors[:, -16:]
    least = (wanted - about @ whole @ kept @ kept.T).square().sum()
    assert left / least == pytest.approx(1, abs=1e-3)
    assert least < 0.99 * wanted.square().sum()


@pytest.mark.parametrize("mean", [0, 1000])
def test_moments_of_batches_are_those_of_all_tokens_however_far_from_zero(mean):
    """Sums of squares in single precision would have an error of 0.1 for each token."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(1200, 20, generator=generator) * torch.logspace(0, 1, 20) + mean
    added = torch.randn(1200, 30, generator=generator) + 0.1 * (read - mean).sum(1, keepdim=True) - mean
    parts = [Moments.of(added[rows], read[rows]) for rows in torch.arange(1200).split((100, 1, 699, 400))]
    found = parts[0]
    for part in parts[1:]:
        found += part
    z, a = read.double(), added.double()
    assert found.count == 1200
    torch.testing.assert_close(found.mean, a.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.read[0], z.mean(0), rtol=1e-9, atol=1e-9)
    z, a = z - z.mean(0), a - a.mean(0)
    torch.testing.assert_close(found.read[1], z.T @ z, rtol=1e-4, atol=0.05)
    torch.testing.assert_close(found.read[2], z.T @ a, rtol=1e-4, atol=0.05)


def test_what_rounding_leaves_of_two_inputs_that_are_equal_is_no_covariance_and_does_no_harm():
    count, equal = 10**9, torch.tensor([[1, 1 + 1e-7], [1 + 1e-7, 1]], dtype=torch.float64)
    read = torch.zeros(2).double(), count * equal, count * torch.ones(2, 3).double()
    constant, (down, up) = Moments(count, torch.zeros(3).double(), read).fit(1)
    torch.testing.assert_close((up @ down).sum(1), torch.ones(3).double(), rtol=1e-4, atol=0)
    assert not constant.any()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_tokens_make_a_map_that_is_small_and_right_on_them(count):
    generator = torch.Generator().manual_seed(0)
    read, added = (torch.randn(count, 40, generator=generator) * 100 for _ in range(2))
    constant, (down, up) = Moments.of(added, read).fit(8)
    assert all(torch.isfinite(each).all() for each in (constant, down, up))
    torch.testing.assert_close(constant + up @ down @ read.double().mean(0), added.double().mean(0))
    spread = (added - added.mean(0)).square().sum()
    missed = (added - constant - read.double() @ (up @ down).T).square().sum()
    assert missed <= spread + 1e-6


def test_an_attention_that_is_linear_costs_next_to_nothing():
    """One that looks at its own token alone, in a window of one."""
    base = tiny.model("mistral", changes=dict(sliding_window=1)).eval()
    ids = torch.randint(3, 97, (120, 40), generator=torch.Generator().manual_seed(0))
    moved = {}
    for stand_in in ("linear", "mean"):
        model = get_peft_model(
            tiny.model("mistral", changes=dict(sliding_window=1)), EASConfig(skip_layers=[2], stand_in=stand_in)
        )
        initialize_eas_weights(model, [{"input_ids": part} for part in ids.split(30)])
        with torch.no_grad():
            moved[stand_in] = (model.eval()(ids[:8]).logits - base(ids[:8]).logits).norm() / base(ids[:8]).logits.norm()
    assert moved["linear"] < 0.03
    assert moved["mean"] > 10 * moved["linear"]


def test_positions_that_start_anew_are_first_tokens():
    rows = [tiny.inputs("llama", rows=1, length=length, padding=None, seed=length)["input_ids"] for length in (5, 8)]
    apart, packed = tuned(), tuned()
    initialize_eas_weights(apart, [{"input_ids": row} for row in rows])
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    initialize_eas_weights(packed, [{"input_ids": torch.cat(rows, dim=1), "position_ids": positions}])
    torch.testing.assert_close(stand_ins(packed), stand_ins(apart), rtol=1e-4, atol=1e-6)
    assert all(value.any() for value in stand_ins(apart).values())


def test_a_stand_in_is_what_is_trained_and_merged():
    for family in ("llama", "gemma3_text"):
        for stand_in, part in (("linear", "constant"), ("linear", "up"), ("mean", "constant")):
            check_trained_and_merged(family, stand_in, part)


def check_trained_and_merged(family, stand_in, part):
    model, inputs = tuned(family, stand_in=stand_in).eval(), tiny.inputs(family)
    initialize_eas_weights(model, [inputs])
    tiny.shake(model)
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[kept]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits[kept], expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        getattr(merged.get_decoder().layers[3].self_attn.stand_in, part).zero_()
    assert (merged(**inputs).logits[kept] - expected).abs().max() > 1e-2


def test_other_adapters_stay_as_they_are():
    model = tuned()
    model.add_adapter("second", EASConfig(skip_layers=[1]))
    initialize_eas_weights(model, [tiny.inputs("llama")], "second")
    assert not any(value.any() for value in stand_ins(model).values())
    assert list(stand_ins(model, "second")) == [1]
    assert stand_ins(model, "second")[1].any()
    assert model.active_adapters == ["default"]


def test_what_can_not_be_measured_is_said_and_changes_nothing():
    model, inputs = tuned(), tiny.inputs("llama")
    with pytest.raises(ValueError, match="no tokens"):
        initialize_eas_weights(model, [])
    with pytest.raises(ValueError, match="no tokens"):  # first tokens alone
        initialize_eas_weights(model, [{"input_ids": torch.tensor([[5]])}])
    with pytest.raises(ValueError, match="'other'"):
        initialize_eas_weights(model, [inputs], "other")
    with pytest.raises(ValueError, match=r"stand_in='zero'"):
        initialize_eas_weights(tuned(stand_in="zero"), [inputs])
    with pytest.raises(ValueError, match="EAS adapter"):
        initialize_eas_weights(tiny.model("llama"), [inputs])
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    poisoned = embeddings.clone()
    poisoned[1, 5] = math.nan
    mask = inputs["attention_mask"]
    batches = [{"inputs_embeds": given, "attention_mask": mask} for given in (embeddings, poisoned)]
    with pytest.raises(ValueError, match="not finite"):
        initialize_eas_weights(model, batches)
    assert not any(value.any() for value in stand_ins(model).values())
    initialize_eas_weights(model, batches[:1])
    assert all(value.any() for value in stand_ins(model).values())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        initialize_eas_weights(model, [inputs])


def test_a_search_has_all_of_them_and_keeps_those_it_needs(tmp_path):
    model = tuned(skip_layers=None, num_skip=2)
    assert list(stand_ins(model)) == list(range(6))
    train(model, tmp_path, EASCallback(ROWS[40:], warmup_steps=1, search_steps=3, interval=1), max_steps=6)
    assert list(stand_ins(model)) == model.skip_layers
    assert all(value.any() for value in stand_ins(model).values())


IDS = torch.randint(3, 97, (64, 9), generator=torch.Generator().manual_seed(5))
ROWS = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in IDS]


def train(model, folder, *callbacks, resume=None, **settings):
    settings = dict(max_steps=4, learning_rate=1e-3, save_strategy="no") | settings
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )
    Trainer(model, args, train_dataset=ROWS[:40], callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
    return model


def test_a_callback_measures_what_is_given_to_skip(tmp_path):
    """Before the first step, from the training set; what was measured or trained already stays."""
    model = train(tuned(), tmp_path, EASCallback(ROWS[40:]), learning_rate=0.0)
    expected = tuned()
    initialize_eas_weights(expected, [{name: torch.stack([r[name] for r in ROWS[:40]]) for name in ROWS[0]}])
    for index, value in stand_ins(model).items():
        torch.testing.assert_close(value, stand_ins(expected)[index], rtol=1e-3, atol=1e-5)  # all of them
    before = stand_ins(model)
    train(model, tmp_path, EASCallback(ROWS[:8]), learning_rate=0.0)
    assert all(torch.equal(value, before[index]) for index, value in stand_ins(model).items())
    trained = stand_ins(train(model, tmp_path, EASCallback(ROWS[:8])))
    assert all(not torch.equal(value, before[index]) for index, value in trained.items())


@pytest.mark.parametrize("has_length", [False, True])
def test_a_training_set_that_is_streamed_leaves_the_held_out_examples(tmp_path, has_length):
    class Streamed(IterableDataset):
        def __iter__(self):
            return iter(ROWS[:40])

    if has_length:  # torch's have an index, which says that there is none
        Streamed.__len__ = lambda self: 40
    args = TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = tuned()
    Trainer(model, args, train_dataset=Streamed(), callbacks=[EASCallback(ROWS[40:])]).train()
    expected = tuned()
    initialize_eas_weights(expected, [{name: torch.stack([r[name] for r in ROWS[40:]]) for name in ROWS[0]}])
    for index, value in stand_ins(model).items():
        torch.testing.assert_close(value, stand_ins(expected)[index], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resuming_keeps_them_bit_for_bit(tmp_path, checkpointing):
    settings = dict(save_strategy="steps", save_steps=2, gradient_checkpointing=checkpointing)
    whole = stand_ins(train(tuned(), tmp_path / "whole", EASCallback(ROWS[40:]), **settings))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(tuned(), tmp_path / "resumed", EASCallback(ROWS[40:]), resume=checkpoint, **settings)
    assert list(whole) == SKIP
    assert all(torch.equal(value, whole[index]) for index, value in stand_ins(resumed).items())


def test_a_training_that_starts_without_them_says_so_once(tmp_path):
    def said(model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, tmp_path)
        return [str(w.message) for w in caught if "start at zero" in str(w.message)]

    (message,) = said(tuned())
    assert "initialize_eas_weights" in message
    assert "EASCallback" in message
    assert not said(tuned(stand_in="zero"))
    measured = tuned()
    initialize_eas_weights(measured, [tiny.inputs("llama")])
    assert not said(measured)


def test_a_trainer_that_has_no_loss_for_its_batches(tmp_path):
    class Online(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {"input_ids": inputs["completions"]}, *args, **kwargs)

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    online = Online(tuned(), args, train_dataset=ROWS, callbacks=[EASCallback(ROWS)])
    with pytest.raises(ValueError, match=r"can't be measured.*'completions'.*initialize_eas_weights"):
        online.train()


@pytest.mark.parametrize("name", ["eas_B", "eas_up"])
def test_adapters_of_another_form_are_refused(tmp_path, name):
    """Older ones had other parameters: `eas_B`, then `eas_up`, where there is `eas_adapter.up` now."""
    tuned().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = {key.replace("eas_adapter.up", name): value for key, value in load_file(file).items()}
    save_file(saved, file)
    with pytest.raises(ValueError, match=r"an older peft_eas.*Ways out"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)


@pytest.mark.parametrize("value", ["median", None, True])
def test_what_else_may_stand_in(value):
    with pytest.raises(ValueError, match="stand_in"):
        EASConfig(stand_in=value)


def test_measuring_ends_when_there_are_enough_tokens():
    model, calls = tuned(), []
    base = model.base_model
    batches = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in IDS.split(4) * 2)

    def forward(batch):
        calls.append(batch["input_ids"].shape)
        model(**batch)

    with torch.no_grad():
        fill_stand_ins(base, "default", batches, forward, enough=3)
    # 4 rows of 8 tokens that count a batch; 3 tokens for each of 32 numbers are 96
    assert len(calls) == 3
    assert all(value.any() for value in stand_ins(model).values())


def test_dropout_behind_a_constant_takes_each_token_by_itself():
    """In training the constant has as many rows as there are tokens; a broadcast one would lose the same numbers in
    all of them."""
    model = families.adapted("bart", stand_in="mean", propagation="none", skip_layers=["encoder.1.self"]).train()
    layer = model.get_base_model().model.encoder.layers[1]
    layer.dropout, given = 0.5, []
    layer.self_attn_layer_norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(**families.tiny_inputs("bart"))
    before, after = given
    lost = (after - before).abs() < 1e-6
    assert 0.3 < lost.float().mean() < 0.7
    assert (lost != lost[:, :1]).any()
