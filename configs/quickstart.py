"""The quickstart: a decoder of 0.75 M parameters on the standard library's text, on two cores.

docs/config.md explains every key. Each can be set on the command line, as in
--config.training.optimizer.learning_rate=1e-3.
"""

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig


def get_config():
  """Returns the config of the main job for a laptop; gemma2_2b.py has the paper's sizes."""
  return as_config(Experiment(
      decoder=TransformerConfig(
          vocab_size=2048, embed_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
          hidden_dim=512, window=64),
      data=DataConfig(source='stdlib', vocabulary_size=2048, length=256, validation_percent=10),
      computation=Computation(scan=False, loss_chunk=256),
      pretraining=TrainingConfig(
          batch_size=16,
          optimizer=OptimizerConfig(
              learning_rate=8e-3, warmup_steps=50, final_fraction=0.02, b2=0.98,
              weight_decay=0.01),
          loop=LoopConfig(num_steps=350, log_every=10, eval_every=50, save_every=175, keep=2)),
      deliberation=DeliberationConfig(num_latents=2, num_ahead=8, num_traces=64),
      training=TrainingConfig(
          batch_size=8,
          optimizer=OptimizerConfig(
              learning_rate=3e-3, warmup_steps=20, final_fraction=0.02, b2=0.98),
          multipliers={'soft_tokens': 0.03, 'gate': 0.3},
          loop=LoopConfig(num_steps=400, log_every=10, eval_every=100, save_every=200, keep=2)),
      evaluation=EvaluationConfig(
          num_texts=1024, batch_size=16, num_traces=16, num_ahead=16,
          positions=(1, 2, 4, 8, 16), eval_batches=4,
          rows_per_text=16)))
