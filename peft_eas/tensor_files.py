"""Files of weights, read and written a tensor at a time.

What is written has the bytes that `safetensors.torch.save_file` writes; that function needs all tensors of a file at
once.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import modeling_utils

from .unread import Recipe, Unread


@dataclass(frozen=True)
class Shard:
    """A file of weights to be.

    Attributes:
        name: Of the file.
        header: What it begins with.
        tensors: What follows, by name.
    """

    name: str
    header: bytes
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> Shard:
        """One of these tensors, in the order of safetensors, which tensors without any elements have, too."""
        blank = save({key: torch.empty(0, dtype=tensor.dtype) for key, tensor in tensors.items()}, {"format": "pt"})
        entries = json.loads(blank[8 : 8 + int.from_bytes(blank[:8], "little")])
        order, end = [key for key in entries if key != "__metadata__"], 0
        for key in order:
            start, end = end, end + tensors[key].nbytes
            entries[key] |= {"shape": list(tensors[key].shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return cls(name, len(text).to_bytes(8, "little") + text, {key: tensors[key] for key in order})

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, progress: Callable[[int], object]) -> None:
        """Write the file, or what is lacking of it; by another name until it is whole.

        Args:
            folder: Where it belongs.
            progress: Is told of each piece how many bytes it has.

        Raises:
            ValueError: for NaN.
        """
        file, part = folder / self.name, folder / f"{self.name}.part"
        if file.exists():
            progress(self.size)
            return
        pieces: list[bytes | torch.Tensor] = [self.header, *self.tensors.values()]
        ends = list(itertools.accumulate(len(p) if isinstance(p, bytes) else p.nbytes for p in pieces))
        there = part.stat().st_size if part.exists() else 0
        whole = max((end for end in ends if end <= there), default=0)
        with open(part, "ab") as target:
            target.truncate(whole)
            for piece, start, end in zip(pieces, [0, *ends], ends, strict=False):
                if end > whole:
                    target.write(piece if isinstance(piece, bytes) else bytes_of(values_of(piece)))
                progress(end - start)
            target.flush()
            os.fsync(target.fileno())
        part.replace(file)


def tensors_in(file: str) -> Iterator[tuple[str, Unread]]:
    """The tensors of a file by name, unread.

    Raises:
        OSError: if it can't be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                dtype = modeling_utils.str_to_torch_dtype[part.get_dtype()]
                like = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                yield key, Unread(Recipe(like, _read, (file, key)))
    except (SafetensorError, KeyError) as error:
        raise OSError(f"{file} can't be read ({error}): is it truncated or corrupt? Download it again.") from error


def _read(file: str, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:  # each time anew, so that no more of the file stays mapped into memory
        return opened.get_tensor(key)


def sources_of(tensor: torch.Tensor) -> Iterator[Recipe | torch.Tensor]:
    """What its values come from: entries of files, and tensors that are there."""
    return tensor.recipe.sources() if isinstance(tensor, Unread) else iter((tensor,))


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, read if need be; checked, if it is not as it was in a file.

    Raises:
        ValueError: for NaN.
    """
    if not isinstance(tensor, Unread):
        return tensor
    values = tensor.recipe.read()
    if any(isinstance(source, torch.Tensor) for source in sources_of(tensor)):
        check_finite(values)
    return values


def check_finite(tensor: torch.Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: in the words of PEFT's other tuners.
    """
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor.detach()))):  # which takes no memory
        raise ValueError("NaNs detected in the merged weights. The adapter default seems to be broken")


def bytes_of(tensor: torch.Tensor) -> Any:
    """As safetensors has it."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
