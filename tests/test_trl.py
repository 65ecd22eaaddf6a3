"""TRL's trainers with `peft_config=EASConfig(...)`: what the first step logs is what a computation by hand gives.

By hand means: each sequence alone, without padding, its logits those of `reference` (in float64, from the formulas);
tokens, labels and losses are spelled out here. Every test has a row in the table of docs/trl.md.
"""

import copy
import math
from pathlib import Path

import pytest
import reference
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from zoo import tiny

from peft_eas import EASCallback, EASConfig, initialize_eas_weights

trl = pytest.importorskip("trl", minversion="1.16")

PROPAGATIONS = ("none", "mean")
SKIPPED = [0, 3]
EOS, USER, ASSISTANT = 2, 83, 84
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w81 {% generation %}{{ m.content }} <eos>{% endgeneration %}"
    "{% else %} w80 {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}w81 {% endif %}"
)
DOCS = Path(__file__).parent.parent / "docs" / "trl.md"
TABLE = ["| trainer | with | works | remark |", "|---|---|---|---|"]


def row(trainers, what, remark, works="yes"):
    """A row of the table in docs/trl.md, which the test that has it tries."""
    TABLE.append(f"| {trainers} | {what} | {works} | {remark} |")
    return lambda test: test


# What is trained on: words, and their tokens by hand ------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(3)


def draw(low, high):
    """A few tokens; each is a word."""
    length = int(torch.randint(low, high, (1,), generator=GENERATOR))
    return torch.randint(3, 83, (length,), generator=GENERATOR).tolist()


def words(ids):
    return " ".join(f"w{i - 3}" for i in ids)


def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


PROMPTS = [draw(3, 7) for _ in range(6)]
ANSWERS = [draw(2, 5) for _ in range(6)]
OTHERS = [draw(2, 5) for _ in range(6)]
MOVED = [ANSWERS[-1], *ANSWERS[:-1]]


# Models, and what they compute by hand --------------------------------------------------------------------------------


def config(propagation, **settings):
    return EASConfig(**dict(skip_layers=SKIPPED, propagation=propagation, task_type="CAUSAL_LM") | settings)


class ByHand:
    """`ids -> logits (T, V)` of one sequence, with the adapter that `model` has now."""

    def __init__(self, model, base=tiny.model):
        self.config, self.base = model.peft_config["default"], base("llama")
        self.parameters = reference.adapters(model)
        self.leaves = [p.requires_grad_() for named in self.parameters.values() for p in named.values()]

    def __call__(self, ids):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return reference.logits(self.base, self.parameters, self.config, inputs)[0]

    def gradient_norm(self, loss):
        return torch.stack([g.norm() for g in torch.autograd.grad(loss, self.leaves)]).norm().item()


@torch.no_grad()
def stock(ids):
    """The base model, with all of its attentions."""
    return tiny.model("llama").double()(torch.tensor([ids])).logits[0]


def log_probs(logits, prompt, answer):
    """Log-probabilities of the answer's tokens, `(len(answer),)`; the first of a text has none."""
    ids = [*prompt, *answer]
    scores = logits(ids)[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return scores[len(prompt) - 1 :] if prompt else scores


def nll(logits, rows):
    """Mean over all tokens of `[(prompt, answer), ...]` that have a loss."""
    return -torch.cat([log_probs(logits, *row) for row in rows]).mean()


def totals(logits, prompts, answers):
    """Log-probabilities of whole answers, `(B,)`."""
    return torch.stack([log_probs(logits, p, [*a, EOS]).sum() for p, a in zip(prompts, answers, strict=True)])


def close(actual, expected):
    expected = expected.item() if isinstance(expected, torch.Tensor) else expected
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)


# Training -------------------------------------------------------------------------------------------------------------


