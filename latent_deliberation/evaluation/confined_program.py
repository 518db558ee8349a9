"""Runs a program from stdin with nothing but an interpreter, a small directory and time (Linux).

code_execution.py starts this file as a script, in an isolated interpreter. So it imports nothing
but the standard library. Its arguments are the limits: seconds, bytes of memory, bytes of files,
and open files.

Namespaces of its own take the network, other processes, and the right to write anywhere but in an
empty directory in memory. A second user namespace takes the right to undo this.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

# Linux's numbers, of sched.h, mount.h, prctl.h and fcntl.h.
NEW_USER, NEW_MOUNTS, NEW_NET, NEW_PIDS, NEW_IPC = (
    0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000)
PRIVATE, RECURSIVE_MOUNT = 0x40000, 0x4000
MOUNT_SETATTR, READ_ONLY, AT_RECURSIVE, AT_WORKING_DIRECTORY = 442, 1, 0x8000, -100
SET_PDEATHSIG, SET_NO_NEW_PRIVILEGES = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
  """Calls a function of the C library. Raises OSError where it fails."""
  if getattr(_libc, name)(*arguments):
    number = ctypes.get_errno()
    raise OSError(number, f'{name}: {os.strerror(number)}')


def _write(path: str, content: str) -> None:
  with open(path, 'w') as file:
    file.write(content)


def isolate(directory: str, file_bytes: int) -> None:
  """Leaves this process the file system to read and `directory` to write, and no network.

  Processes that it forks from here on are alone.
  """
  user, group = os.getuid(), os.getgid()
  _call('unshare', NEW_USER | NEW_MOUNTS | NEW_NET | NEW_PIDS | NEW_IPC)
  # It stays the same user, as far as files are concerned.
  _write('/proc/self/setgroups', 'deny')
  _write('/proc/self/uid_map', f'{user} {user} 1')
  _write('/proc/self/gid_map', f'{group} {group} 1')
  _call('mount', b'none', b'/', None, PRIVATE | RECURSIVE_MOUNT, None)
  attributes = struct.pack('QQQQ', READ_ONLY, 0, 0, 0)
  _call('syscall', MOUNT_SETATTR, AT_WORKING_DIRECTORY, b'/', AT_RECURSIVE, attributes,
        ctypes.c_size_t(len(attributes)))
  _call('mount', b'tmpfs', directory.encode(), b'tmpfs', 0, f'size={16 * file_bytes}'.encode())
  # Mounts belong to the namespace before, so this one cannot change them back.
  _call('unshare', NEW_USER)
  _call('prctl', SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  os.chdir(directory)


def limit(seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
  """Sets the limits of this process and of those that it starts."""
  for kind, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory_bytes),
                      (resource.RLIMIT_FSIZE, file_bytes), (resource.RLIMIT_NOFILE, open_files),
                      (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (value, value))


def main() -> None:
  seconds, memory_bytes, file_bytes, open_files = map(int, sys.argv[1:])
  program = sys.stdin.buffer.read().decode(errors='surrogatepass')
  isolate(os.getcwd(), file_bytes)
  # The first process of a namespace takes all others of it along when it ends.
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)
  _call('prctl', SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  limit(seconds, memory_bytes, file_bytes, open_files)
  exec(compile(program, 'program', 'exec'), {'__name__': '__main__'})


if __name__ == '__main__':
  main()
