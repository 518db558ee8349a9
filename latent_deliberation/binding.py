"""Typed values from config files and their flags, and the configs that they are shown as."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from latent_deliberation.experiment import Experiment


def as_config(experiment: Any) -> ConfigDict:
  """Every key of an experiment, or a study, with its value, locked, for flags to override."""

  def fill(tree: Mapping[str, Any]) -> ConfigDict:
    # A bare None could not be overridden by a flag; all our optional values are floats. Keys stay
    # in order, since a report has a study's arms as they were listed.
    return ConfigDict({key: fill(value) if isinstance(value, Mapping)
                       else config_dict.placeholder(float) if value is None else value
                       for key, value in tree.items()}, sort_keys=False)

  return fill(dataclasses.asdict(experiment)).lock()


def defaults_of(kind: type) -> dict[str, Any]:
  """The defaults of a dataclass, as nested dicts without the keys that have none."""
  defaults = {}
  for field in dataclasses.fields(kind):
    if field.default is not dataclasses.MISSING:
      value = field.default
      defaults[field.name] = (
          dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
    elif dataclasses.is_dataclass(field.type):
      defaults[field.name] = defaults_of(field.type)
  return defaults


def bind(config: Mapping[str, Any], kind: type = Experiment, where: str = 'config') -> Any:
  """A frozen dataclass of `kind` from a nested mapping such as a ConfigDict.

  Raises:
    ValueError: a key is unknown (the nearest known one is suggested) or missing, or a value is not
      allowed; names the key by its dotted path.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in config:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'known keys: {sorted(fields)}'
      raise ValueError(f'{where}.{key} is not a key of this project: {hint}')
  missing = sorted(name for name, field in fields.items() if name not in config
                   and field.default is dataclasses.MISSING
                   and field.default_factory is dataclasses.MISSING)
  if missing:
    raise ValueError(f'{where} has no {missing}: give a value, as configs/quickstart.py does')
  values = {}
  for key in config:
    value, field = config[key], fields[key]
    if dataclasses.is_dataclass(field.type):
      value = bind(value, field.type, f'{where}.{key}')
    elif isinstance(value, Mapping) or hasattr(value, 'to_dict'):
      value = {name: value[name] for name in value}
    values[key] = value
  try:
    return kind(**values)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
