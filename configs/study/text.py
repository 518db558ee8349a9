"""Perplexity by ahead position for more and more latents: the shape of the paper's Table 1.

  python launch/study.py --config=configs/study/text.py --workdir=runs/text

Text and decoder are the quickstart's, and every arm trains for as many steps on as many traces. Of
each number of latents the table has the coprocessor's own beside those of another text.
"""

import dataclasses
import runpy
from pathlib import Path

from latent_deliberation.jobs.experiment import as_config, bind
from latent_deliberation.jobs.study_config import ArmConfig, Study

QUICKSTART = Path(__file__).parents[1] / 'quickstart.py'
NUM_LATENTS = (4, 8, 16, 32)


def get_config():
  """The quickstart with N_A = 16, the paper's, and 16 traces a text."""
  experiment = bind(runpy.run_path(str(QUICKSTART))['get_config']())
  return as_config(Study(
      name='perplexity by number of latents', seeds=(0,),
      experiment=dataclasses.replace(
          experiment,
          deliberation=dataclasses.replace(experiment.deliberation, num_ahead=16, num_traces=16),
          evaluation=dataclasses.replace(
              experiment.evaluation, num_texts=512, num_traces=8, num_ahead=32,
              positions=(1, 2, 4, 8, 16, 32))),
      arms={f'{count} latents': ArmConfig(changes={'deliberation': {'num_latents': count}})
            for count in NUM_LATENTS}))
