"""Text that the decoder has read, or has not: which should its coprocessor train on?

  python launch/study.py --config=configs/study/unread.py --workdir=runs/unread

The quickstart's decoder reads one half of the text three times, and so knows it. One coprocessor
trains on that half, another on the other half. Both are scored on held-out text. The controls,
constant soft tokens and the finetuned decoder, train on the other half.
"""

import dataclasses

from configs import quickstart
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, Study

READ, UNREAD = (0, 50), (50, 100)  # percent of the rows
STEPS = 1400  # of the decoder's training


def get_config():
  """Returns the study: a coprocessor on either half of the text, and two controls."""
  experiment = bind(quickstart.get_config())
  start = experiment.pretraining
  experiment = dataclasses.replace(
      experiment,
      pretraining=dataclasses.replace(
          start, row_range_percent=READ,
          loop=dataclasses.replace(start.loop, num_steps=STEPS, eval_every=200, save_every=350)),
      evaluation=dataclasses.replace(experiment.evaluation, num_texts=512))
  unread = {'training': {'row_range_percent': UNREAD}}
  return as_config(Study(
      name='text that the decoder has read', experiment=experiment,
      arms={
          'read': ArmConfig(changes={'training': {'row_range_percent': READ}}),
          'unread': ArmConfig(changes=unread),
          'constant': ArmConfig(changes={**unread, 'deliberation': {'trainable': 'constant'}}),
          'finetuned': ArmConfig('finetuned', unread)}))
