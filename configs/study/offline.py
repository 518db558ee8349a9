"""Latents before the question: can a coprocessor prepare a context for whatever will be asked?

  python launch/study.py --config=configs/study/offline.py --workdir=runs/offline
  python launch/study.py --config=configs/study/offline.py:hard --workdir=runs/offline_hard

Pointer chasing as in hops.py:quick, with the same decoder and text, but latents refine the facts
themselves as soon as all of them have been read, and every question behind them is answered from
what they prepared. In the second command arms learn on text with all numbers of hops equally often;
hard_full and full have every arm of hops.py.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import Study

HOPS = runpy.run_path(str(Path(__file__).with_name('hops.py')))
FACTS = 2 * HOPS['TASK'].nodes + 1  # tokens, with the sign that ends them
QUESTIONS = 3 * HOPS['QUESTIONS']  # tokens, with their answers
ARM_DATA_OPTIONS = {'same': {}, 'hard': {'skew': 0.0}}  # by how they differ from the decoder's text


def get_config(choice='same'):
  """'same' or 'hard', alone or with a size of hops.py behind an underscore."""
  kind, size = HOPS['read_choice']('offline.py', choice, tuple(ARM_DATA_OPTIONS))
  study = bind(HOPS['get_config'](size), Study)
  start = study.experiment
  experiment = replace(start, deliberation=replace(
      start.deliberation, num_latents=FACTS, num_ahead=QUESTIONS, num_traces=1,
      anchor_tokens=HOPS['ids'](';')))
  return as_config(replace(
      study, name=f'pointer chasing, offline, {kind} questions', experiment=experiment,
      arm_data_options=ARM_DATA_OPTIONS[kind], questions=replace(study.questions, offline=True)))
