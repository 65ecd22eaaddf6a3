"""The configuration of a Llama whose layers differ: what `AutoConfig` needs to read a `nemotron-nas` checkpoint.

This file travels with each exported checkpoint, and imports transformers only (4 or 5).
"""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A `LlamaConfig` with `block_configs`: for each layer, what its attention and its FFN are.

    Args:
        block_configs: `[{"attention": {"no_op": ...}, "ffn": {...}}, ...]`; attributes of attributes once it is read.
        kwargs: Those of `LlamaConfig`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in block.items()})
            for block in block_configs or []
        ]

    def to_dict(self):
        blocks = [{name: dict(vars(part)) for name, part in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}
