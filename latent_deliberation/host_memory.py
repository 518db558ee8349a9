"""Memory of this machine and this process: what is free, what was used, and giving some back."""

import ctypes
import math
import resource
import sys
from pathlib import Path

MEMINFO, CGROUP = Path('/proc/meminfo'), Path('/sys/fs/cgroup')
STATUS = Path('/proc/self/status')
# Files in CGROUP of the limit of a container, of what it uses, and of what that is. The keys of the
# last begin with the prefix. Version 2, then version 1.
_LIMITS = (('memory.max', 'memory.current', 'memory.stat', ''),
           ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
            'total_'))


def free_memory() -> float:
  """Returns the bytes of memory and swap that Linux can give; infinity on other systems.

  In a container it is no more than what the limit of the container leaves.
  """
  text = MEMINFO.read_text() if MEMINFO.is_file() else ''
  kibibytes = {line.split(':')[0]: int(line.split()[1]) for line in text.splitlines()}
  if 'MemAvailable' not in kibibytes:
    return math.inf
  free = (kibibytes['MemAvailable'] + kibibytes.get('SwapFree', 0)) << 10
  return min(free, _free_in_container())


def _free_in_container() -> float:
  """Returns the bytes that the limit of a container leaves; infinity without a limit."""
  for limit, used, kinds, prefix in _LIMITS:
    try:
      allowed, taken, lines = ((CGROUP / name).read_text() for name in (limit, used, kinds))
    except OSError:  # another version, or no container
      continue
    if allowed.strip() == 'max':
      return math.inf
    # Copies of files count as used, but Linux gives them up when memory is wanted.
    sizes = dict(line.split() for line in lines.splitlines())
    files = sum(int(sizes.get(f'{prefix}{kind}_file', 0)) for kind in ('active', 'inactive'))
    return max(0, int(allowed) - int(taken) + files)
  return math.inf


def peak_memory_bytes() -> int:
  """Returns the most memory that this process has held at once, in bytes."""
  # The peak of getrusage begins with that of the process that started this one, on Linux.
  lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
  for key, _, value in (line.partition(':') for line in lines):
    if key == 'VmHWM':
      return int(value.split()[0]) << 10
  # macOS counts in bytes, Linux in KiB.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_memory() -> None:
  """Gives memory that was freed back to the system, where the C library is glibc.

  Loading weights, compiling and scoring free gigabytes in small pieces. glibc keeps them for this
  process, and large arrays get new memory all the same.
  """
  if sys.platform == 'linux' and hasattr(library := ctypes.CDLL(None), 'malloc_trim'):
    library.malloc_trim(0)
