"""Latents before the question: can a coprocessor prepare a context for whatever will be asked?

  python launch/study.py --config=configs/study/offline.py --workdir=runs/offline
  python launch/study.py --config=configs/study/offline.py:hard --workdir=runs/offline_hard

Pointer chasing as in pointer_chasing.py:quick, with the same decoder and text. Here latents refine
the facts themselves, once all facts have been read. Every question after them is answered from
these latents. In the second command the arms train on text with all numbers of hops equally often.
The sizes full and hard_full have every arm of pointer_chasing.py.
"""

from dataclasses import replace

from configs.study import pointer_chasing
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import Study

FACTS = 2 * pointer_chasing.TASK.nodes + 1  # tokens, with the one that ends them
QUESTIONS = 3 * pointer_chasing.QUESTIONS  # tokens, with their answers
# Where the text of the arms differs from the decoder's.
ARM_DATA_OPTIONS = {'same': {}, 'hard': {'skew': 0.0}}


def get_config(choice='same'):
  """Returns the study; `choice` is 'same' or 'hard', alone or with a size as in 'hard_full'."""
  kind, size = pointer_chasing.read_choice('offline.py', choice, tuple(ARM_DATA_OPTIONS))
  study = bind(pointer_chasing.get_config(size), Study)
  start = study.experiment
  experiment = replace(start, deliberation=replace(
      start.deliberation, num_latents=FACTS, num_ahead=QUESTIONS, num_traces=1,
      anchor_tokens=pointer_chasing.anchor_tokens(';')))
  return as_config(replace(
      study, name=f'pointer chasing, offline, {kind} questions', experiment=experiment,
      arm_data_options=ARM_DATA_OPTIONS[kind], questions=replace(study.questions, offline=True)))
