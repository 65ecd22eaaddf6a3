"""Effective Attention Skipping (EAS) for PEFT: fine-tune, skip redundant attentions, merge, lose the adapters.

Importing this package registers the tuner type "EAS" with PEFT and merged models with transformers' auto classes.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import CONFIG_MAPPING

from . import modeling_eas
from .card import model_card, write_card
from .config import EASConfig, EASType
from .export import export
from .families import FAMILIES, Attentions, Family, register_family
from .model import EASModel
from .modeling_eas import prompt_mask
from .search import EASCallback, plot_search, score_attentions

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "Attentions",
    "EASCallback",
    "EASConfig",
    "EASModel",
    "EASType",
    "Family",
    "export",
    "model_card",
    "plot_search",
    "prompt_mask",
    "register_family",
    "score_attentions",
]

PEFT_TYPE_TO_CONFIG_MAPPING[EASType.EAS] = EASConfig
PEFT_TYPE_TO_TUNER_MAPPING[EASType.EAS] = EASModel
PEFT_TYPE_TO_PREFIX_MAPPING[EASType.EAS] = EASModel.prefix

modeling_eas.describe = write_card
for _family in FAMILIES.values():
    if _family.model_type in CONFIG_MAPPING:  # older versions of transformers lack some
        register_family(_family)
