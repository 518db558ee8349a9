"""Flags of launch scripts, checked as they are parsed."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from latent_deliberation.experiment import Experiment, bind
from latent_deliberation.sharding import MeshConfig

# --help of a launch script shows the flags that are defined through this module as its own.
flags.disclaim_key_flags()

CONFIG_HELP = 'Config file. Override any key of it, as in --config.training.batch_size=16.'


def define_config(launch_script: str, default: str | None = None) -> None:
  """Defines --config; a default is a path relative to the root of the source tree."""
  root = Path(launch_script).resolve().parents[1]
  config_flags.DEFINE_config_file(
      'config', str(root / default) if default else None, CONFIG_HELP, lock_config=True)
  if default is None:
    flags.mark_flag_as_required('config')


def define_directory(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag that names a directory; required where there is no default."""
  flag = flags.DEFINE_string(name, default, meaning, required=default is None)
  flags.register_validator(name, _check_directory)
  return flag


def define_json(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag that names a .json to write, in a directory that is there.

  It is required where there is no default.
  """
  flag = flags.DEFINE_string(name, default, meaning, required=default is None)
  flags.register_validator(name, _check_json)
  return flag


def define_choice(name: str, choices: Sequence[str], meaning: str,
                  required: bool = True) -> flags.FlagHolder:
  """Defines a flag with one of some values; the first is the default, or None where it may be."""
  return flags.DEFINE_enum(name, choices[0] if required else None, choices, meaning)


def define_count(name: str, default: int, meaning: str) -> flags.FlagHolder:
  """Defines a flag that is an integer of at least 1."""
  return flags.DEFINE_integer(name, default, meaning, lower_bound=1)


def define_switch(name: str, meaning: str) -> flags.FlagHolder:
  """Defines a flag that is off where it is not given."""
  return flags.DEFINE_bool(name, False, meaning)


def define_text(name: str, default: str | None, meaning: str) -> flags.FlagHolder:
  """Defines a flag with any text; required where the default is None."""
  return flags.DEFINE_string(name, default, meaning, required=default is None)


def define_texts(name: str, meaning: str) -> flags.FlagHolder:
  """Defines a flag that may be given several times; a list of texts, empty by default."""
  return flags.DEFINE_multi_string(name, [], meaning)


def define_number(name: str, default: int | float, meaning: str) -> flags.FlagHolder:
  """Defines a flag with a number of the kind of its default."""
  define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
  return define(name, default, meaning)


def define_numbers(name: str, default: Sequence[int], meaning: str) -> flags.FlagHolder:
  """Defines a flag with an integer that may be given several times."""
  return flags.DEFINE_multi_integer(name, list(default), meaning)


def _check_directory(path: str | None) -> bool:
  if path and ':/' in path:
    raise flags.ValidationError('it is a URL, and must be a path: mount the bucket (gcsfuse, for '
                                'instance) and give the path under the mount.')
  if path and Path(path).exists() and not Path(path).is_dir():
    raise flags.ValidationError('it is a file, and must be a directory: give another path.')
  return True


def _check_json(path: str | None) -> bool:
  # Beside it, a picture or a table may have its name with another ending.
  if path is not None and (
      not path.endswith('.json') or not Path(path).absolute().parent.is_dir()
      or Path(path).is_dir()):
    raise flags.ValidationError('it must be a file in a directory that exists, and end in .json: '
                                'give another path.')
  return True


def experiment_from_flags() -> Experiment:
  """The experiment that --config and its overrides describe, checked."""
  return config_from_flags(Experiment)


def config_from_flags(kind: type) -> Any:
  """What --config and its overrides describe, as a dataclass of `kind`, checked."""
  return bind(flags.FLAGS.config, kind)


def read_mesh(text: str) -> MeshConfig:
  """A mesh from 'data=1,fsdp=256,tensor=1'; axes that are left out have the default size.

  Raises:
    ValueError: it names an axis that there is not, or a size that is no integer.
  """
  names = [field.name for field in dataclasses.fields(MeshConfig)]
  sizes = {}
  for part in text.split(','):
    name, _, size = part.partition('=')
    if name not in names or not re.fullmatch(r'-1|\d+', size) or name in sizes:
      raise ValueError(f'--mesh={text}: {part!r} must be AXIS=SIZE, each of {names} once at most, '
                       'such as data=16,fsdp=16')
    sizes[name] = int(size)
  return MeshConfig(**sizes)


def read_rules(text: str) -> dict[str, tuple[str, ...]]:
  """Changes of the rules from 'embed=fsdp+tensor,vocab=': logical axis = mesh axes.

  Raises:
    ValueError: a part is of another form.
  """
  rules = {}
  for part in text.split(','):
    name, equals, axes = part.partition('=')
    if not name or not equals or name in rules:
      raise ValueError(f'--rules={text}: {part!r} must be LOGICAL_AXIS=MESH_AXIS+MESH_AXIS, each '
                       'logical axis once, such as embed=fsdp+tensor,vocab=')
    rules[name] = tuple(axes.split('+')) if axes else ()
  return rules
