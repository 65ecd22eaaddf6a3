"""Damage that files of merged models may take: changed records, flipped bits, saves that are killed half-way."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

OTHERS = [
    None, True, False, 0, 1, -1, 7, 10**7, 10**30, 1.5, "", "x", "../x", "a" * 10**6, [], {}, [None], ["x"], [-1], [0],
    [0, 0], [[]], {"x": 1}, {"x": None},
]  # fmt: skip
"""What a field of a record may be instead of what it is."""


def changes(record: dict[str, Any]) -> list[tuple[str, Callable[[dict], None]]]:
    """Single changes to a record: each field, at every depth, is taken away, doubled or made something else.

    Returns:
        What each does, and a function that does it to a record like this one.
    """
    made: list[tuple[str, Callable[[dict], None]]] = [
        ("eas.unknown = 1", lambda eas: eas.update(unknown=1)),
        ("eas.attentions = a million of them", lambda eas: eas.update(attentions=eas["attentions"] * 10**6)),
    ]
    for path, value in _paths(record):
        if path == ("checksum",):
            continue
        name = "eas" + "".join(f"[{part!r}]" for part in path)
        made.append((f"del {name}", lambda eas, path=path: _parent(eas, path).__delitem__(path[-1])))
        for other in OTHERS:
            if type(other) is not type(value) or other != value:
                change = lambda eas, path=path, other=other: _parent(eas, path).__setitem__(path[-1], other)  # noqa: E731
                made.append((f"{name} = {str(other)[:20]}", change))
        if isinstance(value, list) and value:
            longer = value * 1000
            made.append(
                (f"{name} * 1000", lambda eas, path=path, new=longer: _parent(eas, path).__setitem__(path[-1], new))
            )
    return made


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key), each
        yield from _paths(each, (*path, key))


def _parent(record: Any, path: tuple) -> Any:
    for part in path[:-1]:
        record = record[part]
    return record


def edit(folder: Path, change: Callable[[dict], object], is_signed: bool = True) -> None:
    """Change `eas` in the `config.json` of a folder; if `is_signed`, its checksum, too, as the one who did it would."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["eas"])
    if is_signed:
        sign(config["eas"])
    path.write_text(json.dumps(config))


def sign(eas: dict) -> None:
    """Give a changed record the checksum that it should have."""
    content = json.dumps({key: value for key, value in eas.items() if key != "checksum"}, sort_keys=True)
    eas["checksum"] = hashlib.sha256(content.encode()).hexdigest()[:16]


def outcome(
    folder: Path, change: Callable[[dict], object], is_signed: bool, inputs: dict, expected: torch.Tensor
) -> str:
    """What becomes of a causal model in a folder, with the logits `expected`, whose record is changed; it is as it was
    afterwards. Whoever signs a change to how attentions are called gets another model, or one that can't be run."""
    path = folder / "config.json"
    whole = path.read_text()
    try:
        edit(folder, change, is_signed)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return "refused" if "config.json" in str(error) or "`config.eas`" in str(error) else f"ValueError: {error}"
    except RuntimeError as error:  # transformers' own
        return "refused" if "mismatch" in str(error).lower() else f"RuntimeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_text(whole)
    try:
        logits = loaded(**inputs).logits
    except Exception as error:
        return "another model, signed" if is_signed else f"in the first forward, {type(error).__name__}: {error}"
    if torch.equal(logits, expected):
        return "same"
    return "another model, signed" if is_signed else "another model"


def flip_bits(file: Path, count: int, seed: int = 0) -> Iterator[int]:
    """Flip one bit of the file at a time, anywhere, and back; yields where it is."""
    rng, size = random.Random(seed), file.stat().st_size
    for _ in range(count):
        place, bit = rng.randrange(size), 1 << rng.randrange(8)
        _flip(file, place, bit)
        yield place
        _flip(file, place, bit)


def _flip(file: Path, place: int, bit: int) -> None:
    with open(file, "r+b") as content:
        content.seek(place)
        (value,) = content.read(1)
        content.seek(place)
        content.write(bytes([value ^ bit]))


WRITES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"}


def killed_saves(save: Callable[[Path], object], old: Path, folder: Path) -> Iterator[int]:
    """Save over a copy of `old`, and kill the process before its first change of a file; then before the second; and so
    on. Yields how many changes were made, with what is left in `folder`; ends with a save that was not killed."""
    for made in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        child = os.fork()
        if child == 0:
            _save_and_die(save, folder, made)
        _, status = os.waitpid(child, 0)
        yield made
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the save failed"
            return


def _save_and_die(save: Callable[[Path], object], folder: Path, after: int) -> None:
    count = 0

    def changed(event: str, args: tuple) -> None:
        nonlocal count
        writes = event == "open" and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (event in WRITES or writes) or not str(args[0]).startswith(str(folder)):
            return
        if count == after:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    code = 1
    try:
        sys.addaudithook(changed)
        save(folder)
        code = 0
    finally:
        os._exit(code)
