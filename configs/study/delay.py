"""Latents that come late: how much of their gain does training for the delay recover?

  python launch/study.py --config=configs/study/delay.py --workdir=runs/delay
  python launch/study.py --config=configs/study/delay.py --workdir=runs/delay \\
      --config.experiment.evaluation.delay=1 --overwrite

The second command scores the same trained arms with latents that come one token late; results.json
is then about that delay. One arm trains for delays of up to three tokens. Text and decoder are
those of the quickstart.
"""

import dataclasses

from configs import quickstart
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, Study


def get_config():
  """Returns two arms: one trains without delay, one for any delay of up to three tokens."""
  experiment = bind(quickstart.get_config())
  experiment = dataclasses.replace(experiment, evaluation=dataclasses.replace(
      experiment.evaluation, num_texts=256, positions=(1, 2, 3, 4, 5, 6, 8, 16)))
  return as_config(Study(
      name='late latents', experiment=experiment,
      arms={'own': ArmConfig(), 'delayed': ArmConfig(changes={'deliberation': {'max_delay': 3}})}))
