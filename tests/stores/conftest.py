"""Both kinds of store, served once by each worker, and a place in them for each test."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_deliberation import locks
from latent_deliberation.files import as_path
from tests.stores import object_store
from tests.stores.object_store import Store

_SCHEMES = ('s3', 'gs')


@pytest.fixture(scope='session')
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
  """The stores whose servers are installed, by scheme."""
  with contextlib.ExitStack() as running, pytest.MonkeyPatch.context() as patch:
    served = {scheme: running.enter_context(object_store.serve(scheme)) for scheme in _SCHEMES
              if object_store.is_installed(scheme)}
    for store in served.values():
      for name, value in store.environment.items():
        patch.setenv(name, value)
    patch.setenv('LATENT_DELIBERATION_CACHE', str(tmp_path_factory.mktemp('copies')))
    yield served


# Both have the same code above the library that speaks with them, so one is enough every day.
@pytest.fixture(params=[_SCHEMES[0], *(
    pytest.param(scheme, marks=pytest.mark.slow) for scheme in _SCHEMES[1:])])
def store(request: pytest.FixtureRequest, stores: dict[str, Store]) -> Iterator[Store]:
  """A store without faults; skipped where its server is not installed."""
  if request.param not in stores:
    pytest.skip(f"no server for {request.param}:// is installed: pip install -e '.[test]'")
  yield stores[request.param]
  stores[request.param].faults.clear()


@pytest.fixture
def place(store: Store, tmp_path: Path) -> Path:
  """A directory of the store that no other test uses; there is nothing in it yet."""
  return as_path(store.url(*tmp_path.parts[-2:], str(os.getpid())))


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
  """Leases that are written ten times a second."""
  for name, seconds in {'BEAT_SECONDS': 0.1, 'LEASE_SECONDS': 0.8, 'POLL_SECONDS': 0.05,
                        '_SETTLE_SECONDS': 0.1}.items():
    monkeypatch.setattr(locks, name, seconds)
