"""The frame of every launch script: it parses flags, starts jax and logging, and ends cleanly.

A script defines its flags, and gives its work to `run`:

  _WORKDIR = app.define_directory('workdir', 'Work directory of the run.')

  def main() -> None: ...

  if __name__ == '__main__':
    app.run(main)
"""

import contextlib
import io
import logging as python_logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from latent_deliberation.distributed import initialize
from latent_deliberation.errors import UserError

# --help of a launch script lists the flags that this module defines among the script's own.
flags.disclaim_key_flags()

_GRACE_SECONDS = 20  # for other processes to fail with their own message


def run(job: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> None:
  """Parses the flags and runs the job.

  A UserError ends the process with code 1 and "Error: " and its message. Its traceback is logged
  with --verbosity=1. Any other exception is a bug, or bad luck, and keeps its traceback.

  Args:
    job: the work of the script.
    prepare: called after the flags are parsed and before jax has devices.
  """
  _define_processes()
  try:
    app.run(lambda argv: _main(job, prepare, argv), flags_parser=_parse_flags)
  except KeyboardInterrupt:
    logging.debug('interrupted here:', exc_info=True)
    _end_at_once('Interrupted. Run the same command again to continue from what is complete.')
  except UserError as error:
    logging.debug('the error below, with its traceback:', exc_info=True)
    raise SystemExit(f'Error: {error}') from None  # printed to stderr, with code 1


def _define_processes() -> None:
  """Defines the flags of a run of several processes; a Cloud TPU needs none of them."""
  flags.DEFINE_string('coordinator_address', None,
                      'Address of process 0, as host:port. Only for a run of several processes.')
  flags.DEFINE_integer('process_count', None,
                       'Number of processes that run together. Default: one, or as the TPU says.',
                       lower_bound=1)
  flags.DEFINE_integer('process_id', None,
                       'Number of this process, from 0. Only for a run of several processes.',
                       lower_bound=0)


def _main(job: Callable[[], None], prepare: Callable[[], None], argv: list[str]) -> None:
  """Runs the job in this process, which is one of one or several."""
  if len(argv) > 1:
    raise app.UsageError(f'{argv[1:]} are not flags: write --name=value')
  values = flags.FLAGS

  # Our own log from INFO on, other libraries' from WARNING on: at INFO, jax logs each kind of
  # device that the machine lacks, and orbax, through absl's logger, a dozen lines a checkpoint.
  logging.set_verbosity(max(values.verbosity, logging.INFO))
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)
  logging.get_absl_logger().addFilter(_is_worth_a_line)

  # Devices exist from here on.
  prepare()
  initialize(values.coordinator_address, values.process_count, values.process_id)
  index, count = jax.process_index(), jax.process_count()
  if count > 1:
    _name_process(index, count)
  logging.info('%d %s devices, process %d of %d', jax.device_count(), jax.default_backend(), index,
               count)

  # Every process logs. Only the first one prints.
  with contextlib.redirect_stdout(io.StringIO()) if index else contextlib.nullcontext():
    try:
      job()
    except (Exception, KeyboardInterrupt):
      if count > 1:
        _end_soon()
      raise


def _is_worth_a_line(record: python_logging.LogRecord) -> bool:
  """Whether to log a record: all but those of orbax below WARNING."""
  return (record.levelno >= python_logging.WARNING
          or f'{os.sep}orbax{os.sep}' not in record.pathname)


def _end_at_once(message: str) -> None:
  """Ends the process with code 1, without the interpreter's shutdown.

  A thread that compiles crashes in that shutdown.
  """
  logging.flush()
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(1)


def _end_soon() -> None:
  """Ends this process in _GRACE_SECONDS at the latest, with code 1.

  Its shutdown waits for the other processes. They may still be at work, and never join it.
  """
  end = threading.Timer(_GRACE_SECONDS, os._exit, (1,))
  end.daemon = True
  end.start()


def _name_process(index: int, count: int) -> None:
  """Puts the number of the process before each line of the log.

  The logs of several processes are often read as one.
  """
  handler = logging.get_absl_handler()
  format_plainly = handler.python_handler.format

  def format_line(record: python_logging.LogRecord) -> str:
    return f'[{index}/{count}] {format_plainly(record)}'

  handler.python_handler.format = format_line


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags as absl does, and turns errors of flags and of --config into a UserError.

  ml_collections would end the process with a traceback.
  """
  try:
    others = flags.FLAGS(argv)
    # For a file that cannot be read, ml_collections raises when its config is first used.
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
      _ = flags.FLAGS.config.keys
    return others
  except OSError as error:
    raise UserError(f'--config: {str(error).splitlines()[-1].strip()}') from error
  except (KeyError, AttributeError) as error:
    # The exception that names the key, and the nearest known one, is inside the others.
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    raise UserError(f'--config has no such key: {error.args[0]}\n'
                    'docs/config.md explains all keys, and launch/config.py prints those of a '
                    'config.') from error
  except flags.Error as error:
    # An error in a config file comes with a traceback. Its last line is the error.
    lines = str(error).strip().splitlines()
    message = lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1].strip()}'
    raise UserError(f'{message}\n--help lists all flags.') from error


class _PathParser(flags.ArgumentParser):
  """A path, in which '~' is the home directory: shells leave it as it is after '='."""
  syntactic_help = 'a path'

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)


def define_file(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for the path of a file; it is required if it has no default."""
  return flags.DEFINE(_PathParser(), name, default, meaning, required=default is None)


def define_directory(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for a directory; it is required if it has no default."""
  flag = define_file(name, meaning, default)
  flags.register_validator(name, _check_directory)
  return flag


def define_decoder(name: str, meaning: str) -> flags.FlagHolder:
  """Defines a required flag for a decoder: a directory, or a GGUF file.

  `weights.open_checkpoint` refuses other files.
  """
  flag = define_file(name, meaning)
  flags.register_validator(name, _check_path)
  return flag


def define_json(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for a JSON file to write; it is required if it has no default."""
  flag = define_file(name, meaning, default)
  flags.register_validator(name, _check_json)
  return flag


def _check_path(path: str | None) -> bool:
  if path and ':/' in path:
    raise flags.ValidationError('this is a URL. Mount the bucket, with gcsfuse for instance, and '
                                'give the path of the mount.')
  return True


def _check_directory(path: str | None) -> bool:
  _check_path(path)
  if path and Path(path).exists() and not Path(path).is_dir():
    raise flags.ValidationError('this is a file. Give the path of a directory.')
  return True


def _check_json(path: str | None) -> bool:
  # Pictures and tables next to it have the same name with another ending.
  if path is not None and (
      not path.endswith('.json') or not Path(path).absolute().parent.is_dir()
      or Path(path).is_dir()):
    raise flags.ValidationError('give a path that ends in .json, in a directory that exists.')
  return True
