"""The flag --config: a config file or the run.json of a run, with overrides, as typed values.

  define_config(__file__)

  def main() -> None:
    experiment = read_config()

What a flag gives, such as --config.data.files, goes before what the config file says. Some values
follow from what is given: the source of text, the numbers of embeddings and of microbatches, the
warm-up.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser
from ml_collections.config_flags.tuple_parser import TupleParser

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app
from latent_deliberation.data.data_config import (
  BYTE_VOCABULARY_SIZE,
  split_files,
  with_given_source,
)
from latent_deliberation.deliberation.coprocessor_checkpoint import DESCRIPTION
from latent_deliberation.errors import StoreError, UserError, problems_of, raise_problems
from latent_deliberation.experiment import Experiment, as_config, bind, nearest_key
from latent_deliberation.files import as_path, check_path, unseal
from latent_deliberation.paths import RUN_FILE, with_current_names
from latent_deliberation.sharding import MeshConfig, make_mesh

# --help of a launch script shows the flags that are defined here as its own.
flags.disclaim_key_flags()

FLAG = 'config'
_WHERE = f'--{FLAG}'  # before the dotted path of a key, in messages
HELP = ("Config file, or the run.json of a run. Any key can be overridden, as in "
        '--config.training.batch_size=16; launch/config.py --config=... lists all keys.')


def define_config(launch_script: str, default: str | None = None, of_run: str = '') -> None:
  """Defines the flag --config of a launch script.

  Args:
    launch_script: path of the script, which is in launch/.
    default: path of a config file, relative to the root of the source tree. Without a default, the
      flag is required.
    of_run: name of the flag of a run. Without --config, the run.json of that run is the config.
  """
  root = Path(launch_script).resolve().parents[1]
  if str(root) not in sys.path:  # so that config files can import their neighbours
    sys.path.insert(0, str(root))
  saved = _find_run(of_run) if of_run and _given_flag(FLAG) is None else None
  if saved or default:
    default = str(saved or root / default)
  config_flags.register_flag_parser_for_type(tuple, _TupleParser())
  meaning = HELP
  if default is None:
    meaning += f' Default: the run.json of --{of_run}.' if of_run else ' Required.'
  config_flags.DEFINE_config_file(FLAG, None, meaning, lock_config=True)
  flags.FLAGS[FLAG].parser = _ConfigParser(FLAG)
  flags.FLAGS[FLAG].default_as_str = None  # it would be listed as 'None'
  if default is None:
    flags.mark_flag_as_required(FLAG)
    if of_run and _given_flag(of_run):
      # Also where something else is wrong with the directory: `_find_run` has said so by then.
      problem = (f'--{of_run}={_given_flag(of_run)} has no {RUN_FILE} of a run: give the directory '
                 f'of one, or --{FLAG}=...')
      app.before_parsing(lambda: _given_flag(FLAG) is None and raise_problems([problem]))
  else:
    # Only where errors of overrides are caught: the default is read when it is set.
    app.before_parsing(lambda: flags.FLAGS.set_default(FLAG, default))
  app.before_parsing(lambda: _check_flag(sys.argv[1:]))


def _check_flag(arguments: Sequence[str]) -> None:
  """Checks that --config is a file, and comes before its overrides.

  Raises:
    UserError: it is not, or does not.
  """
  places = [at for at, argument in enumerate(arguments)
            if re.fullmatch(f'--?{FLAG}(=.*)?', argument)]
  override = next((argument for argument in arguments[:places[0] if places else None]
                   if re.match(rf'--?(no)?{FLAG}\.', argument)), None)
  if override and places:
    raise UserError(f'{override} is before --config: give --config=FILE first, and then the keys '
                    'that differ')
  if override and flags.FLAGS[FLAG].default is None:
    raise UserError(f'{override} without --config: give --config=FILE before it, such as '
                    '--config=configs/quickstart.py')
  for at in places:
    # After a colon comes the argument of get_config, which may be a path or a URL itself.
    path = _value(arguments, at)
    path = path if re.match('[a-z0-9]+://', path) else path.partition(':')[0]
    if not as_path(os.path.expanduser(path)).is_file():
      near = difflib.get_close_matches(path, map(str, Path('configs').rglob('*.py')), n=1)
      hint = f'did you mean {near[0]}?' if near else 'give a file such as configs/quickstart.py'
      raise UserError(f'--config={path}: there is no such file; {hint}')


def _value(arguments: Sequence[str], at: int) -> str:
  """Returns the value of the flag at an index: what is after '=', or the next argument."""
  _, equals, value = arguments[at].partition('=')
  return value if equals else ''.join(arguments[at + 1:at + 2])


def _given_flag(name: str) -> str | None:
  """Returns the value of a flag on the command line, before flags are parsed; None if absent."""
  arguments = sys.argv[1:]
  values = [_value(arguments, at) for at, argument in enumerate(arguments)
            if re.fullmatch(rf'--?{name}(=.*)?', argument, re.DOTALL)]
  return values[-1] if values else None  # of a flag that is repeated, absl takes the last value


def _find_run(flag: str) -> Path | None:
  """Returns the run.json of the run that a flag on the command line names; None if there is none.

  The flag may also name the coprocessor/ in the directory of the run.
  """
  given = _given_flag(flag)
  if not given:
    return None
  place = as_path(os.path.expanduser(given))
  try:
    check_path(given)
    if (place / DESCRIPTION).is_file():
      place = place.absolute().parent
    return place / RUN_FILE if (place / RUN_FILE).is_file() else None
  except (UserError, StoreError) as error:  # flags are not parsed yet, and nothing is caught
    problem = f'--{flag}={given}: {error}'
    app.before_parsing(lambda: raise_problems([problem]))
    return None


def config_arguments() -> str:
  """Returns --config and its overrides as they were given, for a command that follows."""
  arguments, given = sys.argv[1:], []
  for at, argument in enumerate(arguments):
    if re.match(rf'--?(no)?{FLAG}([.=]|$)', argument):
      value = _value(arguments, at)
      # A switch has no value, so another flag follows it, or nothing.
      is_whole = '=' in argument or not value or re.match('--?[a-z]', value)
      given.append(argument if is_whole else f'{argument}={value}')
  return shlex.join(given)


def given_keys() -> frozenset[str]:
  """Returns the dotted paths of the keys that were given on the command line."""
  return frozenset(config_flags.get_override_values(flags.FLAGS[FLAG]))


def read_config(kind: type = Experiment, on_devices: bool = False) -> Any:
  """Returns --config and its overrides as a checked dataclass of `kind`.

  Args:
    kind: the dataclass, an Experiment or one that holds an `experiment`.
    on_devices: also check that the mesh fits the devices of this process.

  Raises:
    UserError: keys or values are wrong; the message has a line for each.
  """
  config, given = flags.FLAGS[FLAG].value, given_keys()
  prefix, section = _experiment_of(config)
  inside = {key.removeprefix(prefix) for key in given if key.startswith(prefix)}
  following: list[tuple[str, Any]] = []
  problems = problems_of(lambda: following.extend(_follow(section, inside)))
  for key, value in following:
    old = config
    for part in f'{prefix}{key}'.split('.'):
      old = old[part]
    if (dict(old) if isinstance(old, ConfigDict) else old) != value:
      logging.info('%s%s = %r follows from what is given, in place of %r', prefix, key, value, old)
      with config.unlocked():
        config.update_from_flattened_dict({f'{prefix}{key}': value})
  bound = []
  problems += problems_of(lambda: bound.append(bind(config, kind, _WHERE)))
  if on_devices:
    problems += problems_of(lambda: make_mesh(bind(section.mesh, MeshConfig, f'{_WHERE}.mesh')))
  raise_problems(problems)
  return bound[0]


def read_sizes(kind: type = Experiment) -> Any:
  """Returns `read_config`, for commands that need the sizes of a decoder and not its weights.

  A decoder_from that was given is opened for its sizes. That of a config file need not be on this
  machine, since the file has the sizes too.

  Raises:
    UserError: see `read_config` and `with_decoder`.
  """
  config, given = read_config(kind), given_keys()
  prefix, _ = _experiment_of(flags.FLAGS[FLAG].value)
  if f'{prefix}decoder_from' not in given:
    return config
  experiment = with_decoder(config.experiment if prefix else config,
                            given={key.removeprefix(prefix) for key in given})
  return dataclasses.replace(config, experiment=experiment) if prefix else experiment


def _follow(config: ConfigDict, given: set[str]) -> Iterator[tuple[str, Any]]:
  """Yields (key, value) of each key that follows from those which were given."""
  of_data = {key.partition('.')[2] for key in given if key.startswith('data.')}
  for key, value in with_given_source(config.data, of_data).items():
    yield f'data.{key}', value
  # A decoder that is pretrained here has an embedding for each piece of its vocabulary.
  if (of_data & {'vocabulary', 'vocabulary_size'} and 'decoder.vocab_size' not in given
      and not config.decoder_from and not config.data.vocabulary_path):
    yield 'decoder.vocab_size', (BYTE_VOCABULARY_SIZE if config.data.vocabulary == 'byte'
                                 else config.data.vocabulary_size)
  for name in ('pretraining', 'training'):
    settings = config[name]
    steps = settings.loop.num_steps
    # The number of microbatches must divide the batch.
    batch_size, most = settings.batch_size, settings.get('accumulation', 1)
    if f'{name}.batch_size' in given and f'{name}.accumulation' not in given and most > 1:
      fitting = [number for number in range(1, most + 1) if batch_size % number == 0]
      yield f'{name}.accumulation', max(fitting)
    # A warm-up that was meant for a longer run becomes a tenth of this one.
    if (f'{name}.loop.num_steps' in given and f'{name}.optimizer.warmup_steps' not in given
        and settings.optimizer.warmup_steps > steps):
      yield f'{name}.optimizer.warmup_steps', max(0, steps // 10)


def read_run(path: Path) -> ConfigDict:
  """Returns the config of a run, of a quickstart or of a study, from its run.json.

  Raises:
    UserError: the file is missing or damaged, or its job has no whole experiment.
  """
  try:
    saved = with_current_names(unseal(path.read_bytes(), path))
    job, config = saved['job'], dict(saved['config'])
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error}): name the run.json of a run') from error
  except UserError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is no run.json ({error!r}): name the run.json that a training wrote '
                    'to its --workdir, or a config file') from error
  if 'experiment' in config:
    return as_config(config)
  if 'training' not in config:
    raise UserError(f'{path} is of the job {job!r}, which reads only a part of the config: name '
                    'the run.json of a training, or a config file')
  # Training does not read the settings of pretraining, and does not save them.
  config.setdefault('pretraining', {**config['training'], 'multipliers': {}})
  # Bound first, so that keys which are newer than the run have their defaults.
  return as_config(bind(config, where=str(path)))


class _ConfigParser(ConfigFileFlagParser):
  """Reads a config file or a run.json, and refuses overrides of keys that it lacks."""

  def parse(self, path: str) -> ConfigDict:
    """See ConfigFileFlagParser.

    Raises:
      UserError: the file raises one, or overrides have keys that are unknown or values of another
        type; a line for each.
    """
    path = os.path.expanduser(path)
    if path.endswith('.json'):
      config = read_run(as_path(path))
    else:
      try:
        config = super().parse(path)
      except UserError as error:
        # ml_collections puts the error of the file, with a traceback, into another one.
        raise UserError(f'{path}: {error.__context__}') from None
    if isinstance(config, ConfigDict):
      values, problems = _read_overrides(config)
      if problems:
        raise_problems([*problems, *_problems_of_values(config, values),
                        'docs/config.md explains all keys, and launch/config.py prints those of a '
                        'config.'])
    return config


# How a value is written, by the type of the key's own value.
_PARSERS = {bool: ('True or False', flags.BooleanParser()),
            int: ('an integer', flags.IntegerParser()), float: ('a number', flags.FloatParser())}


def _read_overrides(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
  """Returns the values of overrides by key, and a message for each that cannot be one.

  An override has a fault where the config lacks its key, or has a value of another type there.
  """
  known, values, problems = list(_paths(config)), {}, []
  for argument in sys.argv[1:]:
    found = re.match(rf'--?(?:no)?{FLAG}\.([^=]+)(?:=(.*))?', argument, re.DOTALL)
    if not found or '[' in found[1]:  # an entry of a tuple, which ml_collections checks
      continue
    key, given = found.groups()
    if key not in known:
      near = nearest_key(key, known)
      hint = f' Did you mean {near!r}?' if near else ''
      problems.append(f'{_WHERE} has no key {key!r}.{hint}')
      continue
    old = config
    for part in key.split('.'):
      old = old[part]
    if given is None:  # --config.key and --noconfig.key are True and False
      continue
    if type(old) in _PARSERS:
      what, parser = _PARSERS[type(old)]
      try:
        values[key] = parser.parse(given)
      except (ValueError, TypeError):
        problems.append(f'{_WHERE}.{key}={given}: give {what}, such as {old!r}')
    elif isinstance(old, str):
      values[key] = given
  return values, problems


def _problems_of_values(config: ConfigDict, values: Mapping[str, Any]) -> list[str]:
  """Returns what is wrong with a config that has these values."""
  config = as_config(config)
  prefix, section = _experiment_of(config)
  with config.unlocked():
    config.update_from_flattened_dict(dict(values))
    section.update_from_flattened_dict(dict(_follow(section, {
        key.removeprefix(prefix) for key in values if key.startswith(prefix)})))
  return problems_of(lambda: bind(section, Experiment, f'{_WHERE}.{prefix}'.rstrip('.')))


def _experiment_of(config: ConfigDict) -> tuple[str, ConfigDict]:
  """Returns the prefix of the keys of an experiment, and its section. A study holds its own."""
  return ('experiment.', config.experiment) if 'experiment' in config else ('', config)


def _paths(config: Mapping[str, Any], path: str = '') -> Iterator[str]:
  for key in config:
    inside = f'{path}.{key}' if path else key
    yield inside
    if isinstance(config[key], ConfigDict | Mapping):
      yield from _paths(config[key], inside)


class _TupleParser(TupleParser):
  """Also reads names of files with commas or spaces, without quotes."""

  def parse(self, argument: Any) -> tuple:
    """See TupleParser."""
    try:
      values = super().parse(argument)
    except ValueError:
      # A tuple that is meant as one has brackets or quotes.
      if not isinstance(argument, str) or re.search(r'[()\[\]\'"]', argument):
        raise
      values = (argument,)
    # A text without quotes comes back as it is, also one with commas.
    return split_files(argument) if values == (argument,) and isinstance(argument, str) else values
