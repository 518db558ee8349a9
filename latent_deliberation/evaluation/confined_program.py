"""Runs a program from stdin with nothing but an interpreter, a small directory and time (Linux).

code_execution.py starts this file as a script, in an isolated interpreter. So it imports nothing
but the standard library. Its arguments are the number of an open file for its report, and the
limits: seconds, bytes of memory, bytes of files, and open files. The first line of stdin is what to
report when the program has come to its end. It differs from run to run, so a program that ends
itself early does not count as passed. One that searches this file's memory for the line could.

Namespaces of its own take the network, other processes, and the right to write anywhere but in an
empty directory in memory. A second user namespace takes the right to undo this. A filter of system
calls takes sockets, those in files included, and processes of its own.
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys

# Linux's numbers, of sched.h, mount.h, prctl.h, fcntl.h, seccomp.h and bpf_common.h.
NEW_USER, NEW_MOUNTS, NEW_NET, NEW_PIDS, NEW_IPC = (
    0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000)
PRIVATE, RECURSIVE_MOUNT = 0x40000, 0x4000
MOUNT_SETATTR, READ_ONLY, AT_RECURSIVE, AT_WORKING_DIRECTORY = 442, 1, 0x8000, -100
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38
FILTER, ALLOW, REFUSE, KILL, THREAD = 2, 0x7FFF0000, 0x50000, 0x80000000, 0x10000
LOAD, IF_EQUAL, IF_ABOVE, IF_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# By machine: its name in filters, and the numbers of clone, of clone3, and of the calls to refuse:
# socket, io_uring_setup (which opens sockets, too) and, where they exist, fork and vfork.
CALLS = {'x86_64': (0xC000003E, 56, 435, (41, 425, 57, 58)),
         'aarch64': (0xC00000B7, 220, 435, (198, 425))}

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


def refuse_calls() -> None:
  """Takes sockets and processes from this process; threads stay. Raises OSError where it cannot."""
  machine = os.uname().machine
  if machine not in CALLS:
    raise OSError(f'system calls of {machine} are not known here')
  name, clone, clone3, refused = CALLS[machine]
  refusal = (RETURN, 0, 0, REFUSE | errno.EPERM)
  # Each step: code, steps to skip if it is true, if it is false, and a value. Another machine's
  # numbers, and those of x32, would be other calls.
  steps = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, name), (RETURN, 0, 0, KILL),
           (LOAD, 0, 0, 0), (IF_ABOVE, 0, 1, 0x40000000), refusal]
  for number in refused:
    steps += [(IF_EQUAL, 0, 1, number), refusal]
  # The C library takes clone where there is no clone3. Its first argument says what is begun.
  steps += [(IF_EQUAL, 0, 1, clone3), (RETURN, 0, 0, REFUSE | errno.ENOSYS),
            (IF_EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (IF_BITS, 1, 0, THREAD), refusal,
            (RETURN, 0, 0, ALLOW)]
  packed = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
  program = struct.pack('HP', len(steps), ctypes.addressof(packed))
  _call('prctl', SET_SECCOMP, FILTER, program, 0, 0)


def main() -> None:
  report, seconds, memory_bytes, file_bytes, open_files = map(int, sys.argv[1:])
  token = sys.stdin.buffer.readline()
  program = sys.stdin.buffer.read().decode(errors='surrogatepass')
  isolate(os.getcwd(), file_bytes)
  # The first process of a namespace takes all others of it along when it ends. The program is not
  # that process, so it cannot keep it from ending with this one.
  if child := os.fork():
    os._exit(_code_of(child))
  _call('prctl', SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  if child := os.fork():
    os._exit(_code_of(child))
  limit(seconds, memory_bytes, file_bytes, open_files)
  refuse_calls()
  try:
    exec(compile(program, 'program', 'exec'), {'__name__': '__main__'})
  except SystemExit:
    sys.exit('the program ended itself, so that it did not reach its end')
  # The tests are the end of a program, so only one that comes here has passed them.
  os.write(report, token)
  os._exit(0)


def _code_of(child: int) -> int:
  """Waits for a process; returns its exit code, above 128 where a signal ended it."""
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  return code if code >= 0 else 128 - code


if __name__ == '__main__':
  main()
