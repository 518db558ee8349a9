"""The errors that are meant for people. Every other exception is a bug or bad luck."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class UserError(ValueError):
  """A request that cannot be met.

  The message names the thing, its value and the remedy, in that order. Launch scripts print it
  without a traceback. Every other exception keeps its traceback.
  """


class MissingError(UserError):
  """A file, directory or data set that was named does not exist."""


def check_integer(name: str, value: Any, least: int, most: int = 2**31 - 1,
                  otherwise: str = '') -> None:
  """Raises UserError unless a value is an integer from `least` to `most`.

  Args:
    otherwise: what to give for no number at all, such as ', or None for all'.
  """
  try:
    fits = not isinstance(value, bool) and least <= operator.index(value) <= most
  except TypeError:
    fits = False
  if not fits:
    raise UserError(f'{name} = {value!r}: give an integer from {least} to {most}{otherwise}')


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
  """Raises UserError unless a value is a finite number from `least` to `most`."""
  try:
    fits = not isinstance(value, bool) and least <= value <= most and math.isfinite(value)
  except (TypeError, OverflowError):  # an integer beyond all floats
    fits = False
  if not fits:
    limit = f'from {least} to {most}' if math.isfinite(most) else f'of {least} or more'
    raise UserError(f'{name} = {value!r}: give a finite number {limit}')


def raise_problems(problems: Iterable[str]) -> None:
  """Raises one UserError with all of these messages, a line each; none of them raises nothing."""
  lines = list(problems)
  if lines:
    raise UserError('\n'.join(lines))


def problems_of(check: Callable[[], Any]) -> list[str]:
  """Returns the message of a check that fails with a UserError, or [] if it passes."""
  try:
    check()
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
