"""State tracking: how many operations in a row does a decoder follow, and how many with latents?

  python launch/study.py --config=configs/study/groups.py:s5 --workdir=runs/s5
  python launch/study.py --config=configs/study/groups.py:cyclic --workdir=runs/cyclic

The same operations in two groups: in the first nothing but following them one by one helps, in the
second their number of each kind is enough. A coprocessor and constant soft tokens beside the frozen
decoder; the arms that tune the decoder itself are in hops.py.
"""

from latent_deliberation.data.config import DataConfig
from latent_deliberation.data.synthetic.groups import Groups
from latent_deliberation.deliberation.config import DeliberationConfig
from latent_deliberation.jobs.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.jobs.study_config import ArmConfig, QuestionsConfig, Study
from latent_deliberation.model.config import TransformerConfig
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig

FIRST_BYTE = 4  # id of byte 0 in the byte vocabulary
QUESTIONS = 20  # of a training document
TASKS = {'s5': Groups('s5', length=6, skew=0.3), 'cyclic': Groups('zp', length=6, skew=0.3)}


def get_config(group='s5'):
  """'s5', or 'cyclic' for Z_5."""
  if group not in TASKS:
    raise ValueError(f'groups.py:{group}: choose one of {sorted(TASKS)}')
  return as_config(Study(
      name=f'state tracking, {group}', experiment=_experiment(TASKS[group]),
      arms={'own': ArmConfig(),
            'constant': ArmConfig(changes={'deliberation': {'trainable': 'constant'}})},
      questions=QuestionsConfig(per_difficulty=1000)))


def _experiment(task):
  return Experiment(
      decoder=TransformerConfig(
          vocab_size=260, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
          hidden_dim=128, window=512, attention_softcap=None, final_softcap=None),
      data=DataConfig(
          source='synthetic', name='groups', vocabulary='byte', documents=20_000,
          options={'group': task.group, 'length': task.length, 'skew': task.skew},
          questions=QUESTIONS, length=128, validation_percent=2),
      computation=Computation(scan=False),
      pretraining=TrainingConfig(
          batch_size=16,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=50, final_fraction=0.05, b2=0.98,
              weight_decay=0.01),
          loop=LoopConfig(num_steps=2000, log_every=100, eval_every=500, save_every=1000, keep=2)),
      deliberation=DeliberationConfig(
          num_latents=1, num_ahead=1, num_traces=QUESTIONS,
          anchor_tokens=tuple(FIRST_BYTE + ord(sign) for sign in task.anchors)),
      training=TrainingConfig(
          batch_size=16,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=20, final_fraction=0.05, b2=0.98),
          multipliers={'soft_tokens': 0.3, 'gate': 0.3},
          loop=LoopConfig(num_steps=1500, log_every=100, eval_every=500, save_every=500, keep=2)),
      evaluation=EvaluationConfig(
          num_texts=256, batch_size=16, num_traces=QUESTIONS, num_ahead=1, positions=(1,),
          watch_batches=4))
