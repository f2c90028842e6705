"""Attacked accuracy: the evaluation, its hook for training, and what says whether to believe it."""
