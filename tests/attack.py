"""Try to break the package, as an attacker and an unlucky user would, and write what was seen to docs/robustness.md.

    python tests/attack.py [--quick]

The tests do the same with smaller numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import attacks
import damage
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import tiny
from zoo.tiny import adapted

DOCS = Path(__file__).resolve().parent.parent / "docs" / "robustness.md"
KNOWN = {
    "same": "the same model",
    "works": "works",
    "refused": "refused, with a reason",
    "old": "the old model",
    "new": "the new model",
    "another model, signed": "another model, by somebody who made its checksum, too",
    "found": "found",
}
"""Outcomes that may be; all others are printed, and fail."""


def configurations(scale: float) -> Counter[str]:
    """Random settings of `EASConfig`, with wrong ones among them; what is allowed gives a tiny model finite logits and
    something to train, and can be saved"""
    seen: Counter[str] = Counter()
    for name, count in attacks.configurations(int(2000 * scale), int(2000 * scale)).items():
        seen[name.removeprefix("config ").removeprefix("model ")] += count
    return seen


def calls(scale: float) -> Counter[str]:
    """Each public function with each wrong value in each place"""
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        return attacks.outcomes(attacks.wrong_calls(Path(folder)))


def data_files(scale: float) -> Counter[str]:
    """`peft-eas score` and `train` with data files that are empty, binary, of other encodings, mixed, cut, huge; and
    with wrong arguments"""
    with _base() as folder, _inside(folder):
        return attacks.outcomes(attacks.wrong_data(folder / "data", folder / "base"))


def adapter_files(scale: float) -> Counter[str]:
    """`peft-eas inspect` of an adapter whose `adapter_config.json` has one value changed, or is damaged"""
    with _base() as folder:
        adapted().save_pretrained(folder / "adapter")
        changed = attacks.changed_folders(
            folder, folder / "adapter", "adapter_config.json", lambda f: ["inspect", f], count=int(300 * scale)
        )
        return attacks.outcomes(changed)


def adapter_weights(scale: float) -> Counter[str]:
    """An adapter's file without one of its tensors, gates included, or with gates alone, or with none"""
    seen: Counter[str] = Counter()
    inputs = tiny.inputs("llama")
    for settings in ({}, {"propagation": "mean"}, {"use_bias": False}, {"stand_in": "zero"}):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = adapted(**settings)
            model.save_pretrained(folder)
            file = folder / "adapter_model.safetensors"
            whole = load_file(file)
            gates = {key for key in whole if key.endswith("eas_skip")}
            for gone in [*({key} for key in whole), gates, whole.keys() - gates, {*list(gates)[:2]}]:
                save_file({key: value for key, value in whole.items() if key not in gone}, file, {"format": "pt"})
                seen[_loaded(folder, model, inputs)] += 1
            for gate in gates:
                save_file(whole | {gate: ~whole[gate]}, file, {"format": "pt"})
                seen[_loaded(folder, model, inputs)] += 1
    return seen


def _loaded(folder: Path, model: PeftModel, inputs: dict) -> str:
    try:
        loaded = PeftModel.from_pretrained(tiny.model("llama"), folder).eval()
    except ValueError:
        return "refused"
    return "same" if torch.equal(loaded(**inputs).logits, model(**inputs).logits) else "another model"


def truncations(scale: float) -> Counter[str]:
    """A file of weights of an adapter or a merged model, cut off anywhere"""
    seen: Counter[str] = Counter()
    model = adapted()
    with tempfile.TemporaryDirectory() as name:
        folder, drawn = Path(name), random.Random(0)
        model.save_pretrained(folder / "adapter")
        model.merge_and_unload().save_pretrained(folder / "merged")
        loads: dict[Path, Callable[[], object]] = {
            folder / "adapter/adapter_model.safetensors": lambda: PeftModel.from_pretrained(
                tiny.model("llama"), folder / "adapter"
            ),
            folder / "merged/model.safetensors": lambda: AutoModelForCausalLM.from_pretrained(folder / "merged"),
        }
        for file, load in loads.items():
            whole = file.read_bytes()
            for _ in range(int(100 * scale)):
                file.write_bytes(whole[: drawn.randrange(len(whole))])
                try:
                    load()
                    seen["loads"] += 1
                except OSError as error:
                    seen["refused" if "truncated" in str(error) else str(error)] += 1
            file.write_bytes(whole)
    return seen


