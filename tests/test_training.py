"""Training: gradients, checkpointing, and the stock Trainer with resume and best model."""

from pathlib import Path

import pytest
import reference
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback
from zoo import tiny
from zoo.training import batch, dataset, parameters, trainer

from peft_eas import EASConfig

SETTINGS = [dict(), dict(propagation="mean"), dict(router="static", propagation="mean")]


def adapted(family="llama", seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(tiny.model(family), EASConfig(**dict(skip_layers=[0, 3]) | settings))
    tiny.shake(model, scale=0.05)
    return model


def gradients(model, *batches):
    model.train().zero_grad()
    sum(model(**given).loss for given in batches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, use_reentrant, settings):
    model = adapted(family, **settings)
    model.enable_input_require_grads()
    # two forwards before one backward: each is recomputed with its own tokens
    batches = [batch(family), batch(family, seed=5, answer=2)]
    expected = gradients(model, *batches)
    assert all(g.abs().max() > 0 for g in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    same_gradients(gradients(model, *batches), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_those_of_the_formulas(family, settings):
    model, given = adapted(family, **settings), batch(family)
    actual = gradients(model, given)
    leaves = reference.adapters(model)
    for named in leaves.values():
        for value in named.values():
            value.requires_grad_(True)
    labels = given.pop("labels")
    logits = reference.logits(tiny.model(family), leaves, model.peft_config["default"], given)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = {f"{module}.default.{name}": p.grad for module, named in leaves.items() for name, p in named.items()}
    assert len(actual) == len(expected)
    for name, gradient in expected.items():
        found = actual[f"base_model.model.{name}"].double()
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(gradient_checkpointing=True),
        dict(gradient_accumulation_steps=2, num_train_epochs=20),
        dict(bf16=True),
    ],
    ids=str,
)
def test_the_stock_trainer_learns_and_what_it_learned_is_merged(tmp_path, kwargs):
    model = adapted()
    run = trainer(tmp_path, model, **dict(num_train_epochs=12) | kwargs)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert after < 0.5 * before
    inputs = tiny.inputs("llama")
    # not the PeftModel, to whose forward `bf16=True` has added autocasting for good
    expected = model.base_model.eval()(**inputs).logits
    merged = model.merge_and_unload()(**inputs).logits
    assert (merged - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    """With a skip set changed after injection, which the configuration of the resuming script does not know."""

    def begin(path):
        model = adapted(skip_layers=[1])
        model.set_skip_layers([0, 3])
        tiny.shake(model, seed=4, scale=0.05)
        return trainer(path, model)

    whole = begin(tmp_path / "whole")
    whole.train()
    begin(tmp_path / "halves").train()
    resumed = trainer(tmp_path / "halves", adapted(skip_layers=[0, 3], seed=11))
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-6"))
    assert resumed.model.skip_layers == [0, 3]
    expected, actual = parameters(whole.model), parameters(resumed.model)
    used = {n for n, p in resumed.model.named_parameters() if p.requires_grad}
    for name in used:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    assert set(expected) >= used


def test_load_best_model_at_end_brings_its_skip_set_back(tmp_path):
    """The best checkpoint was saved with other attentions skipped than the model has in the end."""
    model = adapted()
    run = trainer(
        tmp_path, model, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = run.state.best_model_checkpoint
    loaded = adapted(seed=5)
    loaded.set_skip_layers([2])
    loaded.load_adapter(best, "default")
    assert loaded.skip_layers == model.skip_layers == [0, 3]
    inputs = tiny.inputs("llama")
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("propagation", ["none", "mean"])
def test_every_token_may_be_a_label(tmp_path, propagation):
    """labels = input_ids, and label smoothing, which takes the labels from the model."""
    run = trainer(tmp_path, adapted(propagation=propagation), label_smoothing_factor=0.1, max_steps=2)
    run.train_dataset = dataset().map(lambda row: {"labels": row["input_ids"]})
    run.train()
    assert run.state.global_step == 2


def test_a_checkpoint_of_another_set_is_not_gone_on_from(tmp_path):
    trainer(tmp_path, adapted(), max_steps=3).train()
    again = trainer(tmp_path / "again", adapted(skip_layers=[1, 4]))
    with pytest.raises(
        ValueError, match=r"skips the attentions \[0, 3\], but adapter 'default' was made with `skip_la"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class SaveTrainable(TrainerCallback):
    """Saves over each checkpoint what some training scripts save: a state dict of parameters, and no gates."""

    def on_save(self, args, state, control, model, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.save_pretrained(folder, state_dict=trainable)
        weights = load_file(folder / "adapter_model.safetensors")
        gateless = {name: tensor for name, tensor in weights.items() if "eas_skip" not in name}
        save_file(gateless, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_checkpoints_without_gates(tmp_path):
    """Resumed, and brought back as the best ones."""
    settings = dict(learning_rate=0.0, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    model = adapted()
    expected = parameters(model)
    run = trainer(tmp_path, model, [SaveTrainable()], max_steps=3, **settings)
    run.train()
    resumed = trainer(tmp_path / "again", adapted(seed=1), [SaveTrainable()], max_steps=6, **settings)
    tiny.shake(resumed.model, seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for trained in (run.model, resumed.model):
        assert trained.skip_layers == [0, 3]
        actual = parameters(trained)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_router_learns_which_branch_to_go_by():
    """A fresh adapter of two branches is an identity; after some steps, its branches and their weights differ."""
    stock, inputs = tiny.model("llama"), tiny.inputs("llama", padding=None)
    model = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[], router="static", task_type="CAUSAL_LM"))
    torch.testing.assert_close(model.eval()(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    routers = [p for name, p in model.named_parameters() if name.endswith(".router")]
    ups = [p for name, p in model.named_parameters() if "eas_adapter.default.up" in name and "bias" not in name]
    assert len(routers) == len(ups) == 12
    assert all((router[0] - router[1]).abs() > 1e-3 for router in routers)
    assert all((up[0] - up[1]).norm() > 0.1 * up[0].norm() for up in ups)  # not by rounding alone
