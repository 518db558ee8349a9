"""Every key of a config is explained, and docs/config.md is what the command writes."""

import dataclasses
import re

import pytest

from latent_deliberation.cli.config_reference import (
  CHOICES,
  format_reference,
  format_values,
  meanings_of,
  parse_docstring,
  sections_of,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind
from latent_deliberation.studies.study_config import ArmConfig, Study
from tests import finished
from tests.configs_test import leaves

PAGE = finished.ROOT / 'docs/config.md'
KINDS = sorted({kind for top in (Experiment, Study) for _, kind in sections_of(top)},
               key=lambda kind: kind.__name__)


@dataclasses.dataclass(frozen=True)
class Shape:
  """A shape. It has more sentences.

  Attributes:
    width, height: sizes in metres,
      from edge to edge: 'a'   or 'b'.
    colour: its colour; '' for none.

  Raises:
    UserError: never.
  """
  width: int
  height: int
  colour: str = ''


def test_parse_docstring():
  sentence, meanings = parse_docstring(Shape)
  assert sentence == 'A shape.'
  sizes = "sizes in metres, from edge to edge: 'a' or 'b'."
  assert meanings == {'width': sizes, 'height': sizes, 'colour': "its colour; '' for none."}


@pytest.mark.parametrize('old, new, message', [
    ('    colour: its', '    color: its', r"'colour'.*'color'"),
    ('    colour: its colour; \'\' for none.\n', '', "'colour'"),
    ('    colour: its', '    its', 'its colour')])
def test_field_without_line_is_an_error(old, new, message, monkeypatch):
  """A field without a line, a line without a field, or a line of another form raises."""
  monkeypatch.setattr(Shape, '__doc__', Shape.__doc__.replace(old, new))
  with pytest.raises(ValueError, match=f'Shape.*{message}'):
    meanings_of(Shape)


@pytest.mark.parametrize('kind', KINDS)
def test_every_field_has_a_line(kind):
  meanings = meanings_of(kind)
  for field in dataclasses.fields(kind):
    assert dataclasses.is_dataclass(field.type) or len(meanings[field.name].split()) > 1
  assert parse_docstring(kind)[0].endswith('.')


@pytest.mark.parametrize('kind', CHOICES)
def test_choices_are_those_that_are_allowed(kind):
  """Every listed value is accepted alone or refused for another key; any other value is refused."""
  experiment = finished.experiment()
  section = next(getattr(experiment, field.name) for field in dataclasses.fields(experiment)
                 if field.type is kind)
  for name, choices in CHOICES[kind].items():
    with pytest.raises(UserError, match=f"{name} = 'other'"):
      dataclasses.replace(section, **{name: 'other'})
    for choice in choices:
      try:
        dataclasses.replace(section, **{name: choice})
      except UserError as error:
        assert not re.search(rf'{name} = {choice!r}:.* one of [(\[]', str(error))


def test_page_is_what_the_command_writes():
  assert PAGE.read_text() == format_reference((Experiment, Study)), (
      'run python launch/config.py --reference=docs/config.md')


def test_page_has_every_key():
  page = PAGE.read_text()
  for kind in KINDS:
    for field in dataclasses.fields(kind):
      assert f'\n| `{field.name}' in page
  assert '| `batch_size` | required | int |' in page
  assert "| `remat` | `'none'` | `'none'`, " in page


def test_values_are_printed_with_their_meaning(monkeypatch):
  """Every key of a config is a line with its value, and sections have a title."""
  monkeypatch.setenv('COLUMNS', '150')
  config = finished.config_of('quickstart')
  printed = format_values(bind(config)).splitlines()
  lines = {line.split()[0]: line for line in printed if line and not line.startswith('#')}
  for key, value in leaves(config):
    assert f' {value!r}' in lines[key] or isinstance(value, tuple | list)
  assert max(map(len, printed)) <= 150
  assert 'batch' in lines['training.batch_size'].split('8', 1)[1]
  assert sum(line.startswith('# ') for line in printed) == len(list(sections_of(Experiment)))


def test_values_of_a_study():
  study = bind(finished.config_of('study/text'), Study)
  printed = format_values(study)
  for arm in study.arms:
    assert f'# arms.{arm}: {parse_docstring(ArmConfig)[0]}' in printed
  assert 'experiment.training.batch_size' in printed
