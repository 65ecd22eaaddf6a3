"""EleutherAI's lm_eval: its numbers for EAS models are those of prefill and decoding by hand."""

import json
import sys

import pytest
import torch
from peft import get_peft_model
from zoo import tiny

from peft_eas import EASConfig

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

PROPAGATIONS = ("none", "mean")
STATES = ["unmerged", "merged"]


def words(ids):
    return " ".join(f"w{i - 3}" for i in ids)


def draw(generator, low, high):
    length = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(3, 93, (length,), generator=generator).tolist()


def questions(rows=14):
    """Prompts of different lengths, each with two continuations of different lengths, and which is right."""
    generator = torch.Generator().manual_seed(4)
    drawn = [(draw(generator, 2, 9), [draw(generator, 1, 6) for _ in range(2)]) for _ in range(rows)]
    return [(prompt, answers, i % 2) for i, (prompt, answers) in enumerate(drawn)]


def adapted(propagation, state):
    base = tiny.model("llama", changes={"vocab_size": 93, "eos_token_id": 2})  # every token has a word
    model = get_peft_model(base, EASConfig(skip_layers=[0, 3], propagation=propagation)).eval()
    tiny.shake(model)
    return model.merge_and_unload() if state == "merged" else model


@torch.no_grad()
def decoded(model, prompt, answer):
    """Log-likelihood of an answer, one token at a time on the cache of the prompt; and whether it is the greedy one."""
    output = model(input_ids=torch.tensor([prompt]), use_cache=True)
    total, is_greedy = 0.0, True
    for token in answer:
        scores = output.logits[0, -1].log_softmax(-1)
        total += scores[token].item()
        is_greedy &= scores.argmax().item() == token
        output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return total, is_greedy


def greedy(model, prompt, length):
    made = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("state", STATES)
def test_log_likelihoods_are_those_of_decoding(state, propagation):
    model = adapted(propagation, state)
    pairs = [(prompt, answer) for prompt, answers, _ in questions() for answer in answers]
    made = [(prompt, greedy(model, prompt, 3)) for prompt, *_ in questions()]
    written = [(prompt, answer) for prompt, answer in made if min(answer) >= 3]  # in words, no special tokens
    assert written
    pairs += written
    requests = [
        Instance("loglikelihood", doc={}, arguments=(words(prompt), " " + words(answer)), idx=i)
        for i, (prompt, answer) in enumerate(pairs)
    ]
    found = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=8).loglikelihood(requests)
    expected = [decoded(model, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks: choosing an answer, and writing one."""
    rows = [
        {"question": words(prompt), "answers": [words(a) for a in answers], "right": right}
        for prompt, answers, right in questions()
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{question}}",
    }  # fmt: skip
    choice = common | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{answers}}", "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    writing = common | {
        "task": "write", "output_type": "generate_until", "doc_to_target": "{{answers[right]}}",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choice, writing):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def evaluated(model, tasks, batch_size):
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=batch_size), tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    by_row = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}
    chosen = torch.tensor([[float(answer[0]) for answer in row["filtered_resps"]] for row in by_row["choose"]])
    return results["results"]["choose"]["acc,none"], chosen, [row["resps"][0][0] for row in by_row["write"]]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("state", STATES)
def test_batch_sizes_change_nothing(tasks, state, propagation):
    model = adapted(propagation, state)
    accuracy, chosen, written = evaluated(model, tasks, batch_size=1)
    expected = torch.tensor([[decoded(model, prompt, a)[0] for a in answers] for prompt, answers, _ in questions()])
    torch.testing.assert_close(chosen, expected, rtol=0, atol=1e-4)
    hits = expected.argmax(dim=1) == torch.tensor([right for *_, right in questions()])
    assert 0 < hits.sum() < len(hits)
    assert accuracy == pytest.approx(hits.float().mean().item())
    answers = [tiny.tokenizer().decode(greedy(model, p, 5), skip_special_tokens=True) for p, *_ in questions()]
    assert written == [answer.split("w5")[0] for answer in answers]
    accuracy_in_batches, chosen_in_batches, written_in_batches = evaluated(model, tasks, batch_size=8)
    assert (accuracy_in_batches, written_in_batches) == (accuracy, written)
    torch.testing.assert_close(chosen_in_batches, chosen, rtol=0, atol=1e-4)


def test_the_command_of_the_docs(tasks, tmp_path, monkeypatch):
    model = adapted(PROPAGATIONS[-1], "merged")
    model.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    command = [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'merged'},trust_remote_code=True",
        "--tasks", "choose", "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["choose"]
    assert results["acc,none"] == pytest.approx(evaluated(model, tasks, batch_size=1)[0])
