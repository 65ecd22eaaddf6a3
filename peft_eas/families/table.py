"""The table of families: all rows that come with the package, and those that are registered from outside."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from ..checks import refused
from ..runtime.modeling_eas import EASConfigMixin, register_config
from . import decoders, encoders, moe, multimodal, seq2seq
from .spec import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for kind in (decoders, moe, encoders, seq2seq, multimodal) for family in kind.ROWS
}
"""Rows by `model_type`."""
for _version, _rows in encoders.EARLIER.items():
    if Version(transformers.__version__) < Version(_version):
        FAMILIES |= {family.model_type: family for family in _rows}


def register_family(family: Family) -> None:
    """Add a row to the table, or replace the one of that `model_type`.

    Raises:
        ValueError: if transformers has no configuration class for the `model_type`; register that first
            (`AutoConfig.register`).
    """
    if not isinstance(family, Family):
        raise refused("family", family, "a `peft_eas.Family`")
    if family.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model type {family.model_type!r}: call `AutoConfig.register` for it first."
        )
    config_class = CONFIG_MAPPING[family.model_type]
    if issubclass(config_class, EASConfigMixin):
        raise ValueError(f"{family.model_type!r} is the type of merged models, which can't get EAS again.")
    FAMILIES[family.model_type] = family
    register_config(config_class)
