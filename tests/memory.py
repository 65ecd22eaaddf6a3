"""The memory that tensors take."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_eas.unread import Unread


class AllocatedBytes(TorchDispatchMode):
    """Largest number of bytes that tensors made inside had more than those of `model` that were freed meanwhile."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()
        for parameter in model.parameters():
            self._watch(parameter.untyped_storage())

    def _watch(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            return storage.nbytes()
        return 0

    def _free(self, address, size):
        self.known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            is_there = isinstance(tensor, torch.Tensor) and not isinstance(tensor, Unread)
            if is_there and tensor.device.type == "cpu":
                self.now += self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result
