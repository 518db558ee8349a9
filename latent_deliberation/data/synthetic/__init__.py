"""Synthetic tasks of known difficulty, generated as documents of questions."""
