"""Eight virtual CPU devices, fast compilation, and the small decoder that most tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# A shell's process in the background ignores what Ctrl-C sends, and so would tests that send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before jax starts its backend. A test that starts a process of its own passes these on to it.
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from latent_deliberation.array_types import Batch, Params  # noqa: E402
from latent_deliberation.experiment import Experiment  # noqa: E402
from latent_deliberation.model.decoder import Decoder  # noqa: E402
from tests import finished, tiny  # noqa: E402, F401  (finished, so that workers inherit its place)

# Slow code, compiled four times as fast. XLA refuses to start on a flag that it does not know, so
# these are set only for the versions on which they were tried.
if jax.__version__.startswith('0.10.'):
  os.environ.setdefault(
      'XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false')
# Not by a flag: a process that a test starts is to see one device, as on a laptop.
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='session')
def decoder() -> Decoder:
  """A decoder in which every feature matters; see tests/tiny.py."""
  return Decoder(tiny.CONFIG)


@pytest.fixture(scope='session')
def decoder_params() -> Params:
  """Its weights, far from an initialisation."""
  return tiny.decoder_params()


@pytest.fixture(scope='session')
def batch() -> Batch:
  """Two packed texts: documents of 7, 4 and 8 tokens; 9, 6 and four of padding."""
  return tiny.packed_batch([(7, 4, 8), (9, 6)])


@pytest.fixture(scope='session', autouse=True)
def compilations_kept() -> Iterator[None]:
  """Programs that take long to compile are looked up on disk, by all workers."""
  settings = {'jax_compilation_cache_dir': str(finished.COMPILED),
              'jax_persistent_cache_min_compile_time_secs': 0.2}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # it reads its directory once
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
