"""What every launch script does around its job: flags, processes, logging, errors for people."""

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

# --help of a launch script shows the flags that are defined through this module as its own.
flags.disclaim_key_flags()

_GRACE_SECONDS = 20


def run(job: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> None:
  """Parses the flags and runs the job.

  A UserError ends the process with its message and code 1, without a traceback (--verbosity=1
  logs it). Any other exception keeps its traceback.

  Args:
    job: the work.
    prepare: what flags change about jax, before it has devices.
  """
  _define_processes()
  try:
    app.run(lambda argv: _main(job, prepare, argv), flags_parser=_parse_flags)
  except KeyboardInterrupt:
    logging.debug('interrupted here:', exc_info=True)
    _end_at_once('Interrupted: the same command goes on from what is complete.')
  except UserError as error:
    logging.debug('the error below, with its traceback:', exc_info=True)
    raise SystemExit(f'Error: {error}') from None


def _define_processes() -> None:
  """Defines the flags of a run on several hosts; on a Cloud TPU none of them is needed."""
  flags.DEFINE_string('coordinator_address', None,
                      'Address of process 0, as host:port, where several processes run.')
  flags.DEFINE_integer('process_count', None, 'Number of processes that run together.',
                       lower_bound=1)
  flags.DEFINE_integer('process_id', None, 'Number of this process, counted from 0.',
                       lower_bound=0)


def _main(job: Callable[[], None], prepare: Callable[[], None], argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'{argv[1:]} are not flags: write --name=value')
  logging.set_verbosity(max(flags.FLAGS.verbosity, logging.INFO))
  # jax logs each kind of device that a machine does not have.
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)
  # orbax logs a dozen lines a checkpoint; its warnings and errors come back as exceptions.
  logging.get_absl_logger().addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in
                                      record.pathname)
  prepare()
  values = flags.FLAGS
  initialize(values.coordinator_address, values.process_count, values.process_id)
  index, count = jax.process_index(), jax.process_count()
  if count > 1:
    _name_process(index, count)
  logging.info('%d %s devices, process %d of %d', jax.device_count(), jax.default_backend(), index,
               count)
  # Every process logs, and the first reports.
  with contextlib.redirect_stdout(io.StringIO()) if index else contextlib.nullcontext():
    try:
      job()
    except (Exception, KeyboardInterrupt):
      if count > 1:
        _end_soon()
      raise


def _end_at_once(message: str) -> None:
  """Ends the process without the interpreter's shutdown, in which a compiling thread crashes."""
  logging.flush()
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(1)


def _end_soon() -> None:
  """Ends this process soon even where the others go on, and so never come to meet it at the end."""
  end = threading.Timer(_GRACE_SECONDS, os._exit, (1,))
  end.daemon = True
  end.start()


def _name_process(index: int, count: int) -> None:
  """Begins every line of the log with the process, since logs of several are often read as one."""
  handler = logging.get_absl_handler()
  written = handler.python_handler.format

  def format_line(record: python_logging.LogRecord) -> str:
    return f'[{index}/{count}] {written(record)}'

  handler.python_handler.format = format_line


def _parse_flags(argv: list[str]) -> list[str]:
  """As app.parse_flags_with_usage, but for what ml_collections raises with a traceback."""
  try:
    return flags.FLAGS(argv)
  except (KeyError, AttributeError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    raise UserError(f'--config names a key that does not exist: {error.args[0]}\n'
                    'docs/config.md lists all keys.') from error
  except flags.Error as error:
    # "Error whilst parsing config file" holds a traceback, of which the last line is the error.
    lines = str(error).strip().splitlines()
    message = lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1].strip()}'
    raise UserError(f'{message}\n--help lists the flags.') from error


def define_directory(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag that names a directory; it is required where there is no default."""
  flag = flags.DEFINE_string(name, default, meaning, required=default is None)
  flags.register_validator(name, _check_directory)
  return flag


def define_json(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag that names a .json to write, in a directory that exists.

  It is required where there is no default.
  """
  flag = flags.DEFINE_string(name, default, meaning, required=default is None)
  flags.register_validator(name, _check_json)
  return flag


def _check_directory(path: str | None) -> bool:
  if path and ':/' in path:
    raise flags.ValidationError('it is a URL, and must be a path: mount the bucket (gcsfuse, for '
                                'instance) and give the path under the mount.')
  if path and Path(path).exists() and not Path(path).is_dir():
    raise flags.ValidationError('it is a file, and must be a directory: give another path.')
  return True


def _check_json(path: str | None) -> bool:
  # A picture or a table beside it may have its name with another ending.
  if path is not None and (
      not path.endswith('.json') or not Path(path).absolute().parent.is_dir()
      or Path(path).is_dir()):
    raise flags.ValidationError('it must be a file in a directory that exists, and end in .json: '
                                'give another path.')
  return True
