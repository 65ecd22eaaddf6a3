"""Held-out batches."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..processes import gather_object

PARTS = 4
"""Batches of a round, at least: how their losses differ says how sure a difference is."""

SAMPLE = 32
"""At most how many examples, over all processes, decide on what is decided once: scores, a budget."""

MEASURED = 2048
"""At most how many stand-ins are measured with, if their tokens are not enough before."""

GROWN = 16
"""At most how many the first set is grown on, which is what takes time when a search begins."""

ENOUGH_TO_GROW = 2048
"""Fewer than `GROWN` where these have as many tokens."""

COMPARED = 512
"""At most how many the start and what was found are compared on."""


class HeldOut:
    """The batches that sets are scored with: the same ones for all tries of a round, others in the next.

    Which examples they hold depends on nothing but the arguments, so a run that is resumed sees the same ones.

    Args:
        dataset: Examples, with a length and an index.
        collate_fn: The Trainer's own collator.
        batch_size: Examples of a batch, at most.
        examples: Examples of a round, for each process; `PARTS` at least.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes; they have different examples as long as there are enough.

    Raises:
        ValueError: if the dataset has no length, no index or no example.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        collate_fn: Callable[[list], dict],
        batch_size: int,
        examples: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        is_indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_indexed or isinstance(dataset, (str, Mapping, IterableDataset)) or not len(dataset):
            raise ValueError(
                f"Candidates can't be scored with this {type(dataset).__name__}, which has no length, no index or no "
                "example: give `EASCallback(search_dataset=...)` a dataset that is not streamed, a few hundred "
                "examples that are not trained on."
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batch_size = batch_size
        self.examples = max(examples, PARTS)
        self.rank = rank
        self.world_size = world_size
        self.order = list(range(len(dataset)))
        random.Random(f"{seed} held out").shuffle(self.order)

    def batches(self, round_number: int, avoid: Set[int] = frozenset()) -> list[dict[str, Any]]:
        """The batches of this process in a round: at least `PARTS`, and as many in each process.

        Args:
            round_number: 0, 1, ...
            avoid: `fingerprints` of rows that must not be among them.

        Raises:
            ValueError: if that leaves no example, or the collator's batches are no mappings.
        """
        wanted = self.examples
        first = (round_number * self.world_size + self.rank) * wanted
        return self._collated(self._taken(first, wanted, avoid), min(self.batch_size, math.ceil(wanted / PARTS)))

    def first(self, number: int, avoid: Set[int] = frozenset()) -> list[dict[str, Any]]:
        """This process's batches of the first `number` examples of the order, or of all there are; none twice."""
        wanted = max(1, min(len(self.order), number) // self.world_size)
        return self._collated(self._taken(self.rank * wanted, wanted, avoid), self.batch_size)

    def few(self, number: int, tokens: int) -> list[dict[str, Any]]:
        """As `first`, of fewer examples if these have so many tokens over all processes: `PARTS` of them or more, and
        as many in each process."""
        wanted = max(1, min(len(self.order), number) // self.world_size)
        examples = self._taken(self.rank * wanted, wanted, frozenset())
        lengths = gather_object([[token_count(batch) for batch in self._collated(examples, 1)]])
        enough = next((n for n in range(1, wanted) if sum(sum(of[:n]) for of in lengths) >= tokens), wanted)
        return self._collated(examples[: max(enough, min(PARTS, wanted))], self.batch_size)

    def many(self, number: int) -> Iterator[dict[str, Any]]:
        """As `first`, but made one by one."""
        wanted = max(1, min(len(self.order), number) // self.world_size)
        for start in range(0, wanted, self.batch_size):
            size = min(self.batch_size, wanted - start)
            yield from self._collated(self._taken(self.rank * wanted + start, size, frozenset()), size)

    def _taken(self, first: int, wanted: int, avoid: Set[int]) -> list[Any]:
        """`wanted` examples from place `first` of the order on; some twice if there are not as many."""
        examples = []
        for place in range(first, first + len(self.order)):
            example = self.dataset[self.order[place % len(self.order)]]
            if not avoid or not avoid & fingerprints(self.collate_fn([example])):
                examples.append(example)
            if len(examples) == wanted:
                break
        if not examples:
            raise ValueError(
                "Every example is being trained on, and none is left to score candidates with: give "
                "`EASCallback(search_dataset=...)` some that are not."
            )
        return [examples[i % len(examples)] for i in range(wanted)]

    def _collated(self, examples: list[Any], size: int) -> list[dict[str, Any]]:
        batches = [self.collate_fn(examples[i : i + size]) for i in range(0, len(examples), size)]
        if not isinstance(batches[0], Mapping):
            raise ValueError(f"a batch of its collator is a {type(batches[0]).__name__} of raw examples.")
        return [dict(batch) for batch in batches]


def fingerprints(batch: dict[str, Any]) -> set[int]:
    """What tells the rows of a batch from others: a hash of their tokens without padding, and of their images if there
    is one tensor of them a row (many images have the same question); none if there are no tokens."""
    ids, images = batch.get("input_ids"), batch.get("pixel_values")
    if ids is None:
        return set()
    kept = _kept(batch)
    if images is None or len(images) != len(ids):
        seen = [0] * len(ids)
    else:  # not `hash`, which differs from process to process for bytes
        seen = [zlib.crc32(image.detach().cpu().contiguous().view(torch.uint8).numpy()) for image in images]
    return {hash((of_image, *row[keep].tolist())) for of_image, row, keep in zip(seen, ids, kept, strict=True)}


def _kept(batch: dict[str, Any]) -> torch.Tensor:
    """Which of the batch's tokens are no padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()


def token_count(batch: dict[str, Any]) -> int:
    """How many there are without padding; 0 in what has none."""
    return 0 if batch.get("input_ids") is None else int(_kept(batch).sum())


def means_over_processes(sums: list[tuple[float, float]]) -> list[float]:
    """`total / count` over all processes, item by item; the same numbers, bit for bit, in each process."""
    gathered = gather_object([sums])
    return [
        sum(total for total, _ in parts) / max(1e-9, sum(count for _, count in parts))
        for parts in zip(*gathered, strict=True)
    ]
