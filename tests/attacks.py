"""What is tried to break things with: values, files and moments that are wrong; the tests use small numbers of them."""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import get_peft_model, peft_model
from zoo import tiny

from peft_eas import (
    Attentions,
    EASCallback,
    EASConfig,
    Family,
    cli,
    export,
    initialize_eas_weights,
    register_family,
    score_attentions,
)
from peft_eas.checks import shown


class Unprintable:
    """Something that fails when an error would repeat it."""

    def __repr__(self):
        raise RuntimeError("no")


def wrong_values() -> list[Any]:
    """Values of every kind; wrong nearly everywhere."""
    return [
        None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 10**5000, -(10**400), 0.5, 1.0, 1e300, -1e300, 5e-324,
        float("nan"), float("inf"), 1j, "", "auto", "none", "mean", "\x00", "\x1b[2J\n", "(", "x" * 10**6, b"r",
        [], [0], [-1], [0, 0], [2**63], [[0]], [None], [True], ["self_attn"], ["("], [""], {}, {0: 1}, {"r": 1}, set(),
        {0, 1}, (1,), range(3), range(10**9), itertools.count(), object(), int, Unprintable(),
        np.int64(1), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("mean"), np.datetime64("nat"),
        np.array(1), np.array(0.5), np.array(None), np.array("none"), np.array([0, 1]), np.zeros((2, 2)), np.array([]),
        torch.tensor(1), torch.tensor(0.5), torch.tensor(True), torch.tensor([0, 1]), torch.zeros(2, 2),
        torch.zeros((), device="meta"), torch.zeros(2, device="meta"), torch.tensor(float("nan")),
    ]  # fmt: skip


def likely_values() -> dict[str, list[Any]]:
    """For each setting of `EASConfig`, values that are allowed, or nearly."""
    modules = [None, ["self_attn", "mlp"], ["mlp"], ["self_attn"], "mlp", r".*\.(self_attn|mlp)", r"[", "all-linear"]
    return {
        "r": [1, 4, 16, 32, 33, 10**7, np.int32(8), torch.tensor(4)],
        "r_pia": [2, 3, 8, 32, 64, 10**7, np.int64(6), np.array(8)],
        "num_skip": [None, 0, 1, 2, 0.5, 0.01, "auto", np.float64(0.5), torch.tensor(1)],
        "max_loss_increase": [None, 0, 0.1, 1e308, np.float32(0.1)],
        "target_speedup": [None, 1.1, 1, 1e308],
        "skip_layers": [None, [], [0], [1], [0, 1], ["decoder.1.self"], np.array([1]), torch.tensor([0]), {1}],
        "groups": [1, 2, 4, 3, np.int8(2)],
        "router": ["none", "static", "prompt"],
        "propagation": ["none", "mean", "prompt"],
        "stand_in": ["linear", "mean", "zero"],
        "dropout": [0.0, 0.1, 0.999999, 1 - 2**-53, np.float16(0.5)],
        "scaling": [1.0, -2, 1e4, 1e-4, 1e5, 1e300, np.float32(0.5), torch.tensor(2.0)],
        "use_bias": [True, False, np.bool_(True)],
        "init_weights": [True, False],
        "target_modules": modules,
        "exclude_modules": [*modules, ["layers.0.self_attn"], ["layers.0.mlp"], r".*\.0\..*"],
        "layers_to_transform": [None, 0, [0], [1], [5], [], np.int64(1)],
        "modules_to_save": [None, ["lm_head"], ["embed_tokens"], ["mlp"], ["self_attn"], ["q_proj"], ["nowhere"], []],
    }


