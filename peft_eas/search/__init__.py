"""Which attentions to skip."""

from .callback import EASCallback
from .report import plot_search
from .scores import score_attentions
from .skip import skip_attentions

__all__ = ["EASCallback", "plot_search", "score_attentions", "skip_attentions"]
