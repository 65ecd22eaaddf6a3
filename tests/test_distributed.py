"""The search in two processes, against one process with batches of twice the size."""

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import distributed_search
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from zoo import tiny
from zoo.training import collate, dataset

from peft_eas.search import held_out

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
LAUNCHES = {
    "ddp": {
        "ddp": {},
        "ddp, nothing unused": {"ddp_find_unused_parameters": False},
        "ddp, checkpointing": {"gradient_checkpointing": True},
        # which DDP itself does not allow together with find_unused_parameters=True
        "ddp, reentrant checkpointing": {**REENTRANT, "ddp_find_unused_parameters": False},
    },
    "fsdp2": {"fsdp2": FSDP2},
}
"""Trainings that the same two processes do one after another: to start processes takes longer than to train."""
VARIANTS = [name for runs in LAUNCHES.values() for name in runs]
RESUMES = not torch.__version__.startswith("2.6.")  # it can't load an optimizer's state onto cpu:0


def launch(out: Path, runs: dict[str, dict], timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, distributed_search.__file__, str(out), json.dumps(runs)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(name)` is the folder of that training; one of the name `"resumed"` goes on from another's checkpoint."""

    @functools.cache
    def launched(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind)
        runs = LAUNCHES[kind]
        if RESUMES:
            runs = runs | {"resumed": runs[kind] | {"resume": str(out / kind / "checkpoint-8")}}
        done = launch(out, runs)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    def found(name: str, training: str | None = None) -> Path:
        if name == "fsdp2" and not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
            pytest.skip("this version of accelerate has no FSDP2")
        return launched(name.split(",")[0]) / (training or name)

    return found


def ranks(out: Path) -> list[dict]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "PARTS", 8)  # four batches of one example in each of two processes
        return distributed_search.train(tmp_path_factory.mktemp("alone"), 6, {})[1].report


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_search_as_one(name, alone, trained):
    first, second = ranks(trained(name))
    assert first["report"] == second["report"]
    assert first["skip_layers"] == second["skip_layers"] == alone["skip_layers"]
    assert first["sharded"] == (name == "fsdp2")
    report = first["report"]
    # the mean of two means over tokens, which are not as many
    assert report["scores"] == pytest.approx(alone["scores"], rel=0.02)
    assert report["start"] == alone["start"]
    assert (
        [entry["step"] for entry in report["rounds"]] == [entry["step"] for entry in alone["rounds"]] == [4, 6, 8, 10]
    )
    assert report["rounds"][0]["tried"] == alone["rounds"][0]["tried"]
    for found, expected in zip(report["rounds"], alone["rounds"], strict=True):
        assert len(found["losses"]) == 4
        # the mean of means over tokens, which are not as many
        if found["skip_layers"] == expected["skip_layers"]:
            assert statistics.fmean(found["losses"]) == pytest.approx(statistics.fmean(expected["losses"]), rel=0.02)
    for found, expected in zip(report["rounds"][0]["costs"], alone["rounds"][0]["costs"], strict=True):
        assert statistics.fmean(found) == pytest.approx(statistics.fmean(expected), abs=0.03)
    # what was saved in the end is what was evaluated
    saved = PeftModel.from_pretrained(tiny.model("llama"), str(trained(name) / "final")).eval()
    assert saved.skip_layers == first["skip_layers"]
    with torch.no_grad():
        loss = saved(**collate(list(dataset(8)))).loss.item()
    assert loss == pytest.approx(first["eval_loss"], rel=1e-3)


@pytest.mark.skipif(not RESUMES, reason="this version of torch can't load an optimizer's state onto cpu:0")
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_resumed_search_is_the_same_in_all_processes(name, trained):
    whole, resumed = ranks(trained(name)), ranks(trained(name, "resumed"))
    assert [rank["report"] for rank in resumed] == [rank["report"] for rank in whole]
    assert [rank["eval_loss"] for rank in resumed] == [rank["eval_loss"] for rank in whole]


def test_a_process_that_fails_ends_the_others(tmp_path):
    done = launch(tmp_path, {"failing": {"fail": True}}, timeout=120)
    assert done.returncode != 0
    assert "this process has had enough" in done.stderr
