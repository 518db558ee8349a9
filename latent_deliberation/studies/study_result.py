"""The result of a study: arms by seeds, on the same questions or the same text.

Outcomes on questions come first, with their accuracies, losses, paired intervals and McNemar's
test. Then come the arms and the result, which are checked to fit together. study_report.py makes a
page of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import paired
from latent_deliberation.evaluation.paired import Estimate
from latent_deliberation.evaluation.perplexity import (
  CONTROLS,
  FROZEN,
  OWN,
  AheadNLL,
  check_paired,
  check_positions,
)


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """Outcomes of one arm with one seed on every question.

  Attributes:
    nll: float64 [items] nats of the whole true answer.
    correct: bool [items] whether every token of the true answer is the likeliest one.
  """
  nll: np.ndarray
  correct: np.ndarray

  def __post_init__(self):
    if self.nll.ndim != 1 or self.nll.shape != self.correct.shape:
      raise ValueError(
          f'nll has shape {self.nll.shape}, correct {self.correct.shape}: both must be [items]')
    if self.correct.dtype != bool:
      raise ValueError(f'correct is {self.correct.dtype}, expected bool')
    if not len(self.nll):
      raise ValueError('0 items: evaluate on at least 1 question')
    # NaN would spread to every mean.
    finite = np.isfinite(self.nll)
    if not finite.all():
      item = int(finite.argmin())
      raise UserError(f'the nll of item {item} is {self.nll[item]}. The weights or the computation '
                      'are broken: score an earlier checkpoint, or set computation.dtype = '
                      "'float32'")

  def select(self, chosen: np.ndarray) -> 'Outcomes':
    """Returns the outcomes on the questions where `chosen`, bool [items], is true."""
    return Outcomes(self.nll[chosen], self.correct[chosen])


@dataclasses.dataclass(frozen=True)
class ChainOutcomes(Outcomes):
  """Outcomes after chains of thought.

  Attributes:
    tokens: int [items] number of tokens of each chain.
  """
  tokens: np.ndarray


def accuracy(runs: Sequence[Outcomes], samples: int = 2000, seed: int = 0) -> Estimate:
  """Returns the fraction of questions answered right, with a 95% percentile interval.

  Args:
    runs: outcomes of an arm, one for each seed; a question counts with its mean over the seeds.
    samples: draws of the bootstrap (Efron 1979); memory is 16 bytes for each draw and item. Each
      draw takes as many questions as there are, with replacement. If all answers are equal, the
      interval has no width.
    seed: seed of the bootstrap.

  Raises:
    UserError: the runs have fewer than 2 items.
    ValueError: the runs have different numbers of items.
  """
  check_same_items({'runs': runs})
  return _estimate(_correct(runs), samples, seed)


def accuracy_difference(runs: Sequence[Outcomes], baseline_runs: Sequence[Outcomes],
                        samples: int = 2000, seed: int = 0) -> Estimate:
  """Returns the accuracy of an arm minus that of another, a fraction, with its 95% interval.

  A draw takes the same questions for both arms, so what makes a question hard for both cancels.
  The arms may have different numbers of seeds. Arguments and errors are those of `accuracy`.
  """
  check_same_items({'runs': runs, 'baseline_runs': baseline_runs})
  return _estimate(_correct(runs) - _correct(baseline_runs), samples, seed)


def nll(runs: Sequence[Outcomes], samples: int = 2000, seed: int = 0) -> Estimate:
  """Returns the mean nats of an answer, with its interval; see `accuracy`."""
  check_same_items({'runs': runs})
  return _estimate(_nats(runs), samples, seed)


def nll_difference(runs: Sequence[Outcomes], baseline_runs: Sequence[Outcomes],
                   samples: int = 2000, seed: int = 0) -> Estimate:
  """Returns mean nats of an answer, an arm minus another; see `accuracy_difference`."""
  check_same_items({'runs': runs, 'baseline_runs': baseline_runs})
  return _estimate(_nats(runs) - _nats(baseline_runs), samples, seed)


def mcnemar(one: Outcomes, other: Outcomes) -> tuple[int, int, float]:
  """Tests whether two runs are right equally often: McNemar's test, exact.

  If both are equally good, the first of the counts below is binomial(sum of the counts, 1/2).

  Returns: the number of questions that only `one` has right, the number that only `other` has
    right, and the two-sided p-value.

  Raises:
    ValueError: the two have different numbers of items.
  """
  check_same_items({'one': [one], 'other': [other]})
  return paired.mcnemar(one.correct, other.correct)


def check_same_items(arms: Mapping[str, Sequence[Outcomes]]) -> None:
  """Raises ValueError unless every arm has a run, and all runs have the same number of items."""
  for name, runs in arms.items():
    if not runs:
      raise ValueError(f'{name} has 0 runs: give the outcomes of at least 1 seed')
  first, reference = next((name, len(runs[0].nll)) for name, runs in arms.items())
  for name, runs in arms.items():
    for at, run in enumerate(runs):
      if len(run.nll) != reference:
        raise ValueError(
            f'run {at} of {name} has {len(run.nll)} items, run 0 of {first} has {reference}. '
            'Evaluate all on the same questions.')


def _correct(runs: Sequence[Outcomes]) -> np.ndarray:
  return np.mean([run.correct for run in runs], axis=0)


def _nats(runs: Sequence[Outcomes]) -> np.ndarray:
  return np.mean([run.nll for run in runs], axis=0)


def _estimate(values: np.ndarray, samples: int, seed: int) -> Estimate:
  if len(values) < 2:
    raise UserError(f'{len(values)} item, and an interval needs 2: raise questions.per_difficulty')
  return paired.estimate(values, samples, seed)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm of a study: its costs, and its scores with every seed.

  Attributes:
    kind: label for the reader, such as 'coprocessor'.
    trained: number of trained parameters.
    total: number of parameters in use.
    flops_per_token: operations of evaluation, for each predicted token.
    train_flops: operations of training, for one seed.
    seeds: seeds of training.
    seconds: wall-clock time of training and scoring, for each seed. The scoring includes all
      controls; that of the frozen decoder is left out.
    outcomes: answers to questions, for each seed; empty in a study of text.
    text_scores: scores on text, for each seed; empty in a study of questions.
    note: free sentence, such as whether the arm has the budget of the other arms.
  """
  kind: str
  trained: int
  total: int
  flops_per_token: float
  train_flops: float
  seeds: tuple[int, ...]
  seconds: tuple[float, ...]
  outcomes: tuple[Outcomes, ...] = ()
  text_scores: tuple[AheadNLL, ...] = ()
  note: str = ''

  def __post_init__(self):
    if not 0 < self.flops_per_token < math.inf or not 0 <= self.train_flops < math.inf:
      raise ValueError(f'flops_per_token = {self.flops_per_token}, train_flops = '
                       f'{self.train_flops}: must be finite, and the first above 0')
    if bool(self.outcomes) == bool(self.text_scores):
      raise ValueError(f'an arm has {len(self.outcomes)} outcomes and {len(self.text_scores)} '
                       'text_scores: give one of the two, for each seed')
    runs = len(self.outcomes) + len(self.text_scores)
    if not runs == len(self.seeds) == len(self.seconds):
      raise ValueError(f'an arm has {runs} runs, {len(self.seeds)} seeds and {len(self.seconds)} '
                       'seconds: give one of each for every seed')


