"""Effective Attention Skipping (EAS) for PEFT: fine-tune, skip redundant attentions, merge, lose the adapters.

Importing this package registers the tuner type "EAS" with PEFT and merged models with transformers' auto classes.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import constants
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .card import model_card
from .checkpoint import merge_checkpoint
from .config import EASConfig, EASType
from .export import export
from .families import FAMILIES, Attentions, Family, register_family
from .model import EASModel
from .runtime import modeling_eas
from .search import EASCallback, plot_search, score_attentions, skip_attentions
from .stand_in import initialize_eas_weights

__version__ = "0.2.0"
__all__ = [
    "FAMILIES",
    "Attentions",
    "EASCallback",
    "EASConfig",
    "EASModel",
    "EASType",
    "Family",
    "export",
    "initialize_eas_weights",
    "merge_checkpoint",
    "model_card",
    "plot_search",
    "register_family",
    "score_attentions",
    "skip_attentions",
]

PEFT_TYPE_TO_CONFIG_MAPPING[EASType.EAS] = EASConfig
PEFT_TYPE_TO_TUNER_MAPPING[EASType.EAS] = EASModel
PEFT_TYPE_TO_PREFIX_MAPPING[EASType.EAS] = EASModel.prefix

# other tuners on merged models: by default, on the modules that they take of the base model
for _name, _modules in vars(constants).items():
    if _name.endswith("_MODULES_MAPPING"):
        _modules.update({f"eas_{model_type}": modules for model_type, modules in _modules.items()})

modeling_eas.register_by_name(CONFIG_MAPPING_NAMES.keys() & FAMILIES.keys())  # older versions of transformers lack some
