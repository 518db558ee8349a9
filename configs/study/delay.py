"""Latents that come late: what does training for the delay recover?

  python launch/study.py --config=configs/study/delay.py --workdir=runs/delay
  python launch/study.py --config=configs/study/delay.py --workdir=runs/delay \\
      --config.experiment.evaluation.delay=1

The second command scores the same arms with latents that come one token late (up to three were
trained for); results.json is then about that delay. Text and decoder are the quickstart's.
"""

import dataclasses
import runpy
from pathlib import Path

from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, Study

QUICKSTART = Path(__file__).parents[1] / 'quickstart.py'


def get_config():
  """A coprocessor that is trained without delay, and one for any delay up to three tokens."""
  experiment = bind(runpy.run_path(str(QUICKSTART))['get_config']())
  experiment = dataclasses.replace(experiment, evaluation=dataclasses.replace(
      experiment.evaluation, num_texts=256, positions=(1, 2, 3, 4, 5, 6, 8, 16)))
  return as_config(Study(
      name='late latents', experiment=experiment,
      arms={'own': ArmConfig(), 'delayed': ArmConfig(changes={'deliberation': {'max_delay': 3}})}))
