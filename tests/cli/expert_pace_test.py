"""How many steps fit the minutes, on the config of Gemma 3 270M."""

import pytest

from latent_deliberation.cli import expert_pace
from latent_deliberation.cli.expert_pace import (
  choose_pace,
  scoring_cost,
  training_cost,
  with_most_texts,
)
from latent_deliberation.data.text_sizes import with_choices
from latent_deliberation.experiment import bind
from tests import finished

OWN, GENERAL = range(311), range(192)  # held-out rows; only their number counts
ALL = {'training.loop.num_steps', 'training.loop.eval_every', 'training.optimizer.warmup_steps',
       'evaluation.eval_batches'}


@pytest.fixture
def experiment():
  return bind(finished.config_of('gemma3_270m'))


def pace(experiment, left, rows=2800, given=frozenset(), general=None):
  """Returns what is chosen where `left` training steps are left, of a second each."""
  texts = [(experiment, OWN), (general or experiment, GENERAL)]
  return choose_pace(experiment, texts, rows, given, minutes=left / 60, seconds_left=left,
                     step_seconds=1.0)


def test_costs_are_those_of_the_analysis(experiment):
  """In training steps: 16 batches of either text are scored and 32 routed; two validations."""
  assert scoring_cost([(experiment, OWN), (experiment, GENERAL)]) == pytest.approx(
      2 * (16 * 1.9 + 32 * 0.46) / 0.91)
  shown = with_choices(experiment, {'training.loop.eval_every': 10, 'evaluation.eval_batches': 1})
  assert training_cost(shown, 20) == pytest.approx(20 * 1.85 + 2 * 2 * 1.15 / 0.91)
  # Rows are what costs: batches of twice the rows cost twice as much.
  larger = with_choices(experiment, {'evaluation.batch_size': 8})
  assert scoring_cost([(larger, OWN)]) == pytest.approx(scoring_cost([(experiment, OWN)]))


@pytest.mark.parametrize('left', [250, 251, 300, 1000])
def test_as_many_steps_as_fit(experiment, left):
  """One more would not fit; training validates once, on one batch."""
  chosen = pace(experiment, left)
  assert chosen.keys() == ALL
  steps = chosen['training.loop.num_steps']
  planned = with_choices(experiment, chosen)
  scoring = scoring_cost([(experiment, OWN), (experiment, GENERAL)])
  assert training_cost(planned, steps) + scoring <= left
  assert left < training_cost(planned, steps) + 1.85 + scoring
  assert chosen['training.loop.eval_every'] == steps and chosen['evaluation.eval_batches'] == 1
  assert chosen['training.optimizer.warmup_steps'] == min(20, steps // 10)


def test_small_text_is_read_four_times(experiment):
  assert pace(experiment, 1e5, rows=100)['training.loop.num_steps'] == 100
  assert pace(experiment, 1, rows=12)['training.loop.num_steps'] == 12


def test_scores_take_half_of_the_time_at_most(experiment):
  """Unless few texts would be left, or the user said how many to score."""
  for left, number in ((199, None), (197, 32), (10, 32)):
    assert pace(experiment, left).get('evaluation.num_texts') == number
  assert 'evaluation.num_texts' not in pace(experiment, 10, given={'evaluation.num_texts'})
  # General text that is short already is left as it is.
  small = with_choices(experiment, {'evaluation.num_texts': 12})
  assert pace(experiment, 50, general=small)['evaluation.num_texts'] == 32
  middle = with_choices(experiment, {'evaluation.num_texts': 40, 'evaluation.rows_per_text': 20})
  assert 'evaluation.num_texts' not in pace(experiment, 50, general=middle)
  assert with_most_texts(middle, 34).evaluation.num_texts == 32
  assert with_most_texts(small, 34) == small
  tiny = with_choices(experiment, {'evaluation.num_texts': 8, 'evaluation.batch_size': 8})
  assert 'evaluation.num_texts' not in pace(tiny, 1)


def test_fewer_texts_are_whole_batches(experiment):
  """Also for a config with larger batches, which the rows of a text have made smaller."""
  fitted = with_choices(experiment, {'evaluation.num_texts': 56, 'evaluation.batch_size': 8,
                                     'evaluation.rows_per_text': 1})
  chosen = pace(fitted, 10)
  assert chosen['evaluation.num_texts'] == 24
  config = with_choices(experiment, {'evaluation.batch_size': 16})
  assert with_choices(config, chosen).evaluation.batch_size == 8


def test_time_that_is_too_short_is_told(experiment, monkeypatch):
  """Before the training: how long it takes, and what to lower."""
  said = []
  monkeypatch.setattr(expert_pace.logging, 'warning', lambda text, *args: said.append(text % args))
  assert pace(experiment, 150)['training.loop.num_steps'] > 20 and not said
  for left in (60, -30):
    assert pace(experiment, left)['training.loop.num_steps'] == 20
  # 20 steps, two validations, and half of the scores.
  seconds = round(20 * 1.85 + (2 * 1.15 + 16 * 1.9 + 2 * 16 * 0.46) / 0.91)
  assert said[0].startswith(f'This takes about 1m{seconds - 60}s, and not 1 minutes: 20 steps')
  assert 'evaluation.num_texts or deliberation.num_traces' in said[0]


def test_what_was_given_is_left_alone(experiment):
  given = {'training.loop.eval_every', 'evaluation.eval_batches', 'training.optimizer.warmup_steps'}
  chosen = pace(experiment, 300, given=given)
  assert chosen.keys() == {'training.loop.num_steps'}
  assert chosen['training.loop.num_steps'] < pace(experiment, 300)['training.loop.num_steps']
