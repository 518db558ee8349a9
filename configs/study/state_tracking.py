"""State tracking: how many operations in a row does a decoder follow, and how many with latents?

  python launch/study.py --config=configs/study/state_tracking.py:s5 --workdir=runs/s5
  python launch/study.py --config=configs/study/state_tracking.py:cyclic --workdir=runs/cyclic
  python launch/study.py --config=configs/study/state_tracking.py:s5_ablations --workdir=runs/s5 \\
      --overwrite

The same questions are asked in two groups. In S5 a solver has to follow the operations one by one.
In the cyclic group Z_5 it may add them up in any order. Decoder and arms are those of
pointer_chasing.py:quick, or of another size of it as in the last command. The arms train on long
questions as often as on short ones; the decoder reads mostly short ones. Sizes may share a work
directory, and with it the decoder and the arms that they have in common. The report is then that of
the last command.
"""

from dataclasses import replace

from configs.study import pointer_chasing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import Study
from latent_deliberation.studies.synthetic.state_tracking import StateTracking

GROUPS = {'s5': 's5', 'cyclic': 'zp'}
QUESTIONS = 20  # of a training document


def get_config(choice='s5'):
  """Returns the study; `choice` is 's5' or 'cyclic', alone or with a size as in 's5_full'."""
  group, size = pointer_chasing.read_choice('state_tracking.py', choice, tuple(GROUPS))
  study = bind(pointer_chasing.get_config(size), Study)
  task, start = StateTracking(GROUPS[group], length=6, skew=0.3), study.experiment
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='state_tracking', vocabulary='byte', documents=20_000,
          options={'group': task.group, 'length': task.length, 'skew': task.skew},
          questions=QUESTIONS, length=128, validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=2000)),
      training=replace(start.training, loop=replace(start.training.loop, num_steps=2000)),
      deliberation=replace(
          start.deliberation, anchor_tokens=pointer_chasing.anchor_tokens(task.anchors)))
  return as_config(replace(
      study, name=f'state tracking, {group}', experiment=experiment,
      arm_data_options={'skew': 0.0}))
