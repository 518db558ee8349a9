"""Eight virtual CPU devices, fast compilation, and the small decoder that most tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# A background process of a shell ignores SIGINT, and so would tests that send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before jax starts its backend. Processes that tests start inherit it.
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from latent_deliberation.array_types import Batch, Params  # noqa: E402
from latent_deliberation.experiment import Experiment  # noqa: E402
from latent_deliberation.model.decoder import Decoder  # noqa: E402
from tests import finished, tiny  # noqa: E402, F401  (finished, so that workers inherit its place)

# Slower code that compiles ten times as fast: 0.75 s against 8.1 for one forward pass with
# gradients. XLA refuses to start on an unknown flag, so these are set only for versions on which
# they were tried.
if jax.__version__.startswith('0.10.'):
  os.environ.setdefault(
      'XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
      '--xla_cpu_parallel_codegen_split_count=1')
# Not by a flag, since processes that tests start should see one device, as on a laptop.
jax.config.update('jax_num_cpu_devices', 8)


# Modules that start processes, train, or compile large programs. A test of any other module is
# `unit`, unless it is slow, needs a published model or uses the finished quickstart.
# `pytest -m unit` takes under a minute.
NOT_UNIT = (
    'api', 'benchmarks/', 'cli/convert', 'cli/expert_use', 'cli/generate', 'cli/make_expert',
    'cli/quickstart', 'data/loading', 'data/online', 'deliberation/coprocessor',
    'deliberation/flops', 'deliberation/forward', 'errors', 'evaluation/answers',
    'evaluation/code_execution', 'evaluation/diagnostics', 'evaluation/evaluate',
    'evaluation/gating', 'evaluation/harness', 'evaluation/perplexity', 'evaluation/plots',
    'evaluation/stock_tasks', 'evaluation/task', 'experts/', 'inference/',
    'launch/bad_luck', 'launch/launch', 'launch/recipes', 'model/checkpoints/gguf',
    'model/checkpoints/google', 'model/checkpoints/hugging_face_test',
    'model/checkpoints/native', 'model/checkpoints/source', 'model/decoder', 'model/kernels/',
    'model/layers', 'model/rotary', 'model/transformer_test', 'model/weights', 'parity/',
    'planning/compile', 'readme', 'serving/', 'stores/', 'studies/scoring', 'studies/study_test',
    'studies/tune', 'training/checkpointer', 'training/hosts', 'training/loop', 'training/step',
    'training/trackers', 'training/train')

MOST_MAPPINGS = 20_000  # of memory, that a worker keeps from one module to the next


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks tests as `unit`, before -m selects tests by their marks."""
  for item in items:
    module = item.path.relative_to(Path(__file__).parent).as_posix()
    is_large = module.startswith(NOT_UNIT) or 'quickstart' in item.fixturenames
    if not is_large and not any(map(item.get_closest_marker, ('slow', 'gemma'))):
      item.add_marker('unit')


@pytest.fixture(scope='session')
def decoder() -> Decoder:
  """The decoder in which every feature matters; see tests/tiny.py."""
  return Decoder(tiny.CONFIG)


@pytest.fixture(scope='session')
def decoder_params() -> Params:
  """Random weights of that decoder."""
  return tiny.decoder_params()


@pytest.fixture(scope='session')
def batch() -> Batch:
  """Two packed texts: documents of 7, 4 and 8 tokens; 9, 6 and four of padding."""
  return tiny.packed_batch([(7, 4, 8), (9, 6)])


@pytest.fixture(scope='session', autouse=True)
def compilations_kept() -> Iterator[None]:
  """All workers share compiled programs on disk; the next run of the tests has them too."""
  settings = {'jax_compilation_cache_dir': str(finished.COMPILED),
              'jax_persistent_cache_min_compile_time_secs': 0.0}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # it reads its directory once
  yield


@pytest.fixture(scope='module', autouse=True)
def programs_dropped() -> Iterator[None]:
  """A worker drops its compiled programs before it holds too many.

  Each takes a few mappings of memory, of which Linux gives a process 65,530. Beyond them a
  compilation crashes.
  """
  yield
  mappings = Path('/proc/self/maps')
  if mappings.is_file() and mappings.read_bytes().count(b'\n') > MOST_MAPPINGS:
    jax.clear_caches()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  """Meshes over one device, which compile in a quarter of the time that eight take."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *backend: devices)


@pytest.fixture(scope='module')
def module_on_one_device() -> Iterator[None]:
  """The same for all tests of a module."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *backend: devices)
    yield


@pytest.fixture(scope='session')
def quickstart() -> Path:
  """The work directory of a finished quickstart, which tests must not write to."""
  return finished.quickstart()[0]


@pytest.fixture(scope='session')
def experiment(quickstart: Path) -> Experiment:
  """The experiment of that quickstart."""
  return finished.experiment()
