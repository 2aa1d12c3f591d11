"""What each listed key contributes to one query row's output."""

from .api import TokenScores, token_scores

__all__ = ["TokenScores", "token_scores"]