def records(scale: float) -> Counter[str]:
    """A merged model whose record in `config.json` has one field taken away or made something else; without and with
    the checksum that the change would have"""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged = adapted(propagation="mean").merge_and_unload()
        merged.save_pretrained(folder)
        changes, inputs = damage.changes(merged.config.eas), tiny.inputs("llama")
        expected = merged(**inputs).logits
        for _, change in random.Random(0).sample(changes, int(len(changes) * scale)):
            for is_signed in (False, True):
                seen[damage.outcome(folder, change, is_signed, inputs, expected)] += 1
    return seen


def bits(scale: float) -> Counter[str]:
    """One bit of a merged model's weights flipped, anywhere; `from_pretrained(..., verify=True)`"""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapted().merge_and_unload().save_pretrained(folder)
        for _ in damage.flip_bits(folder / "model.safetensors", int(500 * scale)):
            try:
                AutoModelForCausalLM.from_pretrained(folder, verify=True)
                seen["not found"] += 1
            except ValueError:
                seen["found"] += 1
    return seen


def kills(scale: float) -> Counter[str]:
    """A save over another merged model, whole or in shards, killed (-9) before each of its changes of a file"""
    seen: Counter[str] = Counter()
    inputs = tiny.inputs("llama")
    models = {"old": adapted(skip_layers=[1]).merge_and_unload(), "new": adapted().merge_and_unload()}
    logits = {name: model(**inputs).logits for name, model in models.items()}
    for before, after in (("50GB", "50GB"), ("50GB", "40KB"), ("40KB", "50GB"), ("40KB", "60KB"))[: int(4 * scale)]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models["old"].save_pretrained(folder / "old", max_shard_size=before)
            save = lambda to, after=after: models["new"].save_pretrained(to, max_shard_size=after)  # noqa: E731
            for _ in damage.killed_saves(save, folder / "old", folder / "there"):
                loaded = AutoModelForCausalLM.from_pretrained(folder / "there", verify=True)(**inputs).logits
                seen[next((name for name in models if torch.equal(loaded, logits[name])), "a mixture")] += 1
    return seen


@contextlib.contextmanager
def _inside(folder: str | Path) -> Iterator[None]:
    """Work in a folder: some of what is tried turns out to be a name that a folder may have."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.model("llama").save_pretrained(folder / "base")
        tiny.tokenizer().save_pretrained(folder / "base")
        yield folder


ATTACKS = (
    configurations, calls, data_files, adapter_files, adapter_weights, truncations, records, bits, kills,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of it; writes nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, wrong = [], False
    for attack in ATTACKS:
        start = time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            seen = attack(0.05 if args.quick and attack is not kills else 0.25 if args.quick else 1)
        unknown = {name: count for name, count in seen.items() if name not in KNOWN}
        wrong = wrong or bool(unknown)
        outcomes = ", ".join(f"{count:,} {KNOWN.get(name, f'**{name[:80]}**')}" for name, count in seen.most_common())
        rows.append(f"| {' '.join(attack.__doc__.split())} | {seen.total():,} | {outcomes} |")
        print(f"{time.monotonic() - start:4.0f} s {rows[-1]}", flush=True)
        for name, count in unknown.items():
            print(f"       {count} x {name}", flush=True)
    if not args.quick:
        DOCS.write_text(
            f"{TEXT}\n| what was tried | times | what was seen |\n|---|---:|---|\n" + "\n".join(rows) + "\n"
        )
    if wrong:
        raise SystemExit("error: some outcomes are none that may be")


TEXT = """\
# What was tried to break it

`make attack` remakes this table, from fixed seeds; parts of it run with `make test`. "Refused" is an error that says
what was wrong, before anything was changed. What else the tests do: data loaders, losses and forwards that fail at
every moment of a search; a disk that is full at every write of adapters, cards, reports and pictures; generations in
threads beside a training; a hundred adapters added and deleted; trainings and searches that are killed and resumed.

What is not looked for: damage inside of tensors, unless asked (`verify=True`, see [Hub](hub.md)); a change to a record
by somebody who makes the checksum that it should have, which is another model then, if it fits the weights; sizes in
the rest of `config.json`, which is transformers'.
"""


if __name__ == "__main__":
    sys.exit(main())
