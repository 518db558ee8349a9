"""The frame of every launch script: it parses flags, starts jax and logging, and ends cleanly.

The code of a process says how it ended: 0 done, 1 an error, 130 SIGINT, 143 SIGTERM.

A script defines its flags, and gives its work to `run`:

  _WORKDIR = app.define_directory('workdir', 'Work directory of the run.')

  def main() -> None: ...

  if __name__ == '__main__':
    app.run(main)
"""

import contextlib
import difflib
import io
import logging as python_logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import app, flags, logging

from latent_deliberation.distributed import initialize
from latent_deliberation.errors import StoreError, UserError, problems_of, raise_problems
from latent_deliberation.files import as_path, check_free, check_path, make_writable
from latent_deliberation.model.products import DTYPES

# --help of a launch script lists the flags that this module defines among the script's own.
flags.disclaim_key_flags()

_GRACE_SECONDS = 20  # for other processes to fail with their own message
_before_parsing: list[Callable[[], None]] = []
_OUR_CODE = str(Path(__file__).parents[1])
_BROKEN_PIPE = 128 + signal.SIGPIPE  # the code of a program whose reader has gone

# What results and programs depend on. Variables such as JAX_ENABLE_X64 can change each of these.
JAX_SETTINGS = {
    'jax_enable_x64': False,
    'jax_default_prng_impl': 'threefry2x32',
    'jax_threefry_partitionable': True,
    'jax_random_seed_offset': 0,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_numpy_rank_promotion': 'allow',
    'jax_default_matmul_precision': None,
    'jax_disable_jit': False,
    'jax_debug_nans': False,  # values that no result uses may be NaN
    'jax_debug_infs': False,
    'jax_transfer_guard': None,
}


class Terminated(KeyboardInterrupt):
  """SIGTERM outside of a training loop, which has its own answer to it."""


def before_parsing(action: Callable[[], None]) -> None:
  """Calls `action` before the flags are parsed, where its errors are shown as those of flags."""
  _before_parsing.append(action)


def run(job: Callable[..., None], prepare: Callable[[], None] = lambda: None,
        takes_words: bool = False) -> None:
  """Parses the flags and runs the job.

  A UserError ends the process with code 1 and "Error: " and its message, and so does a file without
  permission. The traceback is logged with --verbosity=1. Any other exception is a bug, or bad luck,
  and keeps its traceback.

  Args:
    job: the work of the script.
    prepare: called after the flags are parsed and before jax has devices.
    takes_words: whether the job is given the arguments that are no flags; else there may be none.
  """
  # A sign that a terminal's encoding lacks must not end a run. Nor must a typed line of another
  # encoding: it is refused where it is used, and the next one may be right.
  for stream, errors in ((sys.stdout, 'backslashreplace'), (sys.stderr, 'backslashreplace'),
                         (sys.stdin, 'surrogateescape')):
    if isinstance(stream, io.TextIOWrapper):  # not one of a notebook, or None where it is closed
      stream.reconfigure(errors=errors)
  _define_common()
  signal.signal(signal.SIGTERM, _terminate)
  try:
    app.run(lambda argv: _main(job, prepare, argv, takes_words), flags_parser=_parse_flags)
  except KeyboardInterrupt as stop:
    logging.debug('interrupted here:', exc_info=True)
    said = 'Stopped by SIGTERM.' if isinstance(stop, Terminated) else 'Interrupted.'
    if 'workdir' in flags.FLAGS:  # what is complete is there
      said += ' Run the same command again to continue from what is complete.'
    _end_at_once(said, _code_of(stop))
  except BrokenPipeError:
    if _has_reader():
      raise
    # Whoever read the output needs no more, as `head` does. Nothing may be written at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(_BROKEN_PIPE) from None
  except (UserError, StoreError) as error:
    logging.debug('the error below, with its traceback:', exc_info=True)
    raise SystemExit(f'Error: {error}') from None  # printed to stderr, with code 1
  except PermissionError as error:
    if error.filename is None:  # of something else than a file
      raise
    logging.debug('the error below, with its traceback:', exc_info=True)
    raise SystemExit(f'Error: {error.filename}: {error.strerror}. Change its permissions, or give '
                     'another path') from None


