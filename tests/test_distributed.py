"""The search in two processes, against one process with batches of twice the size.

They are started by `accelerate launch`. Those of ZeRO-3 need DeepSpeed, and are skipped without it: `DS_BUILD_OPS=0 pip
install deepspeed setuptools wheel --no-build-isolation`, and a C++ compiler, once.
"""

import functools
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_search
import distributed_skip
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from transformers import AutoModelForCausalLM
from zoo import tiny

from peft_eas.search import held_out
from peft_eas.search.trainer import check_shards

FILES = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
KINDS = {
    "ddp": [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
    "fsdp2": ["--config_file", str(FILES / "fsdp2.yaml")],
    "zero3": ["--config_file", str(FILES / "zero3.yaml")],
}
"""How `accelerate launch` is to start two processes."""
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
DEVIATION = {"warm_start": "deviation"}
ADAM = {"exchange": True, "weight_decay": 0.1}
SGD = {"momentum": 0.9}
LAUNCHES = {
    "ddp": {
        "ddp": {},
        "ddp, nothing unused": {"ddp_find_unused_parameters": False},
        "ddp, checkpointing": {"gradient_checkpointing": True},
        # which DDP itself does not allow together with find_unused_parameters=True
        "ddp, reentrant checkpointing": {**REENTRANT, "ddp_find_unused_parameters": False},
        "ddp, exchange": ADAM,
    },
    "fsdp2": {"fsdp2": {}, "fsdp2, deviation": DEVIATION, "fsdp2, exchange": ADAM},
    # Adam counts steps of all parameters alike there, and so moves those faster that join after the warm-up, or later
    "zero3": {
        "zero3": SGD,
        "zero3, early": {"early": True, **SGD},
        "zero3, deviation": DEVIATION | SGD,
        "zero3, exchange": {"exchange": True, **SGD},
    },
}
"""Trainings that the same two processes do one after another: to start processes takes longer than to train."""
VARIANTS = [name for runs in LAUNCHES.values() for name in runs]
RESUMES = not torch.__version__.startswith("2.6.")  # it can't load an optimizer's state onto cpu:0


def launch(kind: str, out: Path, runs: dict[str, dict], timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *KINDS[kind], "--main_process_port", "0"]
    if kind == "zero3":  # DeepSpeed looks for accelerators by itself
        runs = {name: options | {"use_cpu": False} for name, options in runs.items()}
    return subprocess.run(
        [*command, distributed_search.__file__, str(out), json.dumps(runs)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        text=True, capture_output=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(name)` is the folder of that training; one of the name `"resumed"` goes on from another's checkpoint."""

    @functools.cache
    def launched(kind: str) -> tuple[Path, subprocess.CompletedProcess]:
        out = tmp_path_factory.mktemp(kind)
        runs = LAUNCHES[kind]
        if RESUMES:
            runs = runs | {"resumed": runs[kind] | {"resume": str(out / kind / "checkpoint-8")}}
        return out, launch(kind, out, runs)

    def found(name: str, training: str | None = None) -> Path:
        kind = name.split(",")[0]
        if kind == "fsdp2" and not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
            pytest.skip("this version of accelerate has no FSDP2")
        if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        out, done = launched(kind)
        assert done.returncode == 0, done.stderr[-3000:]
        return out / (training or name)

    return found


def learning(name: str) -> str:
    """Those of a training's options that one process learns by, too."""
    options = LAUNCHES[name.split(",")[0]][name]
    return json.dumps(
        {key: options[key] for key in ("exchange", "momentum", "weight_decay", "warm_start") if key in options}
    )


def ranks(out: Path) -> list[dict]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The report, the losses and the logits of a training in one process, by its options."""

    def trained(options: str) -> dict:
        made, search = distributed_search.train(tmp_path_factory.mktemp("alone"), 6, json.loads(options))
        return {
            "report": search.report,
            "losses": distributed_search.losses(made),
            "logits": distributed_search.logits(made.model),
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "PARTS", 8)  # four batches of one example in each of two processes
        yield functools.cache(trained)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "exchange" not in name])
def test_two_processes_search_as_one(name, alone, trained):
    report, expected = ranks(trained(name))[0]["report"], alone(learning(name))["report"]
    # the mean of two means over tokens, which are not as many
    assert report["scores"] == pytest.approx(expected["scores"], rel=0.02)
    assert report["start"] == expected["start"]
    assert [entry["step"] for entry in report["rounds"]] == [4, 6, 8, 10]
    assert [entry["step"] for entry in expected["rounds"]] == [4, 6, 8, 10]
    assert report["rounds"][0]["tried"] == expected["rounds"][0]["tried"]
    for found, of_one in zip(report["rounds"], expected["rounds"], strict=True):
        assert len(found["losses"]) == 4
        # the mean of means over tokens, which are not as many
        if found["skip_layers"] == of_one["skip_layers"]:
            assert statistics.fmean(found["losses"]) == pytest.approx(statistics.fmean(of_one["losses"]), rel=0.02)
    for found, of_one in zip(report["rounds"][0]["costs"], expected["rounds"][0]["costs"], strict=True):
        assert statistics.fmean(found) == pytest.approx(statistics.fmean(of_one), abs=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_learn_what_one_learns(name, alone, trained):
    first, second = ranks(trained(name))
    expected = alone(learning(name))
    assert first["report"] == second["report"]
    assert first["skip_layers"] == second["skip_layers"] == expected["report"]["skip_layers"]
    exchanges = [entry["exchanged"] for entry in first["report"]["rounds"]]
    assert exchanges == [entry["exchanged"] for entry in expected["report"]["rounds"]]
    assert any(exchanges) == ("exchange" in name)
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert first["logits"] == second["logits"]
    logits = torch.tensor(first["logits"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert first["sharded"] == ("ddp" not in name) == ("shared out among processes" in first["merging"])
    # what was saved in the end, in a process that has never seen the others
    saved = PeftModel.from_pretrained(tiny.model("llama"), str(trained(name) / "final")).eval()
    assert saved.skip_layers == first["skip_layers"]
    torch.testing.assert_close(distributed_search.logits(saved), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(distributed_search.logits(saved.merge_and_unload()), logits, atol=1e-4, rtol=0)


@pytest.mark.skipif(not RESUMES, reason="this version of torch can't load an optimizer's state onto cpu:0")
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_resumed_search_is_the_same_in_all_processes(name, trained):
    whole, resumed = ranks(trained(name)), ranks(trained(name, "resumed"))
    assert [rank["report"] for rank in resumed] == [rank["report"] for rank in whole]
    assert [rank["logits"] for rank in resumed] == [rank["logits"] for rank in whole]


def test_a_process_that_fails_ends_the_others(tmp_path):
    done = launch("ddp", tmp_path, {"failing": {"fail": True}}, timeout=120)
    assert done.returncode != 0
    assert "this process has had enough" in done.stderr


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, "take stage 3"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)}, "take version 2"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)}, "set it to false"),
    ],
)
def test_what_would_go_wrong_is_refused(plugin, said):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(**plugin)))
    with pytest.raises(ValueError, match=said):
        check_shards(trainer)


def test_processes_that_accelerate_does_not_know_of_choose_and_measure_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}  # as torchrun tells
    command, log = [sys.executable, distributed_skip.__file__, str(tmp_path)], tmp_path / "log"
    with open(log, "w") as out:
        processes = [
            subprocess.Popen(
                command, env=os.environ | told | {"RANK": rank, "LOCAL_RANK": rank}, stdout=out, stderr=out
            )
            for rank in "01"
        ]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:  # one that waits for another that failed
                process.kill()
    assert codes == [0, 0], log.read_text()[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = distributed_skip.stripped(range(4)).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(saved, first, rtol=0, atol=0)
    torch.testing.assert_close(first, alone)
