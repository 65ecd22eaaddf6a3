"""What does skipping attentions change, when nothing is trained?

    python benchmarks/training_free.py             # what has no row yet
    python benchmarks/training_free.py --summary   # just the table and the picture, from the rows there are

The divergence of SmolLM2-135M's predictions from those of the whole model, with 4 to 16 of its 30 attentions replaced.
What this package does is two of the rows. The others are measured with hooks on the stock model, and nothing of it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from peft import get_peft_model
from tasks import load_model, load_tokenizer, python_windows, shuffled_texts
from torch import nn
from torch.nn import functional as F
from trainings import Rows
from transformers import PreTrainedModel

from peft_eas import EASConfig, initialize_eas_weights, score_attentions

RESULTS = Path(__file__).resolve().parent / "results"
COUNTS = (4, 8, 12, 16)
RANK = 32
RIDGE = 1e-2


class Affine(NamedTuple):
    """`x W + b`, or just `b`."""

    weight: torch.Tensor | None
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand_as(x) if self.weight is None else x @ self.weight + self.bias


def ridge(x: torch.Tensor, y: torch.Tensor, rank: int | None = None) -> Affine:
    """The affine map of `x` that is nearest to `y`, `(tokens, size)` both; of at most this rank.

    The penalty is on inputs of unit variance: some of a stream's are a thousand times as large as others.
    """
    x, y = x.double(), y.double()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-9)
    z, target = (x - mean) / scale, y.mean(0)
    gram = z.T @ z
    weight = torch.linalg.solve(gram + RIDGE * len(z) * torch.eye(len(gram), dtype=z.dtype), z.T @ (y - target))
    if rank is not None:  # onto the directions in which what is predicted varies most
        _, directions = torch.linalg.eigh(weight.T @ gram @ weight)
        directions = directions[:, -rank:]
        weight = weight @ directions @ directions.T
    weight = weight / scale[:, None]
    return Affine(weight.float(), (target - mean @ weight).float())


class Texts:
    """Batches of one kind of text, padded on the right.

    Args:
        rows: Ids of tokens.
        size: Rows in a batch.
    """

    def __init__(self, rows: list[list[int]], size: int = 16) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.kept: list[torch.Tensor] = []
        rows = sorted(rows, key=len)
        for start in range(0, len(rows), size):
            some = [torch.tensor(row) for row in rows[start : start + size]]
            ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
            self.batches.append({"input_ids": ids, "attention_mask": mask, "use_cache": False})
            self.kept.append(mask.bool())

    def tokens(self, states: list[torch.Tensor], first: bool = True) -> torch.Tensor:
        """Those of all batches that are no padding: `(tokens, size)`; with or without the first of each row."""
        start = 0 if first else 1
        return torch.cat([s[:, start:][kept[:, start:]] for s, kept in zip(states, self.kept, strict=True)])


@contextmanager
def replaced(
    model: PreTrainedModel, stand_ins: dict[int, Affine], behind: dict[int, Affine] | None = None
) -> Iterator[None]:
    """Inside of the `with`, attentions add a function of their layer's input, and FFNs more than they give."""
    handles, streams = [], {}

    def remember(module: nn.Module, args: tuple, kwargs: dict, index: int) -> None:
        streams[index] = args[0] if args else kwargs["hidden_states"]

    def instead(module: nn.Module, args: tuple, output: tuple, index: int) -> tuple:
        return (stand_ins[index](streams[index]), *output[1:])

    def more(module: nn.Module, args: tuple, output: torch.Tensor, index: int) -> torch.Tensor:
        return output + behind[index](output)

    for index in stand_ins:
        layer = model.model.layers[index]
        handles.append(layer.register_forward_pre_hook(functools.partial(remember, index=index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(functools.partial(instead, index=index)))
        if behind and index in behind:
            handles.append(layer.mlp.register_forward_hook(functools.partial(more, index=index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Calibrated:
    """A whole model on the texts that everything is fitted to, layer by layer.

    Args:
        model: A Llama.
        texts: The texts.
        sample: Fewer of them, for what takes a forward of each attention.
    """

    def __init__(self, model: PreTrainedModel, texts: Texts, sample: Texts) -> None:
        self.model, self.texts, self.sample = model, texts, sample
        self.layers = model.model.layers
        self.inputs, self.arguments = self._first_inputs()
        self.means: dict[int, Affine] = {}
        self.similarity: dict[int, float] = {}
        self.deviation: dict[int, float] = {}
        streams = self.inputs
        for index in range(len(self.layers)):
            after, (added, _) = self.step(index, streams)
            x, a = texts.tokens(streams, first=False), texts.tokens(added, first=False)
            self.means[index] = Affine(None, a.mean(0))
            self.similarity[index] = (1 - F.cosine_similarity(x, x + a, dim=-1)).mean().item()
            self.deviation[index] = ((a - a.mean(0)).norm(dim=-1).mean() / x.norm(dim=-1).mean()).item()
            streams = after

    def _first_inputs(self) -> tuple[list[torch.Tensor], list[dict]]:
        """What the first layer is given, with each batch."""
        inputs, arguments = [], []

        def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append(kwargs)

        handle = self.layers[0].register_forward_pre_hook(remember, with_kwargs=True)
        for batch in self.texts.batches:
            self.model.model(**batch)
        handle.remove()
        return inputs, arguments

    def step(self, index: int, streams: list[torch.Tensor]) -> tuple[list, tuple[list, list]]:
        """Streams behind a layer, and what its attention and its FFN gave."""
        layer, given = self.layers[index], ([], [])
        handles = [
            layer.self_attn.register_forward_hook(lambda _m, _a, output: given[0].append(output[0])),
            layer.mlp.register_forward_hook(lambda _m, _a, output: given[1].append(output)),
        ]
        after = [layer(x, **kwargs) for x, kwargs in zip(streams, self.arguments, strict=True)]
        for handle in handles:
            handle.remove()
        return after, given

    @functools.cached_property
    def own_kl(self) -> dict[int, float]:
        """How much the model moves with each attention alone replaced by its mean."""
        whole = hidden_states(self.model, self.sample)
        return {
            index: divergence(self.sample, whole, self.model, {index: mean})[0] for index, mean in self.means.items()
        }

    @functools.cached_property
    def growth(self) -> dict[int, float]:
        """The package's own score of language models."""
        return score_attentions(self.model, self.sample.batches, "growth")

    def healed(self, skipped: list[int], rank: int | None) -> dict[int, Affine]:
        """Maps of the FFNs' outputs to what their layers then lack, each fitted with those before it in place."""
        behind: dict[int, Affine] = {}
        whole = streams = self.inputs
        for index in range(len(self.layers)):
            whole, _ = self.step(index, whole)
            if index not in skipped:
                streams, _ = self.step(index, streams)
                continue
            with replaced(self.model, {index: self.means[index]}):
                streams, (_, given) = self.step(index, streams)
            lacks = [w - s for w, s in zip(whole, streams, strict=True)]
            behind[index] = ridge(self.texts.tokens(given), self.texts.tokens(lacks), rank)
            streams = [s + behind[index](m) for s, m in zip(streams, given, strict=True)]
        return behind

    def linear(self, skipped: list[int]) -> dict[int, Affine]:
        """Maps of the layers' inputs to what their attentions give in the whole model, likewise one after another."""
        maps: dict[int, Affine] = {}
        whole = streams = self.inputs
        for index in range(len(self.layers)):
            whole, (added, _) = self.step(index, whole)
            if index in skipped:
                maps[index] = ridge(self.texts.tokens(streams), self.texts.tokens(added))
            with replaced(self.model, {index: maps[index]} if index in skipped else {}):
                streams, _ = self.step(index, streams)
        return maps


def hidden_states(model: PreTrainedModel, texts: Texts) -> list[torch.Tensor]:
    """What the head reads of each batch's tokens."""
    return [model.model(**batch).last_hidden_state[kept] for batch, kept in zip(texts.batches, texts.kept, strict=True)]


def divergence(
    texts: Texts,
    whole: list[torch.Tensor],
    model: PreTrainedModel,
    stand_ins: dict[int, Affine],
    behind: dict[int, Affine] | None = None,
) -> tuple[float, float]:
    """KL of the model with these replacements from the whole one, a token, with its standard error over rows."""
    sums, counts = [], []
    with replaced(model, stand_ins, behind):
        for batch, kept, hidden in zip(texts.batches, texts.kept, whole, strict=True):
            own = model.lm_head(model.model(**batch).last_hidden_state[kept]).log_softmax(-1)
            each = F.kl_div(own, model.lm_head(hidden).log_softmax(-1), log_target=True, reduction="none").sum(-1)
            sums += [row.sum().item() for row in each.split(kept.sum(1).tolist())]
            counts += kept.sum(1).tolist()
    mean = sum(sums) / sum(counts)
    residuals = [s - mean * c for s, c in zip(sums, counts, strict=True)]
    return mean, statistics.pstdev(residuals) * math.sqrt(len(sums)) / sum(counts)


def _zeros(calibrated: Calibrated, skipped: list[int]) -> tuple:
    zero = torch.zeros_like(calibrated.means[0].bias)
    return calibrated.model, dict.fromkeys(skipped, Affine(None, zero))


def _means(calibrated: Calibrated, skipped: list[int]) -> tuple:
    return calibrated.model, {index: calibrated.means[index] for index in skipped}


def _mapped(calibrated: Calibrated, skipped: list[int], rank: int | None = None) -> tuple:
    return *_means(calibrated, skipped), calibrated.healed(skipped, rank)


def _linear(calibrated: Calibrated, skipped: list[int]) -> tuple:
    return calibrated.model, calibrated.linear(skipped)


def _eas(calibrated: Calibrated, skipped: list[int]) -> tuple:
    """What this package makes of the model, merged before anything is trained."""
    adapted = get_peft_model(copy.deepcopy(calibrated.model), EASConfig(skip_layers=skipped))
    initialize_eas_weights(adapted, calibrated.texts.batches)
    return adapted.merge_and_unload().eval(), {}


METHODS: dict[str, tuple[str, Callable[[Calibrated, list[int]], tuple]]] = {
    "similarity, zeros (as LLM-Drop)": ("similarity", _zeros),
    "similarity, means": ("similarity", _means),
    "deepest, zeros": ("depth", _zeros),
    "deepest, means": ("depth", _means),
    "deviation, means": ("deviation", _means),
    "own KL, means": ("own_kl", _means),
    f"own KL, means, map of rank {RANK} behind the FFN": ("own_kl", functools.partial(_mapped, rank=RANK)),
    "own KL, means, full map behind the FFN": ("own_kl", _mapped),
    "own KL, full linear map of the layer's input (like ReplaceMe)": ("own_kl", _linear),
    "own KL, EAS": ("own_kl", _eas),
    "grown, full linear map of the layer's input": ("growth", _linear),
    "grown, EAS (the default)": ("growth", _eas),
}
"""How attentions are chosen, and what is made of the model without them: a model, and arguments of `replaced`."""


def texts_of(name: str) -> tuple[Texts, Texts, Texts]:
    """To calibrate with, fewer of these, and others to test with."""
    if name == "Python source":
        rows = [window for file in python_windows(96, 4) for window in file]  # the first 40: of ten files
        sizes = 40, 128, 8
    else:
        tokenizer = load_tokenizer()
        rows = [tokenizer(text.text).input_ids for text in shuffled_texts("movie")]
        sizes = 160, 450, 10
    test, calibration = rows[: sizes[0]], rows[sizes[0] :][: sizes[1]]
    return Texts(calibration), Texts(calibration[:: sizes[2]]), Texts(test)


@torch.no_grad()
def measure(rows: Rows) -> None:
    """Do what has no row yet."""
    model = load_model()
    for name in ("Python source", "movie reviews"):
        done = {(row["method"], row["skipped"]) for row in rows.read() if row["text"] == name}
        missing = [(m, c) for c in COUNTS for m in METHODS if (m, c) not in done]
        if not missing:
            continue
        calibration, sample, test = texts_of(name)
        calibrated, whole = Calibrated(model, calibration, sample), hidden_states(model, test)
        for method, count in missing:
            chosen, fit = METHODS[method]
            by_layer = {i: -i for i in calibrated.means} if chosen == "depth" else getattr(calibrated, chosen)
            skipped = sorted(sorted(by_layer, key=by_layer.get)[:count])
            kl, error = divergence(test, whole, *fit(calibrated, skipped))
            row = {
                "text": name,
                "method": method,
                "skipped": count,
                "kl": round(kl, 4),
                "kl_se": round(error, 4),
                "skip_layers": skipped,
                "date": time.strftime("%Y-%m-%d"),
            }
            rows.add(row)
            print(json.dumps(row), flush=True)


def summarise(rows: Sequence[dict]) -> str:
    lines = [
        "# What skipping attentions changes without training",
        "",
        "SmolLM2-135M: KL from the whole model, in nats a token, with so many of 30 attentions replaced, ± its",
        "standard error over texts. Chosen and fitted on other texts of the same kind. *EAS* is what this package",
        "makes of the model before anything is trained: linear stand-ins of rank 32. The others are measured with",
        "hooks on the stock model. Made by `benchmarks/training_free.py`.",
    ]
    for text in dict.fromkeys(row["text"] for row in rows):
        lines += ["", f"| {text} | " + " | ".join(f"{c} skipped" for c in COUNTS) + " |"]
        lines.append("|---" * (1 + len(COUNTS)) + "|")
        for method in METHODS:
            found = {row["skipped"]: row for row in rows if (row["text"], row["method"]) == (text, method)}
            if found:
                cells = (f"{found[c]['kl']:.3f} ± {found[c]['kl_se']:.3f}" if c in found else "" for c in COUNTS)
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict], path: Path) -> None:
    """One panel a kind of text: divergence over the number of attentions that are replaced."""
    names = list(dict.fromkeys(row["text"] for row in rows))
    figure, panels = plt.subplots(
        1, len(names), figsize=(4 * len(names) + 4, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels.flat, names, strict=True):
        for number, method in enumerate(METHODS):
            found = sorted(
                (row["skipped"], row["kl"]) for row in rows if (row["text"], row["method"]) == (name, method)
            )
            if found:
                line, width = ("o-", 2.5) if "EAS" in method else ("o--", 1)
                color = plt.get_cmap("tab20")(number)
                axes.plot(*zip(*found, strict=True), line, linewidth=width, markersize=4, color=color, label=method)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(COUNTS)
        axes.set_xlabel("attentions replaced, of 30")
        axes.grid(color="0.92")
    panels[0, 0].set_ylabel("KL from the whole model, nats a token")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="nothing measured, only the table and the picture")
    args = parser.parse_args()
    rows = Rows(RESULTS / "training_free.json")
    if not args.summary:
        measure(rows)
    (RESULTS / "training_free.md").write_text(summarise(rows.read()))
    draw(rows.read(), RESULTS / "training_free.png")


if __name__ == "__main__":
    main()