def random_configurations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Settings for `EASConfig`: up to four drawn from the likely ones, and in each second one something wrong."""
    drawn, wrong, likely = random.Random(seed), wrong_values(), likely_values()
    for number in range(count):
        names = drawn.sample(list(likely), drawn.randint(0, 4))
        settings = {name: drawn.choice(likely[name]) for name in names}
        if number % 2:
            settings[drawn.choice(list(likely))] = drawn.choice(wrong)
        yield settings


def outcome(attempt: Callable[[], Any]) -> str:
    """`"works"`, `"refused"` (by a ValueError that says something) or what went wrong."""
    try:
        attempt()
    except ValueError as error:
        return "refused" if "ambiguous" not in str(error) else f"ValueError: {error}"  # NumPy's
    except OSError:  # a folder's name that is too long
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


def configurations(count: int, injected: int, seed: int = 0) -> Counter[str]:
    """Try random configurations, and at most `injected` of those that are allowed on a model of two layers.

    Returns:
        How often each `outcome` was seen: of the configuration alone, and of a model with it.
    """
    seen: Counter[str] = Counter()
    for settings in random_configurations(count, seed):
        made = []
        said = outcome(lambda settings=settings, made=made: made.append(EASConfig(**settings)))
        if not made:
            seen["config " + said] += 1
            continue
        if injected > 0:
            injected -= 1
            said = outcome(lambda config=made[0]: inject(config))
            seen["model " + said if said in ("works", "refused") else f"model {said} {settings}"] += 1
        else:
            seen["config allowed, no model tried"] += 1
    return seen


def inject(config: EASConfig) -> None:
    """Make a model with adapters of it, which has to give finite logits, leave something to train, and keep its
    configuration when saved."""
    model = get_peft_model(tiny.model("llama", changes=dict(num_hidden_layers=2)), config)
    inputs = tiny.inputs("llama", rows=2)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(**inputs).logits).all(), "logits are not finite"
    assert any(parameter.requires_grad for parameter in model.parameters()), "nothing is left to train"
    written = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})
    assert EASConfig(**json.loads(written)).to_dict() == config.to_dict()


def wrong_calls(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each public function with each wrong value in each place; some work, by chance."""
    base, inputs = tiny.model("llama", changes=dict(num_hidden_layers=2)), tiny.inputs("llama", rows=2)
    model = get_peft_model(tiny.model("llama"), EASConfig(skip_layers=[1]))
    free = itertools.count()

    def exported(**given: Any) -> None:
        new = {"model": base, "dir": folder / str(next(free)), "format": "nemotron-nas"} | given
        return export(**new)

    named = {"model": model, "dataloader": [inputs], "adapter_name": None}
    scored = {"model": base, "dataloader": [inputs], "method": "similarity"}
    calls: dict[str, tuple[Callable[..., Any], Iterable[str]]] = {
        "EASCallback": (EASCallback, ("warmup_steps", "search_steps", "interval", "num_candidates", "warm_start")),
        "export": (exported, ("model", "dir", "format", "tokenizer", "dtype", "pre_tokenizer")),
        "set_skip_layers": (lambda **given: model.set_skip_layers(**{"skip_layers": [1]} | given),
                            ("skip_layers", "adapter_name")),
        "score_attentions": (lambda **given: score_attentions(**scored | given), scored),
        "initialize_eas_weights": (lambda **given: initialize_eas_weights(**named | given), named),
        "register_family": (register_family, ("family",)),
        "Family": (lambda **given: Family(**{"model_type": "llama"} | given), [f.name for f in fields(Family)]),
        "Attentions": (Attentions, [f.name for f in fields(Attentions)]),
    }  # fmt: skip
    endless = (range, itertools.count)
    for name, (call, places) in calls.items():
        for place in places:
            values = wrong_values()
            if place == "dataloader":  # its batches are wrong
                values = [v for v in values if not isinstance(v, endless)]
                values += [[value] for value in wrong_values()] + list(map(list, wrong_batches()))
            for value in values:
                yield f"{name}({place}={shown(value)})", functools.partial(call, **{place: value})


def wrong_batches() -> Iterator[list[dict[str, Any]]]:
    """Lists of a batch that a language model can't take."""
    ids = torch.ones(2, 3, dtype=torch.long)
    for wrong in (
        {}, {"input_ids": ids.float()}, {"input_ids": ids[0]}, {"input_ids": ids + 10**6}, {"input_ids": ids[:, :0]},
        {"input_ids": [[1, 2]]}, {"input_ids": None}, {"labels": ids}, {"input_ids": ids, "nothing": 1},
        {"input_ids": ids, "attention_mask": ids[:1, :2]}, {1: ids}, {"input_ids": ids, "attention_mask": "all"},
    ):  # fmt: skip
        yield [wrong]


