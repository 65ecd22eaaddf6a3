"""Held-out batches, and the loss of a model on them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ..batches import inputs_of, label_count


class HeldOut:
    """The batches that candidates are scored with: the same ones for all candidates of a round, others in the next.

    Which examples they hold depends on nothing but the arguments, so a run that is resumed sees the same ones.

    Args:
        dataset: Examples, with a length and an index.
        collate_fn: The Trainer's own collator.
        batch_size: Examples of a batch.
        num_batches: Batches of a round, for each process.
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
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        is_indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_indexed or isinstance(dataset, (str, Mapping)) or not len(dataset):
            raise ValueError(
                f"Candidates can't be scored with this {type(dataset).__name__}, which has no length, no index or no "
                "example: give `EASCallback(search_dataset=...)` a dataset that is not streamed, a few hundred "
                "examples that are not trained on."
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.rank = rank
        self.world_size = world_size
        self.order = list(range(len(dataset)))
        random.Random(f"{seed} held out").shuffle(self.order)

    def batches(self, round_number: int, avoid: Collection[int] = ()) -> list[dict[str, Any]]:
        """The batches of this process in a round.

        Args:
            round_number: 0, 1, ...
            avoid: `fingerprints` of rows that must not be among them.
        """
        wanted = self.batch_size * self.num_batches
        start = (round_number * self.world_size + self.rank) * wanted
        examples = []
        for position in range(start, start + len(self.order)):
            example = self.dataset[self.order[position % len(self.order)]]
            if not avoid or not avoid.intersection(fingerprints(self.collate_fn([example]))):
                examples.append(example)
            if len(examples) == wanted:
                break
        if not examples:
            raise ValueError(
                "Every example is being trained on, and none is left to score candidates with: give "
                "`EASCallback(search_dataset=...)` some that are not."
            )
        return [
            dict(self.collate_fn(examples[i : i + self.batch_size])) for i in range(0, len(examples), self.batch_size)
        ]


def fingerprints(batch: dict[str, Any]) -> set[int]:
    """What tells the rows of a batch from others: a hash of their tokens without padding, and of their images if there
    is one tensor of them a row (many images have the same question); none if there are no tokens."""
    ids = batch.get("input_ids")
    if ids is None:
        return set()
    mask, images = batch.get("attention_mask"), batch.get("pixel_values")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()
    if images is None or len(images) != len(ids):
        seen = [0] * len(ids)
    else:  # not `hash`, which differs from process to process for bytes
        seen = [zlib.crc32(image.detach().cpu().contiguous().view(torch.uint8).numpy()) for image in images]
    return {hash((of_image, *row[keep].tolist())) for of_image, row, keep in zip(seen, ids, kept, strict=True)}


@torch.no_grad()
def loss_sum(model: nn.Module, batches: Sequence[dict[str, Any]], device: torch.device) -> tuple[float, int]:
    """Sum of the loss over the labelled tokens of this process's batches, and how many they are.

    Raises:
        ValueError: if the model returns no loss.
    """
    total, count = 0.0, 0
    for batch in batches:
        loss = getattr(model(**inputs_of(batch, device)), "loss", None)
        if loss is None:
            raise ValueError(
                "The model returned no loss for a held-out batch, so candidates can't be scored: the batches that the "
                f"Trainer's collator makes need labels, and have {sorted(batch)}."
            )
        weight = label_count(batch)
        total, count = total + weight * loss.item(), count + weight
    return total, count


def means_over_processes(sums: list[tuple[float, int]]) -> list[float]:
    """`total / count` over all processes, item by item; the same numbers, bit for bit, in each process."""
    gathered = gather_object([sums])
    return [
        sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))
        for parts in zip(*gathered, strict=True)
    ]