@dataclasses.dataclass(frozen=True)
class StudyResult:
  """The measurements of a study.

  Attributes:
    name: title of the study.
    arms: arms by name, 'frozen' first. 'shuffled', 'zero' and 'mean' are controls of 'own'; those
      of another arm 'x' are 'x/shuffled', 'x/zero' and 'x/mean'.
    config: configuration of the study; values without a JSON form are written as str.
    git_commit: commit of the source tree.
    command: command that ran the study.
    machine: machine that ran the study, in words.
    seconds: wall-clock time of the whole study.
    difficulty: int [items] difficulty of each question, such as its number of hops; None if all
      questions are alike.
    positions: ahead positions of the table, from 1, increasing; None in a study of questions.
    diagnostics: rows of {'step': ..., name of a quantity: ...}, by arm, or by arm and seed.
  """
  name: str
  arms: Mapping[str, Arm]
  config: Mapping[str, Any]
  git_commit: str
  command: str
  machine: str
  seconds: float
  difficulty: np.ndarray | None = None
  positions: tuple[int, ...] | None = None
  diagnostics: Mapping[str, Sequence[Mapping[str, float]]] | None = None

  def __post_init__(self):
    if next(iter(self.arms), None) != FROZEN:
      raise ValueError(f'arms = {list(self.arms)}: the first must be {FROZEN!r}, which the others '
                       'are compared with')
    # A control belongs to an arm of the study.
    for name in self.arms:
      if (arm := controlled_arm(name)) is not None and arm not in self.arms:
        raise ValueError(f'{name!r} is a control of {arm!r}, which is not among the arms '
                         f'{list(self.arms)}. Name it after its arm, as in ARM/shuffled.')
    # All arms have scores on text, or all have answers to questions.
    of_text = [name for name, arm in self.arms.items() if arm.text_scores]
    if of_text and len(of_text) < len(self.arms):
      raise ValueError(f'of the arms {list(self.arms)} only {of_text} have scores on text. Report '
                       'them and the others as two studies.')
    if of_text:
      self._check_text()
    else:
      self._check_questions()

  def _check_questions(self):
    check_same_items({name: arm.outcomes for name, arm in self.arms.items()})
    items = len(self.arms[FROZEN].outcomes[0].nll)
    if self.positions is not None:
      raise ValueError(f'positions = {self.positions}, but the arms answered questions. Give None.')
    if self.difficulty is None:
      return
    if self.difficulty.shape != (items,) or self.difficulty.dtype.kind not in 'iu':
      raise ValueError(f'difficulty is {self.difficulty.dtype} {list(self.difficulty.shape)}, '
                       f'expected an integer for each of the {items} items')
    # Every difficulty gets an interval, and one item has none.
    levels, counts = np.unique(self.difficulty, return_counts=True)
    if counts.min() < 2:
      raise ValueError(f'difficulty {levels[counts.argmin()]} has 1 item, and an interval needs 2: '
                       'evaluate on more questions')

  def _check_text(self):
    check_paired({f'{name}, seed {seed}': run for name, arm in self.arms.items()
                  for seed, run in zip(arm.seeds, arm.text_scores, strict=True)})
    if self.difficulty is not None:
      raise ValueError('difficulty is given, but the arms were scored on text. Give None.')
    check_positions(self.positions, self.arms[FROZEN].text_scores[0].count.shape[1])


def controlled_arm(name: str) -> str | None:
  """Returns the arm that the named arm is a control of, or None if it is no control."""
  arm, _, control = name.rpartition('/')
  return (arm or OWN) if control in CONTROLS else None


def control_name(arm: str, control: str) -> str:
  """Returns the name of a control of an arm; the inverse of `controlled_arm`."""
  return control if arm == OWN else f'{arm}/{control}'


def count_examples(summary: Mapping[str, Any], row: str) -> int:
  """Returns the number of independent texts or questions in a row of a study's tables.

  Args:
    summary: result of `summarise_study`, or the content of a results.json.
    row: ahead position, difficulty or 'overall'.
  """
  if 'by_position' in summary:
    return summary.get('reached', {}).get(row, summary['texts'])  # older results have no 'reached'
  return summary['items_by_difficulty'].get(row, summary['items'])
