"""How many steps of an expert fit the minutes, by what its whole command costs.

The unit of every cost is a training step of the coprocessor. So one step that is timed gives the
minutes of all.
"""

import bisect
import math
from collections.abc import Sequence, Set

import numpy as np
from absl import logging

from latent_deliberation.data.loading import validation_texts
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.data.text_sizes import PASSES, Choices, with_choices
from latent_deliberation.experiment import Experiment
from latent_deliberation.experts.measuring import routed_batches
from latent_deliberation.progress import format_duration

FEWEST_STEPS = 20  # fewer teach nothing
FEWEST_SCORED = 24  # texts; an interval needs 20
# In training steps, as measured with Gemma 3 270M and SmolLM2-135M on two cores: 4 rows of 256
# tokens in every batch, 32 traces of a row in training and 16 in scores. A step took all rows at
# once then. Scores and routing were measured before they shared a prefill and left out the entropy,
# and take a little less now.
ONE_BY_ONE = 0.91  # a step that takes one row at a time, in steps that take all (docs/log.md)
CONTROL_STEP = 0.85  # a step of the constant soft tokens
VALIDATION = 1.15 / ONE_BY_ONE  # a batch that a training validates on
SCORES = 1.9 / ONE_BY_ONE  # a batch of rows, scored by the expert and all its controls
ROUTING = 0.46 / ONE_BY_ONE  # a batch of rows, for centroid and gain head
# Later loading and compiling, in times of what came before the first timed step. An estimate: the
# decoder is loaded three times more, and eight smaller programs are compiled.
COMPILATIONS = 2.5

Text = tuple[Experiment, PackedRows]  # how held-out text is scored, and its rows


def training_cost(experiment: Experiment, steps: int) -> float:
  """Returns the cost of both trainings, in training steps."""
  loop, config = experiment.training.loop, experiment.evaluation
  validations = math.ceil(steps / loop.eval_every) * config.eval_batches * _share(experiment)
  return steps * (1 + CONTROL_STEP) + 2 * VALIDATION * validations


def scoring_cost(texts: Sequence[Text]) -> float:
  """Returns the cost of scores and routing on these texts, in training steps."""
  return sum(
      _share(experiment) * (SCORES * (experiment.evaluation.num_texts
                                      // experiment.evaluation.batch_size)
                            + ROUTING * len(routed_batches(experiment.evaluation, len(rows))))
      for experiment, rows in texts)


def _share(experiment: Experiment) -> float:
  """Returns the rows of a batch that is scored, for each row of a training step."""
  return experiment.evaluation.batch_size / experiment.training.batch_size


def with_most_texts(experiment: Experiment, most: int) -> Experiment:
  """Returns the experiment with `evaluation.num_texts` of at most `most`, in whole batches."""
  config = experiment.evaluation
  number = min(config.num_texts, max(1, most // config.batch_size) * config.batch_size)
  return with_choices(experiment, {'evaluation.num_texts': number})


def choose_pace(experiment: Experiment, texts: Sequence[Text], num_rows: int, given: Set[str], *,
                minutes: float, seconds_left: float, step_seconds: float) -> Choices:
  """Returns the number of steps that fits, and what follows from it; warns if the fewest do not.

  Args:
    experiment: the training.
    texts: the expert's own text and general text.
    num_rows: rows to train on.
    given: dotted paths of the config's keys that the user gave, which are left alone.
    minutes: time that was asked for.
    seconds_left: what is left of it for trainings and scores.
    step_seconds: time of a training step.
  """
  left = seconds_left / step_seconds
  most = max(1, PASSES * num_rows // experiment.training.batch_size)
  # The card shows no validation, so the one after the last step is enough.
  choices: Choices = {'evaluation.eval_batches': 1, 'training.loop.eval_every': most}
  fewer = _fewer_texts(texts, left / 2)
  if fewer < experiment.evaluation.num_texts and 'evaluation.num_texts' not in given:
    logging.info('evaluation.num_texts = %d in place of %d, since scores would take more than half '
                 'of the time: intervals are wider', fewer, experiment.evaluation.num_texts)
    # With the size of batches that it is a multiple of.
    choices |= {'evaluation.num_texts': fewer,
                'evaluation.batch_size': experiment.evaluation.batch_size}
    texts = [(with_most_texts(each, fewer), rows) for each, rows in texts]
  planned = with_choices(experiment, {key: value for key, value in choices.items()
                                      if key not in given})

  def cost(steps: int) -> float:
    return training_cost(planned, steps) + scoring_cost(texts)

  fitting = bisect.bisect_right(range(1, most + 1), left, key=cost)
  steps = max(fitting, min(FEWEST_STEPS, most))
  logging.info('%.2f s a step: %d steps for %g minutes%s', step_seconds, steps, minutes,
               f'; more than {PASSES} passes over the text gain little' if steps == most else '')
  if fitting < steps:
    logging.warning(
        'This takes about %s, and not %g minutes: %d steps are the fewest that teach something, '
        'and scores take as long as %d more. Lower evaluation.num_texts or '
        'deliberation.num_traces for less, in another --workdir',
        format_duration(60 * minutes + (cost(steps) - left) * step_seconds), minutes, steps,
        scoring_cost(texts))
  warmup = min(experiment.training.optimizer.warmup_steps, steps // 10)
  choices |= {'training.loop.num_steps': steps, 'training.loop.eval_every': steps,
              'training.optimizer.warmup_steps': warmup}
  return {key: value for key, value in choices.items() if key not in given}


def _fewer_texts(texts: Sequence[Text], most_cost: float) -> int:
  """Returns how many texts to score: half as often as they cost too much, while enough stay."""
  config = texts[0][0].evaluation
  number = config.num_texts
  while scoring_cost([(with_most_texts(each, number), rows) for each, rows in texts]) > most_cost:
    half = number // 2 // config.batch_size * config.batch_size
    changed = [(with_most_texts(each, half), rows) for each, rows in texts
               if each.evaluation.num_texts > half]
    if not half or any(_count_texts(*text) < FEWEST_SCORED for text in changed):
      break
    number = half
  return number


def _count_texts(experiment: Experiment, rows: PackedRows) -> int:
  config = experiment.evaluation
  return len(np.unique(validation_texts(rows, config.num_texts, config.rows_per_text)))
