"""The log shows our own lines, and warnings of every other library."""

import logging
import os

import jax
import pytest

from latent_deliberation import progress
from latent_deliberation.cli import app


@pytest.mark.parametrize('path, level, is_shown', [
    (progress.__file__, logging.INFO, True),
    (f'site-packages{os.sep}orbax{os.sep}checkpoint.py', logging.INFO, False),
    (f'site-packages{os.sep}orbax{os.sep}checkpoint.py', logging.WARNING, True),
    (f'site-packages{os.sep}tensorflow{os.sep}save.py', logging.INFO, False),
    (f'site-packages{os.sep}tensorflow{os.sep}save.py', logging.ERROR, True)])
def test_lines_of_the_log(path, level, is_shown):
  """Of other libraries, only warnings and errors are shown."""
  record = logging.LogRecord('absl', level, path, 1, 'said', (), None)
  assert app._is_worth_a_line(record) is is_shown


def test_settings_of_jax():
  """Every setting exists, and has its value without any variable."""
  for name, value in app.JAX_SETTINGS.items():
    found = getattr(jax.config, name)
    assert getattr(found, 'value', found) == value, name
