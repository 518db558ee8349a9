"""A published decoder: what latents gain by content, and what by fitting the text.

  python launch/study.py --config=configs/study/pretrained.py --workdir=runs/gemma_study --arm=own
  python launch/study.py --config=configs/study/pretrained.py --workdir=runs/gemma_study
  python launch/study.py --config=configs/study/pretrained.py:smollm2-135m \\
      --workdir=runs/smollm2_study

The decoder is Gemma 3 270M, or SmolLM2-135M. Every arm has the text, batch and rates of the
decoder's own config, and all but 'paper' have its steps. So its 4 latents are the arm 'own'. An arm
of 400 steps takes about 40 minutes of one CPU core for each of three seeds: choose some with --arm,
as in the first command. A later command adds others: it names the earlier ones too, or has all of
them as the second command.

- 'constant' has soft tokens without a coprocessor. What it gains is no content. Its rates are those
  of 'own'; 'constant, 30 percent' to 'constant, 1000 percent' train at so much of them.
- 'lora' puts the same adapters on the decoder itself, and trains them by next-token loss.
- '8 latents' to '32 latents' are the shape of the paper's Table 1.
- 'paper' arms have latents after the anchor, as the paper has, for 2 and 4 times the steps.
- 'rank 4', 'rank 64' and 'whole' have other numbers of weights. A whole coprocessor starts
  as a copy of the decoder, which the rate of adapters would damage. It trains at a twentieth of it.
- 'states' reads the decoder's last layer in place of its cache.
- 'delay' trains latents that come up to 3 tokens late. With --overwrite and
  --config.experiment.evaluation.delay=1 (2, 3), all trained arms are scored so.
"""

import dataclasses

from configs import gemma3_270m, smollm2_135m
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, Study

CONFIGS = {'gemma3-270m': gemma3_270m, 'smollm2-135m': smollm2_135m}
STEPS = 400


def get_config(decoder='gemma3-270m'):
  """Returns the study on one of CONFIGS."""
  if decoder not in CONFIGS:
    raise UserError(f'pretrained.py:{decoder}: choose one of {tuple(CONFIGS)}')
  experiment = bind(CONFIGS[decoder].get_config())
  experiment = dataclasses.replace(experiment, evaluation=dataclasses.replace(
      experiment.evaluation, num_ahead=32, positions=(1, 2, 4, 8, 16, 32)))
  return as_config(Study(
      name=f'a published decoder, {decoder}', experiment=experiment,
      arms=_arms(experiment.training.optimizer.learning_rate)))


def _arms(rate):
  constants = {f'constant, {percent} percent': _latents(
      trainable='constant', training={'optimizer': {'learning_rate': percent / 100 * rate}})
      for percent in (30, 300, 1000)}
  return {
      'own': ArmConfig(),
      'constant': _latents(trainable='constant'),
      **constants,
      'lora': ArmConfig('lora'),
      **{f'{count} latents': _latents(num_latents=count) for count in (8, 16, 32)},
      **{f'paper, {times} x steps': _latents(times * STEPS, latents='paper', soft_tokens='free')
         for times in (2, 4)},
      'rank 4': _latents(lora_rank=4),
      'rank 64': _latents(lora_rank=64),
      'whole': _latents(trainable='full', training={'multipliers': {'transformer': 0.05}}),
      'states': _latents(reads='states'),
      'delay': _latents(max_delay=3)}


def _latents(num_steps=STEPS, training=(), **choices):
  return ArmConfig(changes={
      'deliberation': choices, 'training': {'loop': {'num_steps': num_steps}, **dict(training)}})
