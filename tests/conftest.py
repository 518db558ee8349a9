"""Eight virtual CPU devices, and one small decoder and packed batch that most tests share."""

import os

# Before jax is imported. A test that starts a process of its own starts it on the CPU too.
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import pytest  # noqa: E402

from latent_deliberation.array_types import Params  # noqa: E402
from latent_deliberation.batch import Batch  # noqa: E402
from latent_deliberation.model.decoder import Decoder  # noqa: E402
from tests import tiny  # noqa: E402

# Not through XLA_FLAGS: a process that a test starts is to see one device, as on a laptop.
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='session')
def decoder() -> Decoder:
  """A decoder in which every feature matters; see tests/tiny.py."""
  return Decoder(tiny.CONFIG)


@pytest.fixture(scope='session')
def decoder_params() -> Params:
  """Its frozen weights, far from an initialisation."""
  return tiny.decoder_params()


@pytest.fixture(scope='session')
def batch() -> Batch:
  """Two packed texts of three and two documents, the second with padding."""
  return tiny.packed_batch([(7, 4, 8), (9, 6)])
