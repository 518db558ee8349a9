"""Gemma 2 2B with the paper's setting (section 3), for a v5e slice of 256 chips.

The setting is 1024 texts of 2048 tokens, 128 traces, N_A = 16, and the paper's latents: appended
outputs at free soft tokens. The paper does not give positions, optimizer, learning rate or
precision; those below are ours. Training text is yours: set --config.data.name and .data_dir.

Add these flags to --config=configs/gemma2_2b.py for your machine. docs/planner.md has an estimate
for each slice. The two lines for one chip are by arithmetic alone, and have a smaller batch.

  v5e:16x16              (none)
  v5e:16x16, 64 latents  --config.deliberation.num_latents=64 --config.computation.remat=mid
  v5p:4x4x8              --config.training.accumulation=2 --config.computation.replicate_frozen=True
  v5p:4x4x8, 64 latents  --config.training.accumulation=2 --config.computation.replicate_frozen=True
                         --config.deliberation.num_latents=64 --config.computation.remat=mid
  v6e:16x16              --config.training.accumulation=2 --config.computation.replicate_frozen=True
                         --config.computation.loss_chunk=256
  v6e:16x16, 64 latents  --config.training.accumulation=4 --config.computation.replicate_frozen=True
                         --config.deliberation.num_latents=64 --config.computation.remat=mid
  one chip of 96 GB      --config.mesh.fsdp=1 --config.training.batch_size=32
                         --config.training.accumulation=32 --config.evaluation.batch_size=2
  one chip of 16 GB      --config.mesh.fsdp=1 --config.training.batch_size=32
                         --config.training.accumulation=32 --config.evaluation.batch_size=2
                         --config.deliberation.trainable=lora --config.computation.remat=full

With several slices add --config.mesh.replica, the number of slices. The batch must be a multiple of
accumulation times the number of chips.

Another decoder goes after a colon. --config=configs/gemma2_2b.py:gemma3_1b is a preset.
--config=configs/gemma2_2b.py:DIRECTORY takes architecture and tokenizer from a directory, here or
in a bucket, in any format that launch/convert.py reads; a name such as gemma3-270m does, too.
Without either, give the path of Gemma's tokenizer: --config.data.vocabulary_path.
"""

import os

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.files import as_path
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import named
from latent_deliberation.model.transformer_config import find_preset
from latent_deliberation.sharding import MeshConfig
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig


def get_config(preset_or_dir: str = 'gemma2_2b'):
  """Returns the config for 16 x 16 chips: data parallel over one axis, fsdp over the other.

  Args:
    preset_or_dir: name of a preset; or directory, GGUF file or name of a decoder.
  """
  tokenizer = None
  path = as_path(os.path.expanduser(preset_or_dir))
  if path.exists() or named.is_name(preset_or_dir):
    checkpoint = weights.open_checkpoint(path if path.exists() else preset_or_dir)
    architecture, tokenizer = checkpoint.config, checkpoint.tokenizer
  else:
    architecture = find_preset(preset_or_dir)
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
