"""How the layers of each model family are built: one row a family, and nothing about families anywhere else."""

from .find import Layers, Place, find_layers, unknown
from .spec import Attentions, Family
from .table import FAMILIES, register_family

__all__ = ["FAMILIES", "Attentions", "Family", "Layers", "Place", "find_layers", "register_family", "unknown"]
