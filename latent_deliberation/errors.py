"""The errors that are meant for people. Every other exception is a bug or bad luck."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class UserError(ValueError):
  """A request that cannot be met.

  The message names the thing, its value and the remedy, in that order. Launch scripts print it
  without a traceback. Every other exception keeps its traceback.
  """


class StoreError(OSError):
  """An object store that does not do what it is asked. The message is for people, as above."""


class UnknownSizesError(UserError):
  """A Google checkpoint has sizes that no preset has: a TransformerConfig must say the rest."""


class MissingError(UserError):
  """A file, directory or data set that was named does not exist."""


MOST = 2**31 - 1  # a bound for numbers that have no other one


def check_integer(name: str, value: Any, least: int, most: int = MOST,
                  otherwise: str = '') -> None:
  """Raises UserError unless a value is an integer from `least` to `most`.

  Args:
    otherwise: what to give for no number at all, such as ', or None for all'.
  """
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None or not least <= number <= most:
    # A bound that nobody meets is left out.
    limit = f'from {least} to {most}' if most < MOST or (number or 0) > most else (
        f'of {least} or more')
    raise UserError(f'{name} = {value!r}: give an integer {limit}{otherwise}')


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
  """Raises UserError unless a value is a finite number from `least` to `most`."""
  try:
    fits = not isinstance(value, bool) and least <= value <= most and math.isfinite(value)
  except (TypeError, OverflowError):  # an integer beyond all floats
    fits = False
  if not fits:
    limit = f'from {least} to {most}' if math.isfinite(most) else f'of {least} or more'
    raise UserError(f'{name} = {value!r}: give a finite number {limit}')


def check_types(section: Any) -> None:
  """Raises UserError unless each key of a dataclass has a value of its type, with a line for each.

  An integer of 64 bits is a number, too, and a list is a tuple.
  """
  raise_problems(filter(None, (
      problem_of_type(field.name, getattr(section, field.name), field.type)
      for field in dataclasses.fields(section))))


def problem_of_type(name: str, value: Any, kind: Any) -> str:
  """Returns what to give for a key whose value has not the type of an annotation, or ''."""
  return '' if _has_type(value, kind) else f'{name} = {value!r:.80}: give {_describe(kind)}'


def _has_type(value: Any, kind: Any) -> bool:
  """Whether a value has the type of an annotation; see `check_types`."""
  origin, inside = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(_has_type(value, each) for each in inside)
  if origin is tuple:
    return isinstance(value, tuple | list) and all(_has_type(each, inside[0]) for each in value)
  if origin is Mapping:
    return isinstance(value, Mapping) and all(
        inside[1] is Any or _has_type(each, inside[1]) for each in value.values())
  if kind in (int, float) and isinstance(value, int):
    return not isinstance(value, bool) and abs(value) < 2**63
  return isinstance(value, kind)


def _describe(kind: Any) -> str:
  """Returns what to give for an annotation, such as 'a number or None'."""
  origin, inside = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return ' or '.join(map(_describe, inside))
  if origin is tuple:
    return f'a tuple, with {_describe(inside[0])} in each place'
  if origin is Mapping:
    return 'a mapping' if inside[1] is Any else f'a mapping to {_describe(inside[1])} each'
  return {bool: 'True or False', int: 'an integer of 64 bits', float: 'a number',
          str: 'a text', types.NoneType: 'None'}.get(kind, f'a {kind.__name__}')


def raise_problems(problems: Iterable[str]) -> None:
  """Raises one UserError with all of these messages, a line each; none of them raises nothing."""
  lines = list(problems)
  if lines:
    raise UserError('\n'.join(lines))


def problems_of(check: Callable[..., Any], *arguments: Any) -> list[str]:
  """Returns the message of a check that fails with a UserError, or [] if it passes."""
  try:
    check(*arguments)
  except UserError as error:
    return [str(error)]
  return []


def differences(saved: Mapping[str, Any], current: Mapping[str, Any],
                prefix: str = '') -> list[str]:
  """Returns a line '  KEY: X saved, Y now' for each key whose values differ, in sorted order.

  Args:
    saved, current: values by key. One of them may lack a key; its line then says '(nothing)'.
    prefix: text to put before each key.
  """
  def show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else '(nothing)'

  return [f'  {prefix}{key}: {show(saved, key)} saved, {show(current, key)} now'
          for key in sorted(saved.keys() | current.keys())
          if key not in saved or key not in current or saved[key] != current[key]]
