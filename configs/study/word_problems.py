"""Word problems: latents after the question against no chain, a written chain and pause tokens.

  python launch/study.py --config=configs/study/word_problems.py:DIRECTORY --workdir=runs/words
  python launch/study.py --config=configs/study/word_problems.py:DIRECTORY --workdir=runs/words \\
      --config.questions.options.asked= --config.questions.per_difficulty=600 --overwrite
  python launch/study.py --config=configs/study/word_problems.py:full:DIRECTORY \\
      --workdir=runs/words --overwrite \\
      --config.questions.options.asked= --config.questions.per_difficulty=600

DIRECTORY holds train_no_aug.txt and test.txt: GSM8K in the form 'question||chain #### answer' of
https://github.com/da03/implicit_chain_of_thought. Its seven thousand questions teach a small
decoder no arithmetic, so nine of ten documents are generated stories of the same form. The second
command asks the same trained arms such stories, 600 for each number of equations; results.json is
then about these. The third command has all arms of pointer_chasing.py, and trains those that are
new.
"""

from pathlib import Path

from configs.study import pointer_chasing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.studies.study_config import QuestionsConfig, Study
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig

SIZES = ('quick', 'full', 'ranks')
PIECES = 1024
NEWLINE = 4  # its id in a trained vocabulary; it ends a question


def get_config(choice=''):
  """Returns the study on the files of a directory, in the size 'quick' or SIZE."""
  size, colon, directory = choice.partition(':')
  if not colon:
    size, directory = 'quick', choice
  if not directory or size not in SIZES or not colon and choice in SIZES:
    raise UserError(f'word_problems.py:{choice}: write word_problems.py:DIRECTORY, a directory '
                    'with train_no_aug.txt and test.txt, or SIZE:DIRECTORY with a size of '
                    f'{SIZES}')
  train, asked = (Path(directory) / name for name in ('train_no_aug.txt', 'test.txt'))
  return as_config(Study(
      name='word problems', arms=pointer_chasing.SIZES[size], experiment=_experiment(str(train)),
      arm_data_options={'chains': 0.0, 'skew': 0.0},
      questions=QuestionsConfig(
          per_difficulty=1000, batch_size=128, chain_tokens=80, options={'asked': str(asked)})))


def _experiment(train):
  return Experiment(
      decoder=TransformerConfig(
          vocab_size=PIECES, embed_dim=64, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=16,
          hidden_dim=192, window=512, attention_softcap=None, final_softcap=None),
      data=DataConfig(
          source='synthetic', name='word_problems', vocabulary_size=PIECES, documents=110_000,
          options={'train': train, 'chains': 0.5, 'stories': 0.9, 'skew': 0.7},
          questions=1, length=256, validation_percent=2),
      computation=Computation(scan=False),
      pretraining=TrainingConfig(
          batch_size=8,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=100, final_fraction=0.05, b2=0.98,
              weight_decay=0.01),
          loop=LoopConfig(num_steps=3000, log_every=50, eval_every=500, save_every=500, keep=2)),
      deliberation=DeliberationConfig(
          num_latents=4, num_ahead=5, num_traces=8, anchor_tokens=(NEWLINE,)),
      training=TrainingConfig(
          batch_size=8,
          optimizer=OptimizerConfig(
              learning_rate=2e-3, warmup_steps=20, final_fraction=0.05, b2=0.98),
          multipliers={'soft_tokens': 0.3, 'gate': 0.3},
          loop=LoopConfig(num_steps=800, log_every=50, eval_every=400, save_every=400, keep=2)),
      evaluation=EvaluationConfig(
          num_texts=128, batch_size=16, num_traces=8, num_ahead=5, positions=(1,),
          eval_batches=4))
