"""Jobs run in this process on one device, and compile each program once."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from latent_deliberation.jobs.experiment import Experiment
from tests import finished


@pytest.fixture(scope='package', autouse=True)
def compilations_kept() -> Iterator[None]:
  """Every job makes its jitted functions anew; their compilations are looked up on disk."""
  settings = {'jax_compilation_cache_dir': str(finished.COMPILED),
              'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in settings}
  for values in (settings, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # it reads its directory once
    if values is settings:
      yield


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  """Meshes over one device, which compiles in a quarter of the time that eight take."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)


@pytest.fixture(scope='session')
def quickstart() -> Path:
  """The work directory of a finished quickstart; not to be written to."""
  return finished.quickstart()[0]


@pytest.fixture(scope='session')
def experiment(quickstart: Path) -> Experiment:
  """The experiment that it ran."""
  return finished.experiment()
