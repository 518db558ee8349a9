"""Gemma-2 2B with the paper's setting (section 3): 1024 texts of 2048 tokens, 128 traces, N_A = 16.

Latents are the paper's, too: appended outputs at free soft tokens. It names neither positions, nor
optimiser, learning rate and precision; those below are ours. Data are the user's: give
--config.data.name and .data_dir.

Another decoder takes its place after a colon: --config=configs/gemma2_2b.py:gemma3_1b, a preset, or
--config=configs/gemma2_2b.py:DIRECTORY, whose architecture and tokenizer.model are taken from there
(any format that launch/convert.py reads). Without one, give .vocabulary_path for Gemma's own model.
"""

from pathlib import Path

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.model import weights
from latent_deliberation.model.transformer_config import find_preset
from latent_deliberation.sharding import MeshConfig
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig


def get_config(decoder: str = 'gemma2_2b'):
  """For a v5e-256 pod slice: 16 x 16 chips, data parallel over one axis, fsdp over the other.

  A chip has one text at a time. With 64 latents it needs --config.computation.remat=mid. Chips with
  more memory (v5p, v6e) take two or more texts at a time, and the frozen weights whole:
  --config.training.accumulation=2 --config.computation.replicate_frozen=True, on a v6e with
  --config.computation.loss_chunk=256, too. With several slices give their number as
  --config.mesh.replica. docs/tpu.md has a table of what each slice gives.

  Args:
    decoder: name of a preset, or directory of a decoder.
  """
  tokenizer = None
  if Path(decoder).is_dir():
    checkpoint = weights.open_checkpoint(decoder)
    architecture, tokenizer = checkpoint.config, checkpoint.tokenizer
  else:
    architecture = find_preset(decoder)
  training = TrainingConfig(
      batch_size=1024, accumulation=4,
      optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000),
      loop=LoopConfig(num_steps=100_000, log_every=50, eval_every=1000, save_every=1000, keep=3))
  return as_config(Experiment(
      decoder=architecture,
      data=DataConfig(source='tfds', name='c4/en:3.1.0', vocabulary_size=256_000, length=2048,
                      mode='online', vocabulary_path=str(tokenizer or '')),
      computation=Computation(dtype='bfloat16', frozen_dtype='bfloat16', remat='dots',
                              loss_chunk=512, attention='auto'),
      mesh=MeshConfig(data=-1, fsdp=16),
      pretraining=training,
      deliberation=DeliberationConfig(
          num_latents=16, num_ahead=16, num_traces=128, latents='paper', positions='shift',
          soft_tokens='free'),
      training=training,
      evaluation=EvaluationConfig(
          num_texts=1024, batch_size=256, num_traces=128, num_ahead=32,
          positions=(1, 2, 4, 8, 16, 32), eval_batches=4)))
