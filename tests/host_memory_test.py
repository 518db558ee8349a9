"""Memory is counted in bytes, and freed memory is given back."""

import ctypes
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latent_deliberation import host_memory
from latent_deliberation.host_memory import peak_memory_bytes, return_memory
from tests import finished


@pytest.mark.parametrize('meminfo, free', [
    ('MemTotal: 9 kB\nMemAvailable:  3 kB\nSwapFree: 2 kB\nHugePages_Total: 7\n', 5 * 1024),
    ('MemTotal: 9 kB\nMemAvailable:  3 kB\n', 3 * 1024), ('MemTotal: 9 kB\n', math.inf),
    (None, math.inf)])
def test_free_memory(monkeypatch, tmp_path, meminfo, free):
  """Free memory is what Linux calls available, and swap; infinity where it does not say."""
  if meminfo:
    (tmp_path / 'meminfo').write_text(meminfo)
  monkeypatch.setattr(host_memory, 'MEMINFO', tmp_path / 'meminfo')
  monkeypatch.setattr(host_memory, 'CGROUP', tmp_path, raising=False)
  assert host_memory.free_memory() == free


VERSION_2 = {'memory.max': '1000', 'memory.current': '700',
             'memory.stat': 'anon 450\nactive_file 20\ninactive_file 30'}
VERSION_1 = {'memory/memory.limit_in_bytes': '1000', 'memory/memory.usage_in_bytes': '700',
             'memory/memory.stat': 'cache 9\ntotal_active_file 20\ntotal_inactive_file 30'}


@pytest.mark.parametrize('files, free', [
    (VERSION_2, 350), (VERSION_1, 350), ({**VERSION_2, 'memory.max': 'max'}, 3072),
    ({**VERSION_2, 'memory.current': '2000'}, 0), ({'memory.max': '1000'}, 3072),
    ({**VERSION_1, 'memory/memory.limit_in_bytes': '9223372036854771712'}, 3072), ({}, 3072)])
def test_limit_of_a_container(monkeypatch, tmp_path, files, free):
  """A container has what its limit leaves, with what Linux keeps of files, or less."""
  (tmp_path / 'meminfo').write_text('MemAvailable: 3 kB\n')
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f'{content}\n')
  monkeypatch.setattr(host_memory, 'MEMINFO', tmp_path / 'meminfo')
  monkeypatch.setattr(host_memory, 'CGROUP', tmp_path, raising=False)
  assert host_memory.free_memory() == free


def test_peak_memory_is_in_bytes():
  held = np.ones(40 * 2**20, np.uint8)
  assert held.nbytes < peak_memory_bytes() < 2**40


@pytest.mark.skipif(not host_memory.STATUS.is_file(), reason='not Linux')
@pytest.mark.parametrize('module, call', [
    ('host_memory', 'peak_memory_bytes()'), ('benchmarks.peft_side', 'peak_memory(None, "cpu")')])
def test_peak_memory_is_of_this_process_alone(module, call):
  """A process that a large one starts does not begin with its peak."""
  held = np.ones(2**30, np.uint8)
  code = f'from latent_deliberation.{module} import *; print({call})'
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         env=finished.environment())
  assert 2**20 < int(found.stdout) < held.nbytes // 2


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