def _has_reader() -> bool:
  """Whether somebody still reads the output, so that another pipe is broken."""
  output = select.poll()
  output.register(sys.stdout.fileno(), 0)
  return not output.poll(0)  # an error is reported, whatever was asked for


def _terminate(number: int, frame: FrameType | None) -> None:
  raise Terminated


def _code_of(error: BaseException) -> int:
  """Returns the code with which an error ends the process."""
  if isinstance(error, KeyboardInterrupt):
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
  return 1


def _define_common() -> None:
  """Defines the flags of every script: a cache, and several processes that are no Cloud TPU."""
  # No key of the config: programs in a cache are trusted, and a run.json may be of somebody else.
  flags.DEFINE(_PathParser(), 'compilation_cache', None,
               'Directory that keeps compiled programs for the next launch. Default: that of the '
               'variable JAX_COMPILATION_CACHE_DIR, if any.')
  flags.DEFINE_string('coordinator_address', None,
                      'Address of process 0, as host:port. Only for a run of several processes.')
  flags.DEFINE_integer('process_count', None,
                       'Number of processes that run together. Default: one, or as the TPU says.',
                       lower_bound=1)
  flags.DEFINE_integer('process_id', None,
                       'Number of this process, from 0. Only for a run of several processes.',
                       lower_bound=0)


def _main(job: Callable[..., None], prepare: Callable[[], None], argv: list[str],
          takes_words: bool) -> None:
  """Runs the job in this process, which is one of one or several."""
  if len(argv) > 1 and not takes_words:
    raise app.UsageError(f'{argv[1:]} are not flags: write --name=value')
  values = flags.FLAGS

  # Our own log from INFO on, other libraries' from WARNING on: at INFO, jax logs each kind of
  # device that the machine lacks, and others, through absl's logger, a dozen lines a checkpoint.
  logging.set_verbosity(max(values.verbosity, logging.INFO))
  python_logging.getLogger('jax').setLevel(python_logging.WARNING)
  logging.get_absl_logger().addFilter(_is_worth_a_line)
  _settle_jax()
  if values.compilation_cache is not None:
    jax.config.update('jax_compilation_cache_dir', values.compilation_cache)

  # Devices exist from here on.
  prepare()
  initialize(values.coordinator_address, values.process_count, values.process_id)
  index, count = jax.process_index(), jax.process_count()
  if count > 1:
    _name_process(index, count)
    # jax aborts where another process is lost. Its message must not be followed by all stacks.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
  logging.info('devices: %d of %s%s', jax.device_count(), jax.default_backend(),
               f', process {index} of {count}' if count > 1 else '')

  # Every process logs. Only the first one prints.
  with contextlib.redirect_stdout(io.StringIO()) if index else contextlib.nullcontext():
    try:
      job(*[argv[1:]] * takes_words)
      _flush()  # here, so that `run` hears of a reader that has gone
    except (Exception, KeyboardInterrupt) as error:
      if count > 1:
        _end_soon(_code_of(error))
      if count > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        error.add_note(f'Process {index} of {count} lost its work in the error above. If another '
                       'process ended before it, the log of that one says why. The same command '
                       'on every host resumes from the newest checkpoint.')
      raise


def _settle_jax() -> None:
  """Sets what results depend on, and names each setting that the environment had changed."""
  for name, found in _changed_settings().items():
    logging.warning('%s=%s is not used: launch scripts need %s', name.upper(),
                    os.environ.get(name.upper(), found), JAX_SETTINGS[name])
    jax.config.update(name, JAX_SETTINGS[name])


@contextlib.contextmanager
def settled_jax() -> Iterator[None]:
  """Has JAX_SETTINGS inside of the block, and what a notebook or its variables chose after it."""
  found = _changed_settings()
  try:
    for name in found:
      jax.config.update(name, JAX_SETTINGS[name])
    yield
  finally:
    for name, value in found.items():
      jax.config.update(name, value)


