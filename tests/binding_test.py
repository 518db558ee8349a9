"""A config becomes typed values, or an error that names the key."""

import dataclasses
import re

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind, defaults_of
from tests import finished


def test_an_unknown_key_is_named_with_the_nearest_known_one():
  raw = finished.config_of('tiny').to_dict()
  raw['training']['optimizer']['learning_rat'] = raw['training']['optimizer'].pop('learning_rate')
  with pytest.raises(UserError, match=re.escape(
      "config.training.optimizer.learning_rat is not a key of this project: did you mean "
      "'learning_rate'?")):
    bind(raw)


def test_an_unknown_key_like_no_other_is_shown_the_known_ones():
  with pytest.raises(UserError, match=r"config.zzz is not .* known keys: \['computation', 'data'"):
    bind(finished.config_of('tiny').to_dict() | {'zzz': 1})


def test_a_missing_key_is_named():
  raw = finished.config_of('tiny').to_dict()
  del raw['decoder']['head_dim']
  with pytest.raises(UserError, match=r"config.decoder has no \['head_dim'\]: give a value"):
    bind(raw)


@dataclasses.dataclass(frozen=True)
class Part:
  size: int
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
  part: Part
  other: Part = Part(3, 2.0)


def test_a_section_has_the_defaults_of_its_place_or_else_of_its_class():
  assert defaults_of(Whole) == {'part': {'scale': 1.0}, 'other': {'size': 3, 'scale': 2.0}}


def test_defaults_are_those_of_every_key_that_has_one():
  defaults = defaults_of(Experiment)
  assert defaults['training']['row_range_percent'] == (0, 100) and defaults['data']['options'] == {}
  assert defaults['computation']['remat'] == 'none' and 'batch_size' not in defaults['training']
