"""Which attentions to skip."""

from .scores import score_attentions

__all__ = ["score_attentions"]