def make(name, path, rows, peft_config=None, model=None, rewards=None, callbacks=None, ref_model=None, **settings):
    """TRL's trainer of that name, which evaluates on what it trains on. A new adapter has weights that matter."""
    common = dict(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=6, per_device_eval_batch_size=6,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    given = dict(reward_funcs=rewards, ref_model=ref_model)
    rows = Dataset.from_list(rows)
    made = getattr(trl, f"{name}Trainer")(
        tiny.model("llama") if model is None else model, args=getattr(trl, f"{name}Config")(**common | settings),
        processing_class=tokenizer(), train_dataset=rows, eval_dataset=rows, peft_config=peft_config,
        callbacks=callbacks, **{k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    if model is None or name == "Reward":
        tiny.shake(made.model)
    return made


def trained(trainer):
    """What the first step logged. All of the adapter has to move, and nothing else."""
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == learned
    return trainer.state.log_history[0]


def agrees(logs, policy, loss):
    close(logs["loss"], loss)
    close(logs["grad_norm"], policy.gradient_norm(loss))


# SFT ------------------------------------------------------------------------------------------------------------------

EXAMPLES = list(zip(PROMPTS, ANSWERS, strict=True))
TEXTS = [{"text": words(p + a)} for p, a in EXAMPLES]
PAIRS = [{"prompt": words(p), "completion": " " + words(a)} for p, a in EXAMPLES]
MESSAGES = [
    {"messages": [{"role": "user", "content": words(p)}, {"role": "assistant", "content": words(a)}]}
    for p, a in EXAMPLES
]
WHOLE = [([], [*p, *a, EOS]) for p, a in EXAMPLES]
STREAM = [token for _, text in WHOLE for token in text]
# data, settings, what of it has a loss, remark
SFT = {
    "`text`": (TEXTS, {}, WHOLE, "the loss is that of all tokens"),
    "`prompt`, `completion`": (PAIRS, {}, [(p, [*a, EOS]) for p, a in EXAMPLES], "the loss is the completions'"),
    "`messages`": (MESSAGES, {}, [([], [USER, *p, ASSISTANT, *a, EOS]) for p, a in EXAMPLES], "that of all tokens"),
    "`messages`, `assistant_only_loss=True`": (
        MESSAGES, dict(assistant_only_loss=True), [([USER, *p, ASSISTANT], [*a, EOS]) for p, a in EXAMPLES],
        "that of the answers",
    ),
    '`packing=True`, `packing_strategy="bfd"`': (
        TEXTS, dict(packing=True, max_length=16), WHOLE,
        "packed texts are kept apart, by `sdpa` and `eager`, too",
    ),
    "`padding_free=True`": (TEXTS, dict(padding_free=True, max_length=None), WHOLE, "likewise"),
    '`packing=True`, `packing_strategy="wrapped"`': (
        TEXTS, dict(packing=True, packing_strategy="wrapped", max_length=16),
        [([], STREAM[i : i + 16]) for i in range(0, len(STREAM), 16)],
        "texts are cut and run into each other, as TRL says",
    ),
}  # fmt: skip


for what, (_, _, _, remark) in SFT.items():
    row("SFT", what, remark)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("what", SFT)
def test_sft(tmp_path, what, propagation):
    rows, settings, expected, _ = SFT[what]
    made = make("SFT", tmp_path, rows, config(propagation), **settings)
    policy = ByHand(made.model)
    agrees(trained(made), policy, nll(policy, expected))


@pytest.mark.parametrize("what", SFT)
def test_sft_with_lora_is_of_the_same_tokens(tmp_path, what):
    """What packing does to texts is TRL's and transformers' doing."""
    rows, settings, expected, _ = SFT[what]
    made = make("SFT", tmp_path, rows, LoraConfig(), **settings)
    close(trained(made)["loss"], nll(stock, expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_needs_no_flash_attention(tmp_path, attention):
    model = get_peft_model(tiny.model("llama", attn_implementation=attention), config(PROPAGATIONS[-1]))
    tiny.shake(model)
    expected = nll(ByHand(model), WHOLE)
    close(trained(make("SFT", tmp_path, TEXTS, model=model, packing=True, max_length=16))["loss"], expected)


@row("SFT", "`label_smoothing_factor`", "TRL is to remove it")
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_label_smoothing(tmp_path, propagation):
    made = make("SFT", tmp_path, TEXTS, config(propagation), label_smoothing_factor=0.1)
    policy = ByHand(made.model)
    scores = torch.cat([policy(text)[:-1].log_softmax(-1) for _, text in WHOLE])
    agrees(trained(made), policy, 0.9 * nll(policy, WHOLE) - 0.1 * scores.mean())


# Preferences ----------------------------------------------------------------------------------------------------------

BETA = 0.1
PREFERENCES = [
    {"prompt": words(p), "chosen": " " + words(a), "rejected": " " + words(o)}
    for p, a, o in zip(PROMPTS, ANSWERS, OTHERS, strict=True)
]
REWARDED = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in PREFERENCES]
LABELLED = [row | {"label": i % 3 > 0} for i, row in enumerate(PAIRS)]


def dpo(policy, base):
    chosen, rejected = (totals(policy, PROMPTS, a) - totals(base, PROMPTS, a) for a in (ANSWERS, OTHERS))
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def kto(policy, base):
    """Equation (7) of arXiv 2402.01306; its KL is estimated with the answers of other rows."""
    ratios = totals(policy, PROMPTS, ANSWERS) - totals(base, PROMPTS, ANSWERS)
    kl = (totals(policy, PROMPTS, MOVED) - totals(base, PROMPTS, MOVED)).mean().detach().clamp(min=0)
    desired = torch.tensor([row["label"] for row in LABELLED])
    return (1 - torch.sigmoid(BETA * torch.where(desired, ratios - kl, kl - ratios))).mean()


PREFERENCE = {"DPO": (PREFERENCES, dpo), "KTO": (LABELLED, kto)}


@row("DPO, KTO", "`peft_config`", "the reference is the base model, with all of its attentions")
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("name", PREFERENCE)
def test_preferences(tmp_path, name, propagation):
    rows, loss = PREFERENCE[name]
    made = make(name, tmp_path, rows, config(propagation), beta=BETA)
    policy = ByHand(made.model)
    agrees(trained(made), policy, loss(policy, stock))


def reward_model(family="llama"):
    torch.manual_seed(0)
    settings = tiny.config(family)
    settings.num_labels = 1
    made = AutoModelForSequenceClassification.from_config(settings)
    made.model.load_state_dict(tiny.model(family).model.state_dict())
    torch.nn.init.normal_(made.score.weight)
    return made.eval()


@row("Reward", "`peft_config`", '`task_type="SEQ_CLS"`, which trains the head, too')
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_reward(tmp_path, propagation):
    made = make("Reward", tmp_path, REWARDED, config(propagation, task_type="SEQ_CLS"), reward_model())
    policy = ByHand(made.model, base=reward_model)
    assert any("score" in name for name, parameter in made.model.named_parameters() if parameter.requires_grad)
    chosen, rejected = (
        torch.stack([policy([*p, *a, EOS]).squeeze() for p, a in zip(PROMPTS, answers, strict=True)])
        for answers in (ANSWERS, OTHERS)
    )
    close(trained(made)["loss"], -logsigmoid(chosen - rejected).mean())


# Rewards --------------------------------------------------------------------------------------------------------------


class Rewards:
    """A reward that is different for each answer to a prompt, and what was answered in the first step."""

    __name__ = "rewards"

    def __init__(self):
        self.prompts, self.answers = [], []

    def __call__(self, prompts, completion_ids, **kwargs):
        if not self.answers:
            self.prompts = [[int(word[1:]) + 3 for word in prompt.split()] for prompt in prompts]
            self.answers = completion_ids
        return [float(i % 3 == 0) for i in range(len(prompts))]

    def scores(self, logits):
        return [log_probs(logits, p, a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def check_sampled_from(self, logits, top_k):
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            best = logits([*prompt, *answer]).topk(top_k).indices[len(prompt) - 1 : -1]
            assert (best == torch.tensor(answer)[:, None]).any(dim=1).all()


def grpo(scores, base):
    """The KL is that of arXiv 2512.02556, with the ratio of new to old in front; the loss is a mean over all tokens."""
    ratios = [b - s for s, b in zip(scores, base, strict=True)]
    ones = [(s - s.detach()).exp() for s in scores]
    kl = torch.cat([one * (r.exp() - r - 1) for one, r in zip(ones, ratios, strict=True)])
    rewards = torch.tensor([1.0, 0, 0]).repeat(2)
    advantages = (rewards - 1 / 3) / (rewards[:3].std() + 1e-4)
    gains = torch.cat([a * one for a, one in zip(advantages, ones, strict=True)])
    return kl.mean(), (BETA * kl - gains).mean()


def rloo(scores, base):
    """The KL is a part of the reward, and the baseline the mean of the others' rewards (arXiv 2402.14740)."""
    kl = [(s - b).detach() for s, b in zip(scores, base, strict=True)]
    rewards = torch.tensor([1.0, 0, 0]).repeat(2) - BETA * torch.stack([k.sum() for k in kl])
    groups = rewards.view(2, 3)
    advantages = (groups - (groups.sum(dim=1, keepdim=True) - groups) / 2).flatten()
    ratios = torch.stack([(s - s.detach()).sum().exp() for s in scores])
    return torch.cat(kl).mean(), -(advantages * ratios).mean()


ONLINE = {"GRPO": grpo, "RLOO": rloo}
QUESTIONS = [{"prompt": words(p)} for p in PROMPTS]
SAMPLING = dict(beta=BETA, num_generations=3, max_completion_length=5, top_k=2)


@row(
    "GRPO, RLOO", "`peft_config`", "answers are sampled with attentions skipped; with `beta` > 0, the reference has all"
)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("name", ONLINE)
def test_online(tmp_path, name, propagation):
    rewards = Rewards()
    made = make(name, tmp_path, QUESTIONS, config(propagation), rewards=rewards, **SAMPLING)
    policy = ByHand(made.model)
    logs = trained(made)
    rewards.check_sampled_from(policy, top_k=2)
    kl, loss = ONLINE[name](rewards.scores(policy), rewards.scores(stock))
    close(logs["kl"], kl)
    agrees(logs, policy, loss)


# References -----------------------------------------------------------------------------------------------------------


def sft_trained(propagation):
    """An adapter that was trained before."""
    model = get_peft_model(tiny.model("llama"), config(propagation))
    tiny.shake(model)
    return model


def retrain(name, path, model, **kwargs):
    """A trainer whose first step shows how far the model is from its reference."""
    if name in ONLINE:
        return make(name, path, QUESTIONS, model=model, rewards=Rewards(), **SAMPLING, **kwargs)
    return make(name, path, PREFERENCE[name][0], model=model, beta=BETA, **kwargs)


def is_its_reference(name, logs):
    logged, value = {"DPO": ("loss", math.log(2)), "KTO": ("loss", 0.5)}.get(name, ("kl", 0))
    return logs[logged] == pytest.approx(value, abs=1e-5)


@row("DPO, KTO", "`ref_model=` a merged copy", "the reference is the model that training starts from")
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", PREFERENCE)
def test_a_merged_copy_is_the_reference(tmp_path, name, precompute, propagation):
    model = sft_trained(propagation)
    start = ByHand(model)
    merged = copy.deepcopy(model).merge_and_unload()
    made = retrain(name, tmp_path, model, ref_model=merged, precompute_ref_log_probs=precompute)
    assert is_its_reference(name, trained(made))
    # which stays what it was
    close(made.evaluate()["eval_loss"], PREFERENCE[name][1](ByHand(model), start))


@row("DPO, KTO, GRPO, RLOO", "a trained adapter", "the reference is TRL's copy of it")
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("name", [*PREFERENCE, *ONLINE])
def test_trl_s_copy_of_an_adapter_is_the_reference(tmp_path, name, propagation):
    made = retrain(name, tmp_path, sft_trained(propagation))
    expected = copy.deepcopy(get_peft_model_state_dict(made.model, adapter_name="default"))
    assert is_its_reference(name, trained(made))
    kept = get_peft_model_state_dict(made.model, adapter_name="ref")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


@row("DPO, KTO, GRPO, RLOO", "a merged model and LoRA", "the reference is the merged model")
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("name", [*PREFERENCE, *ONLINE])
def test_lora_on_a_merged_model(tmp_path, name, propagation):
    merged = sft_trained(propagation).merge_and_unload()
    made = retrain(name, tmp_path, merged, peft_config=LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert is_its_reference(name, trained(made))


# Callbacks ------------------------------------------------------------------------------------------------------------

SEQUENCES = {
    "SFT": [text for _, text in WHOLE],
    "DPO": [[*p, *a, EOS] for answers in (ANSWERS, OTHERS) for p, a in zip(PROMPTS, answers, strict=True)],
    # with answers of other rows, too, by which it estimates its KL
    "KTO": [[*p, *a, EOS] for answers in (ANSWERS, MOVED) for p, a in zip(PROMPTS, answers, strict=True)],
}
SEQUENCES["Reward"] = SEQUENCES["DPO"]
ROWS = {"SFT": TEXTS, "DPO": PREFERENCES, "KTO": LABELLED, "Reward": REWARDED, "GRPO": QUESTIONS, "RLOO": QUESTIONS}


def with_callback(name, path, **settings):
    """A trainer that learns nothing, with an `EASCallback` of its own evaluation examples."""
    model, task_type = (reward_model(), "SEQ_CLS") if name == "Reward" else (None, "CAUSAL_LM")
    online = dict(rewards=Rewards(), **SAMPLING) if name in ONLINE else {}
    made = make(name, path, ROWS[name], EASConfig(**settings, task_type=task_type), model, learning_rate=0.0, **online)
    made.add_callback(EASCallback(made.eval_dataset))
    for stand_in in made.model.base_model.stand_ins("default").values():
        stand_in.constant.data.zero_()  # as they are without `tiny.shake`
    return made


@row("SFT, DPO, KTO, Reward", "`EASCallback`, `skip_layers` given", "measures the stand-ins")
@pytest.mark.parametrize("name", SEQUENCES)
def test_stand_ins_are_measured(tmp_path, name):
    """What the base model's attentions give to tokens other than the first of a sequence, on average."""
    made = with_callback(name, tmp_path, skip_layers=SKIPPED, stand_in="mean")
    made.train()
    base, outputs = tiny.model("llama"), {index: [] for index in SKIPPED}
    for index, seen in outputs.items():
        base.model.layers[index].self_attn.register_forward_hook(
            lambda *args, seen=seen: seen.append(args[2][0][0, 1:])
        )
    for ids in SEQUENCES[name]:
        base(torch.tensor([ids]))
    expected = {index: torch.cat(seen).mean(dim=0) for index, seen in outputs.items()}
    found = {index: stand_in.constant.data for index, stand_in in made.model.base_model.stand_ins("default").items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


row("SFT, DPO, KTO, Reward", "`EASCallback`, a search", "by the trainer's own loss")  # tests/test_search_trl.py


row("GRPO, RLOO", "`EASCallback`, a search", "refused: there is no loss of held-out prompts", works="no")


@row("GRPO, RLOO", "`EASCallback`, `skip_layers` given", "refused: `initialize_eas_weights` before", works="no")
@pytest.mark.parametrize("name", ONLINE)
def test_stand_ins_are_not_measured_with_prompts_alone(tmp_path, name):
    made = with_callback(name, tmp_path, skip_layers=SKIPPED)
    with pytest.raises(ValueError, match="initialize_eas_weights"):
        made.train()
    texts = [text["text"] for text in TEXTS]
    initialize_eas_weights(made.model, [tokenizer()(texts, padding=True, return_tensors="pt")])
    made.train()


def test_the_table_is_that_of_these_tests():
    assert "\n".join(TABLE) in DOCS.read_text(encoding="utf-8")
