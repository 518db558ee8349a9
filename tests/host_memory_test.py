"""Memory is counted in bytes, and freed memory is given back."""

import ctypes
import math
import resource
from pathlib import Path

import numpy as np
import pytest

from latent_deliberation import host_memory
from latent_deliberation.host_memory import peak_memory_bytes, return_memory


@pytest.mark.parametrize('meminfo, free', [
    ('MemTotal: 9 kB\nMemAvailable:  3 kB\nSwapFree: 2 kB\nHugePages_Total: 7\n', 5 * 1024),
    ('MemTotal: 9 kB\nMemAvailable:  3 kB\n', 3 * 1024), ('MemTotal: 9 kB\n', math.inf),
    (None, math.inf)])
def test_free_memory(monkeypatch, tmp_path, meminfo, free):
  """Free memory is what Linux calls available, and swap; infinity where it does not say."""
  if meminfo:
    (tmp_path / 'meminfo').write_text(meminfo)
  monkeypatch.setattr(host_memory, 'MEMINFO', tmp_path / 'meminfo')
  assert host_memory.free_memory() == free


def test_peak_memory_is_in_bytes():
  held = np.ones(40 * 2**20, np.uint8)
  assert held.nbytes < peak_memory_bytes() < 2**40


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='not glibc')
def test_return_memory():
  """Pieces that were freed between others leave the process."""
  def held():
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()

  pieces = [np.ones(100_000, np.uint8) for _ in range(2000)]
  before = held()
  pieces = pieces[::50]  # what stays keeps the rest from being returned by itself
  return_memory()
  assert held() < before - 100e6
  assert all(piece.all() for piece in pieces)
