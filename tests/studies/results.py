"""Small studies with known outcomes."""

import numpy as np

from latent_deliberation.evaluation.perplexity import AheadNLL
from latent_deliberation.studies.study_result import Arm, Outcomes, StudyResult

ITEMS = 40
DIFFICULTY = np.arange(ITEMS) % 2 + 1
COUNT = np.ones((24, 4), int)


def answer(right: float, nll: float = 2.0) -> Outcomes:
  """Outcomes in which the first items, a fraction `right`, are correct."""
  return Outcomes(np.full(ITEMS, nll), np.arange(ITEMS) < right * ITEMS)


def read(nll: float) -> AheadNLL:
  """Scores of 24 texts, of so many nats a token on average at each of 4 positions."""
  return AheadNLL(nll + np.tile(np.linspace(-0.1, 0.1, 24).reshape(6, 4), (4, 1)), COUNT)


def make_arm(*runs: Outcomes | AheadNLL, **changes) -> Arm:
  field = 'outcomes' if isinstance(runs[0], Outcomes) else 'text_scores'
  return Arm(**{
    'kind': 'coprocessor', 'trained': 1234567, 'total': 7654321, 'flops_per_token': 3e6,
    'train_flops': 1e12, 'seeds': tuple(range(len(runs))), 'seconds': (61.0,) * len(runs),
    field: runs, **changes})


def questions(**changes) -> StudyResult:
  """Own latents answer 60 and 70%, those of another example 20%, the frozen decoder 20%."""
  return StudyResult(**{
    'name': 'pointer_chasing',
    'arms': {
      'frozen': make_arm(answer(0.2), kind='decoder', trained=0, flops_per_token=2e6),
      'own': make_arm(answer(0.6, 1.0), answer(0.7, 1.2), note='same steps as constant'),
      'shuffled': make_arm(answer(0.2, 2.5), answer(0.2, 2.5), kind='control'),
      'constant': make_arm(answer(0.3), answer(0.3), kind='soft tokens')},
    'difficulty': DIFFICULTY, 'config': {'seed': 3}, 'git_commit': 'abc',
    'command': 'python launch/study.py', 'machine': '2 cores', 'seconds': 100.0, **changes})


def texts(**changes) -> StudyResult:
  """Own latents lower the loss by 0.1 nats, those of another text raise it by 0.1."""
  return questions(**{
    'name': 'prose', 'difficulty': None, 'positions': (1, 4),
    'arms': {'frozen': make_arm(read(2.0)), 'own': make_arm(read(1.85), read(1.95)),
             'shuffled': make_arm(read(2.1), read(2.1))}, **changes})