def outcomes(attempts: Iterable[tuple[str, Callable[[], Any]]]) -> Counter[str]:
    """How often each outcome was seen; what is neither "works" nor "refused" goes by the name of the attempt."""
    seen: Counter[str] = Counter()
    for name, attempt in attempts:
        said = outcome(attempt)
        seen[said if said in ("works", "refused") else f"{name}: {said}"] += 1
    return seen


def data_files(folder: Path) -> Iterator[Path]:
    """Files that hold no examples, or odd ones."""
    row = json.dumps({"text": "w1 w2 w3"})
    contents: dict[str, str | bytes] = {
        "empty.jsonl": "", "empty.csv": "", "empty.parquet": "", "spaces.jsonl": " \n \n", "null.json": "null",
        "number.json": "5", "list.json": "[1, 2]", "scalar.jsonl": "5\n6\n", "nested.jsonl": '{"text": {"a": 1}}',
        "lists.jsonl": '{"text": ["w1", "w2"]}', "mixed.jsonl": f'{row}\n{{"text": 5}}\n',
        "mixed_shape.jsonl": f'{row}\n[1, 2]\n"w"\n', "null.jsonl": '{"text": null}',
        "cut.jsonl": f"{row}\n" + row[:9], "deep.json": "[" * 100_000, "nan.jsonl": '{"text": NaN}',
        "deep.jsonl": '{"text": ' + "[" * 5000 + "]" * 5000 + "}", "surrogate.jsonl": '{"text": "\\ud800"}',
        "twice.jsonl": '{"text": "w1", "text": 2}', "wrong.jsonl": '{"Text": "w1"}', "half.jsonl": '{"prompt": "w1"}',
        "none.csv": "text\n", "one.csv": "w1", "wrong.csv": "a,b\n1,2\n", "ragged.csv": "text,b\nw1\nw1,2,3\n",
        "quote.csv": 'text\n"w1\n', "twice.csv": "text,text\n1,2\n", "binary.jsonl": bytes(range(256)),
        "binary.csv": bytes(range(256)), "binary.parquet": bytes(range(256)), "zeros.jsonl": bytes(1000),
        "latin.jsonl": '{"text": "é"}'.encode("latin-1"), "latin.csv": "text\né\n".encode("latin-1"),
        "utf16.jsonl": row.encode("utf-16"), "utf32.jsonl": row.encode("utf-32"),
        "bom.jsonl": b"\xef\xbb\xbf" + row.encode(), "magic.parquet": b"PAR1" * 9,
        "huge.jsonl": json.dumps({"text": "w1 " * 10**5}), "huge.csv": "text\n" + "w1 " * 10**5,
        "line.jsonl": json.dumps({"text": "w1 \u2028 w2"}, ensure_ascii=False),
        "escape.jsonl": '{"\\u001b[2J\\n": "w1"}', "many.jsonl": "{}\n" * 1000, "notes.txt": row, "noname": row,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        yield folder / name


def changed_json(content: Any, seed: int, count: int) -> Iterator[str]:
    """What a JSON file may hold after somebody has changed a value in it, or the file was damaged."""
    drawn = random.Random(seed)
    values = [
        None, True, -1, 0, 10**7, 2**63, 10**400, 1e300, float("nan"), float("inf"), "", "x", "../../etc",
        "\n# <script>", "\x1b[2J", [], [None], [[]], {}, {"a": 1}, "os", "pipeline", "PreTrainedModel",
    ]  # fmt: skip
    whole = json.dumps(content)
    yield from ("", "null", "[]", "5", '"x"', "{}", "{", "[" * 100_000, "\x00", whole[: len(whole) // 2])
    for _ in range(count):
        copied = json.loads(whole)
        place: Any = copied
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = drawn.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and drawn.random() < 0.8:
                place = place[key]
                continue
            break
        if drawn.random() < 0.2:
            del place[key]
        else:
            place[key] = drawn.choice(values)
        yield json.dumps(copied)


def command(*argv: object) -> Callable[[], None]:
    """A command, whose exit codes 1 and 2 are errors like any other's."""

    def run() -> None:
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stopped:
            code = stopped.code
        if code:
            raise ValueError(f"exit code {code}")

    return run


def wrong_data(folder: Path, base: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`peft-eas score` with each odd file, and arguments that are none."""
    folder.mkdir()
    for file in data_files(folder):
        yield f"score {file.name}", command("score", base, file, "--method", "similarity", "--max-length", 16)
    for wrong in ("", "\x00", "no/such/data", "x" * 5000, "a b", "-"):
        yield f"score {str(wrong)[:20]!r}", command("score", base, wrong)
        yield f"score model {str(wrong)[:20]!r}", command("score", wrong, folder / "bom.jsonl")
        yield f"inspect {str(wrong)[:20]!r}", command("inspect", wrong)
    for options in (
        ["--examples", "0"], ["--examples", "²"], ["--examples", "9" * 5000], ["--batch-size", "-1"],
        ["--max-length", "1.5"], ["--method", "x"], ["--nothing"],
    ):  # fmt: skip
        yield f"score {options}", command("score", base, folder / "bom.jsonl", *options)
    for number, options in enumerate((
        ["--num-skip", "nan"], ["--num-skip", "99"], ["--target-speedup", "0"], ["--skip-layers", "9"],
        ["--skip-layers", "²"], ["--r", "99999999"], ["--r-pia", "64"], ["--search-steps", "nan"],
        ["--warm-start", "x"], ["--num-skip", "auto", "--max-loss-increase", "-1"], ["--optim", "x"],
    )):  # fmt: skip
        out = ["--output_dir", folder / f"out{number}", "--use_cpu", "--report_to", "none"]
        yield f"train {options}", command("train", base, folder / "bom.jsonl", *out, *options)


def changed_folders(
    folder: Path, what: Path, file: str, argv: Callable[[Path], Sequence[object]], count: int, seed: int = 0
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A command for a copy of the folder `what`, in which a JSON file is changed."""
    content = json.loads((what / file).read_text())
    for number, text in enumerate(changed_json(content, seed, count)):
        copied = folder / f"{what.name}-{file}-{number}"
        shutil.copytree(what, copied)
        (copied / file).write_text(text)
        yield f"{file} {text[:3000]}", command(*argv(copied))


@contextlib.contextmanager
def full_disk(folder: Path, at: int) -> Iterator[list[str]]:
    """The disk is full at the `at`-th time that something in `folder` is opened to be written, written or renamed;
    what is being written then is half there.

    Yields:
        A list that the moments so far are in.
    """
    moments: list[str] = []
    real = {"open": builtins.open, "replace": os.replace, "save": peft_model.safe_save_file}

    def reached(moment: str) -> bool:
        moments.append(moment)
        return len(moments) == at

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def is_inside(path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and folder in Path(path).parents

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not is_inside(path) or not set(mode) & set("wxa+"):
            return real["open"](path, mode, *args, **kwargs)
        if reached(f"open {Path(path).name}"):
            raise full()
        file = real["open"](path, mode, *args, **kwargs)
        write = file.write

        def written(content: Any) -> int:
            if reached(f"write {Path(path).name}"):
                write(content[: len(content) // 2])
                raise full()
            return write(content)

        file.write = written
        return file

    def replaced(source: Any, target: Any, **kwargs: Any) -> None:
        if is_inside(target) and reached(f"replace {Path(target).name}"):
            raise full()
        real["replace"](source, target, **kwargs)

    def saved(tensors: Any, path: Any, **kwargs: Any) -> None:
        real["save"](tensors, path, **kwargs)
        if reached(f"save {Path(path).name}"):
            os.truncate(path, os.path.getsize(path) // 2)
            raise full()

    with (
        mock.patch("builtins.open", opened),
        mock.patch("io.open", opened),
        mock.patch("os.replace", replaced),
        mock.patch("peft.peft_model.safe_save_file", saved),
    ):
        yield moments


def full_disks(folder: Path, write: Callable[[], Any]) -> Iterator[tuple[str, bool]]:
    """Let the disk be full at each moment of `write`, one after the other.

    Yields:
        The moment, and whether the error was raised.
    """
    for at in itertools.count(1):
        with full_disk(folder, at) as moments:
            try:
                write()
                failed = False
            except OSError as error:
                failed = error.errno == errno.ENOSPC
        if len(moments) < at:
            return
        yield moments[-1], failed


def contents(folder: Path) -> dict[str, bytes]:
    """What is in all files of a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