def _changed_settings() -> dict[str, Any]:
  """Returns the values in jax of those JAX_SETTINGS that it has with another value."""
  found = {name: getattr(jax.config, name, value)  # other versions of jax may lack a setting
           for name, value in JAX_SETTINGS.items()}
  # Some values are members of an enumeration of strings.
  found = {name: getattr(value, 'value', value) for name, value in found.items()}
  return {name: value for name, value in found.items() if value != JAX_SETTINGS[name]}


def _is_worth_a_line(record: python_logging.LogRecord) -> bool:
  """Whether to log a record: our own, and those of other libraries from WARNING on."""
  return record.levelno >= python_logging.WARNING or record.pathname.startswith(_OUR_CODE)


def _end_at_once(message: str, code: int) -> None:
  """Ends the process without the interpreter's shutdown.

  A thread that compiles crashes in that shutdown.
  """
  logging.flush()
  with contextlib.suppress(BrokenPipeError):
    _flush()
    print(message, file=sys.stderr, flush=True)
  os._exit(code)


def _flush() -> None:
  if sys.stdout is not None:  # None where it was closed, as by >&-
    sys.stdout.flush()


def _end_soon(code: int) -> None:
  """Ends this process in _GRACE_SECONDS at the latest.

  Its shutdown waits for the other processes. They may still be at work, and never join it.
  """
  end = threading.Timer(_GRACE_SECONDS, os._exit, (code,))
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
  """Parses the flags as absl does, and says all that is wrong with them in one UserError."""
  unknown = list(_unknown_flags(argv[1:]))
  if unknown:
    raise_problems([*problems_of(lambda: _parse_known(argv)), *unknown, '--help lists all flags.'])
  return _parse_known(argv)


def _unknown_flags(arguments: Sequence[str]) -> Iterator[str]:
  """Yields a message for each flag that is not defined; keys of --config are another matter."""
  is_value = False
  for argument in arguments:
    found = not is_value and re.match('--?([A-Za-z][^=]*)', argument)
    if not found:
      is_value = False
      continue
    name = found[1]
    flag = flags.FLAGS[name] if name in flags.FLAGS else None
    is_value = flag is not None and not flag.boolean and '=' not in argument
    if flag is None and name.removeprefix('no') not in flags.FLAGS and not re.match(
        r'(no)?config[.\[]', name):
      near = difflib.get_close_matches(name, flags.FLAGS, n=1)
      yield f'Unknown command line flag {name!r}.' + (f' Did you mean: {near[0]} ?' if near else '')


def _parse_known(argv: list[str]) -> list[str]:
  """Parses the flags that are defined, and turns errors of them and of --config into a UserError.

  ml_collections would end the process with a traceback.
  """
  try:
    for action in _before_parsing:
      action()
    others = flags.FLAGS(argv, known_only=True)
    # For a file that cannot be read, ml_collections raises when its config is first used.
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
      _ = flags.FLAGS.config.keys
    return others
  except SystemExit as end:  # absl's end after --help, with code 1
    raise SystemExit(0) from end
  except (OSError, SyntaxError) as error:
    raise UserError(f'--config: {str(error).splitlines()[-1].strip()}') from error
  except flags.Error as error:
    # absl puts an error of a value into one of its own.
    if isinstance(error.__context__, UserError):
      raise error.__context__ from None
    raise UserError(f'{_describe(error)}\n--help lists all flags.') from error


def _describe(error: flags.Error) -> str:
  """Returns an error of flags in a line, with all flags that are missing."""
  missing = re.findall(r'flag --(\w+)=None: Flag --\1 must have a value', str(error))
  if missing:
    return ' '.join(f'--{name} is missing: give --{name}=...' for name in missing)
  # An error in a config file comes with a traceback. Its last line is the error.
  lines = str(error).strip().splitlines()
  return lines[0] if len(lines) == 1 else f'{lines[0]} {lines[-1].strip()}'


