"""Sums: does a coprocessor carry what has to be known before the first digit is written?

  python launch/study.py --config=configs/study/arithmetic.py --workdir=runs/arithmetic

Answers are written as usual, so their first digit depends on every carry. Decoder and arms are
those of hops.py:quick; an answer counts where all of its digits are right.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from latent_deliberation.data.config import DataConfig
from latent_deliberation.data.synthetic.arithmetic import Arithmetic
from latent_deliberation.jobs.experiment import as_config, bind
from latent_deliberation.jobs.study_config import Study

HOPS = runpy.run_path(str(Path(__file__).with_name('hops.py')))
QUESTIONS = 14  # of a training document
TASK = Arithmetic('+', digits=3, reverse=False, skew=0.3)


def get_config():
  """A coprocessor and constant soft tokens beside the frozen decoder."""
  study = bind(HOPS['get_config']('quick'), Study)
  start, answer = study.experiment, TASK.digits + 2  # a carry and the sign that ends it
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='arithmetic', vocabulary='byte', documents=40_000,
          options={'digits': TASK.digits, 'reverse': TASK.reverse, 'skew': TASK.skew},
          questions=QUESTIONS, length=128, validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=3000)),
      training=replace(start.training, loop=replace(start.training.loop, num_steps=1500)),
      deliberation=replace(start.deliberation, num_ahead=answer, num_traces=QUESTIONS,
                           anchor_tokens=HOPS['ids'](TASK.anchors)),
      evaluation=replace(start.evaluation, num_ahead=answer, num_traces=QUESTIONS))
  return as_config(replace(study, name='sums', experiment=experiment))
