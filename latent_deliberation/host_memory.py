"""Memory of this machine and this process: what is free, what was used, and giving some back."""

import ctypes
import math
import resource
import sys
from pathlib import Path

MEMINFO = Path('/proc/meminfo')


def free_memory() -> float:
  """Returns the bytes of memory and swap that Linux can give; infinity on other systems."""
  text = MEMINFO.read_text() if MEMINFO.is_file() else ''
  kibibytes = {line.split(':')[0]: int(line.split()[1]) for line in text.splitlines()}
  if 'MemAvailable' not in kibibytes:
    return math.inf
  return (kibibytes['MemAvailable'] + kibibytes.get('SwapFree', 0)) << 10


def peak_memory_bytes() -> int:
  """Returns the most memory that this process has held at once, in bytes."""
  # macOS counts in bytes, Linux in KiB.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_memory() -> None:
  """Gives memory that was freed back to the system, where the C library is glibc.

  Loading weights and compiling free gigabytes in small pieces. glibc keeps them for this process,
  and large arrays get new memory all the same.
  """
  if sys.platform == 'linux' and hasattr(library := ctypes.CDLL(None), 'malloc_trim'):
    library.malloc_trim(0)
