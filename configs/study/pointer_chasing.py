"""Pointer chasing: does deliberation carry a small decoder further than its layers reach?

  python launch/study.py --config=configs/study/pointer_chasing.py:quick --workdir=runs/chasing
  python launch/study.py --config=configs/study/pointer_chasing.py --workdir=runs/chasing_full

The first command compares a coprocessor and constant soft tokens with the frozen decoder. The
second has all arms. With :ablations each arm changes one thing about the coprocessor. With :ranks
the coprocessor is low-rank adapters of several ranks.

The other studies of questions take their decoder and their arms from here.
"""

from latent_deliberation.data.data_config import DataConfig, encode_bytes
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
from latent_deliberation.studies.study_config import ArmConfig, QuestionsConfig, Study
from latent_deliberation.studies.synthetic.pointer_chasing import PointerChasing
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig

QUESTIONS = 20  # of a training document
TASK = PointerChasing(nodes=6, hops=4, skew=1.0)


def anchor_tokens(characters):
  """Returns the ids of characters in the byte vocabulary."""
  return tuple(encode_bytes(characters))


def _latents(**choices):
  return ArmConfig(changes={'deliberation': choices})


def _adapters(rank):
  return {'trainable': 'lora', 'lora_rank': rank}


CONSTANT, ADAPTERS = {'trainable': 'constant'}, _adapters(8)
ARMS = {
    'own': _latents(), 'constant': _latents(**CONSTANT),
    'lora coprocessor': _latents(**ADAPTERS),
    'joint': ArmConfig('joint', {'deliberation': CONSTANT}),
    'finetuned': ArmConfig('finetuned'),
    'lora': ArmConfig('lora', {'deliberation': ADAPTERS})}
ABLATIONS = {
    'own': _latents(),
    'two latents': _latents(num_latents=2),
    'five traces': _latents(num_traces=5),
    'channel gate': _latents(gate='channel'),
    'free soft tokens': _latents(soft_tokens='free'),
    'scratch': _latents(initialisation='scratch'),
    'lora 8': _latents(**ADAPTERS),
    'one layer': _latents(num_layers=1),
    'states alone': _latents(reads='states'),
    'anchored, share': _latents(latents='anchored'),
    'anchored, share, four latents': _latents(latents='anchored', num_latents=4),
    'anchored, share, sixteen latents': _latents(latents='anchored', num_latents=16),
    'anchored, shift': _latents(latents='anchored', positions='shift'),
    'paper, share': _latents(latents='paper', soft_tokens='free'),
    'paper, shift': _latents(latents='paper', soft_tokens='free', positions='shift')}
RANKS = (
    {'own': _latents()}
    | {f'lora {rank}': _latents(**_adapters(rank)) for rank in (2, 8, 32)}
    | {'lora 8 times 16': _latents(**ADAPTERS, lora_alpha=128.0)})
SIZES = {
    'full': ARMS, 'quick': {name: ARMS[name] for name in ('own', 'constant')},
    'ablations': ABLATIONS, 'ranks': RANKS}


def read_choice(where, choice, names):
  """Splits the choice of another study (NAME, SIZE or NAME_SIZE) into a name and a size.

  The default name is the first of `names`, the default size is 'quick'.
  """
  parts = choice.split('_') if choice else []
  name = parts.pop(0) if parts and parts[0] in names else names[0]
  size = parts.pop(0) if parts else 'quick'
  if parts or size not in SIZES:
    raise UserError(f'{where}:{choice}: choose a name {tuple(names)}, a size {sorted(SIZES)}, or '
                    'NAME_SIZE')
  return name, size


def get_config(size='full'):
  """Returns the study with the arms of SIZES[size]; 'quick' is a coprocessor and soft tokens."""
  if size not in SIZES:
    raise UserError(f'pointer_chasing.py:{size}: choose one of {sorted(SIZES)}')
  return as_config(Study(
      name=f'pointer chasing, {size}', arms=SIZES[size], experiment=_experiment(),
      questions=QuestionsConfig(per_difficulty=1000)))


def _experiment():
  return Experiment(
      decoder=TransformerConfig(
          vocab_size=260, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
          hidden_dim=128, window=512, attention_softcap=None, final_softcap=None),
      data=DataConfig(
          source='synthetic', name='pointer_chasing', vocabulary='byte', documents=100_000,
          options={'nodes': TASK.nodes, 'hops': TASK.hops, 'skew': TASK.skew},
          questions=QUESTIONS, length=3 + 2 * TASK.nodes + 3 * QUESTIONS, validation_percent=2),
      computation=Computation(scan=False),
      pretraining=TrainingConfig(
          batch_size=16,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=50, final_fraction=0.05, b2=0.98,
              weight_decay=0.01),
          loop=LoopConfig(num_steps=8000, log_every=100, eval_every=1000, save_every=1000, keep=2)),
      deliberation=DeliberationConfig(
          num_latents=1, num_ahead=1, num_traces=QUESTIONS,
          anchor_tokens=anchor_tokens(TASK.anchors)),
      training=TrainingConfig(
          batch_size=16,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=20, final_fraction=0.05, b2=0.98),
          multipliers={'soft_tokens': 0.3, 'gate': 0.3},
          loop=LoopConfig(num_steps=3000, log_every=100, eval_every=500, save_every=1000, keep=2)),
      evaluation=EvaluationConfig(
          num_texts=256, batch_size=16, num_traces=QUESTIONS, num_ahead=1, positions=(1,),
          eval_batches=4))
