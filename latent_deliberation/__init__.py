"""Deliberation in latent space: a frozen decoder, and a coprocessor that augments its kv-cache.

The public names below are those of `latent_deliberation.api`, which is imported on first use.
"""

import importlib
from typing import Any

__all__ = ['Generator', 'Score', 'TextCompletion', 'UserError', 'load_coprocessor', 'load_decoder',
           'load_expert', 'score']


def __getattr__(name: str) -> Any:
  if name in __all__:
    return getattr(importlib.import_module('latent_deliberation.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
