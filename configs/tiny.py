"""A config for tests: a decoder of 27 thousand parameters on bytes; seconds on one core."""

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import EvaluationConfig, Experiment, TrainingConfig, as_config
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig


def get_config():
  """Returns a config with four steps of each training."""
  training = TrainingConfig(
      batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
      loop=LoopConfig(num_steps=4, log_every=1, eval_every=2, save_every=2, keep=2))
  return as_config(Experiment(
      decoder=PRESETS['tiny'],
      data=DataConfig(vocabulary='byte', length=64, max_tokens=20_000),
      pretraining=training,
      deliberation=DeliberationConfig(num_latents=2, num_ahead=4, num_traces=4),
      training=training,
      evaluation=EvaluationConfig(
          num_texts=8, batch_size=8, num_traces=4, num_ahead=8, positions=(1, 2, 4, 8),
          eval_batches=1)))