class _PathParser(flags.ArgumentParser):
  """A path or URL, in which '~' is the home directory: shells leave it as it is after '='."""
  syntactic_help = 'a path'

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)


def define_file(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for the path of a file; it is required if it has no default."""
  if default is None:
    meaning = f'{meaning} Required.'
  return flags.DEFINE(_PathParser(), name, default, meaning, required=default is None)


def define_directory(name: str, meaning: str, default: str | None = None, *,
                     on_disk: bool = False) -> flags.FlagHolder:
  """Defines a flag for a directory; it is required if it has no default.

  With `on_disk` it is one of this machine, and URLs of object stores are refused.
  """
  flag = define_file(name, meaning, default)
  flags.register_validator(name, _check_on_disk if on_disk else _check_directory)
  return flag


def define_decoder(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for a decoder; it is required if it has no default.

  `weights.open_checkpoint` takes its value: a directory, a GGUF file, a name or hf://ORG/NAME.
  """
  flag = define_file(name, meaning, default)
  flags.register_validator(name, _check_decoder)
  return flag


def define_vocabulary() -> flags.FlagHolder:
  """Defines the flag --vocabulary; see `tokenizer_of` for its values."""
  return define_file('vocabulary', "Path of a SentencePiece model or tokenizer.json, or 'byte'. "
                     "Default: the decoder's own.", '')


def define_dtype() -> flags.FlagHolder:
  """Defines the flag --dtype; see `api.load_decoder`."""
  return flags.DEFINE_enum(
      'dtype', DTYPES[0], DTYPES, 'Dtype of the computation and of the kv-cache.')


def define_json(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag for a JSON file to write, and --overwrite; it is required without a default.

  A file that exists is refused without --overwrite. So are a page, picture and table of the same
  name with another ending. So is a place that cannot be written to.
  """
  flag = define_file(name, meaning, default)
  flags.register_validator(name, _check_json)
  define_overwrite('a file that is there already')
  flags.register_validator(name, lambda path: _check_free(path, flags.FLAGS['overwrite'].value))
  return flag


def define_overwrite(what: str) -> flags.FlagHolder:
  """Defines the flag --overwrite, for `what`."""
  return flags.DEFINE_bool('overwrite', False, f'Overwrite {what}.')


def _check_free(path: str | None, overwrite: bool) -> bool:
  try:
    endings = ('.json', '.md', '.png', '.csv')
    check_free([as_path(path).with_suffix(end) for end in endings] if path else [], overwrite)
  except UserError as error:
    raise flags.ValidationError(str(error)) from error
  return True


def _check_path(path: str | None) -> bool:
  try:
    check_path(path or '')
  except (UserError, StoreError) as error:
    raise flags.ValidationError(str(error)) from error
  return True


def _check_decoder(path: str | None) -> bool:
  # pathlib writes hf://ORG/NAME with one slash.
  return path is not None and path.startswith('hf:/') or _check_path(path)


def _check_directory(path: str | None) -> bool:
  _check_path(path)
  if path and as_path(path).exists() and not as_path(path).is_dir():
    raise flags.ValidationError('this is a file. Give the path of a directory.')
  return True


def _check_on_disk(path: str | None) -> bool:
  if path and ':/' in path:
    raise flags.ValidationError('this is a URL, and the files must be on a disk of this machine. '
                                'Give a directory of it; launch/recipes/bucket.sh copies one.')
  return _check_directory(path)


def _check_json(path: str | None) -> bool:
  _check_path(path)
  if path is not None and (
      not path.endswith('.json') or as_path(path).is_dir()
      or ':/' not in path and not Path(path).absolute().parent.is_dir()):
    raise flags.ValidationError('give a path that ends in .json, in a directory that exists.')
  # The work may take hours, and its result must not be lost at the end.
  if path is not None:
    try:
      make_writable(as_path(path).absolute().parent)
    except UserError as error:
      raise flags.ValidationError(str(error)) from error
  return True
