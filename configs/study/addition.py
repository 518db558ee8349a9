"""Addition: how far down does a decoder look for a carry, and how far with latents?

  python launch/study.py --config=configs/study/addition.py --workdir=runs/addition
  python launch/study.py --config=configs/study/addition.py:full --workdir=runs/addition \\
      --overwrite

A question asks for one digit of a sum. The digit depends on a carry that is decided some columns
below. Decoder and arms are those of pointer_chasing.py:quick, or of another size of it. The second
command keeps what the first has trained, and replaces its report. The arms train for fewer steps,
on text with far carries as often as near ones. A decoder that ignores carries is right half of the
time.
"""

from dataclasses import replace

from configs.study import pointer_chasing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import QuestionsConfig, Study
from latent_deliberation.studies.synthetic.addition import Addition

QUESTIONS = 11  # of a training document
TASK = Addition(4, skew=0.5)


def get_config(size='quick'):
  """Returns the study in the size 'quick', or in another size of pointer_chasing.py."""
  if size not in pointer_chasing.SIZES:
    raise UserError(f'addition.py:{size}: choose one of {sorted(pointer_chasing.SIZES)}')
  study = bind(pointer_chasing.get_config(size), Study)
  start = study.experiment
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='addition', vocabulary='byte', documents=12_000,
          options={'carries': TASK.carries, 'skew': TASK.skew},
          questions=QUESTIONS, length=2 + QUESTIONS * (2 * TASK.carries + 3),
          validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=2000)),
      training=replace(start.training, batch_size=8,
                       loop=replace(start.training.loop, num_steps=400, eval_every=200)),
      deliberation=replace(start.deliberation, num_traces=QUESTIONS,
                           anchor_tokens=pointer_chasing.anchor_tokens(TASK.anchors)),
      evaluation=replace(start.evaluation, num_traces=QUESTIONS))
  return as_config(replace(
      study, name='addition', experiment=experiment, arm_data_options={'skew': 0.0},
      questions=QuestionsConfig(per_difficulty=500)))
