"""Perplexity by ahead position: the shape of the paper's Table 1, and what it depends on.

  python launch/study.py --config=configs/study/text.py --workdir=runs/text
  python launch/study.py --config=configs/study/text.py:ahead --workdir=runs/text_ahead
  python launch/study.py --config=configs/study/text.py:plateau --workdir=runs/text_plateau
  python launch/study.py --config=configs/study/text.py:fresh --workdir=runs/text_fresh

Every arm trains for the same number of steps on the same number of traces. The table shows the
coprocessor's own latents and those of another text.

- The first command has 4 to 32 latents, constant soft tokens, and the decoder finetuned on the same
  text. Text and decoder are those of the quickstart. text.py:full adds the arms
  '16, lora coprocessor', 'joint' and 'lora'.
- The second has 8 latents and 4 to 32 ahead tokens.
- The third has the first command's arms on a decoder of 2 M parameters, which has read the text one
  and a half times.
- The fourth has them on the quickstart's decoder after 15 tokens a weight, each read once. It also
  finetunes the decoder at two lower rates. The arms train on text that the decoder has not read.
  The text is three times as long: sources of packages that requirements.txt installs.
"""

import dataclasses
import importlib.util
from pathlib import Path

from configs import quickstart
from configs.study.pointer_chasing import ADAPTERS
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, Study

LATENTS = {f'{count} latents': ArmConfig(changes={'deliberation': {'num_latents': count}})
           for count in (4, 8, 16, 32)}
AHEAD = {f'{count} ahead': ArmConfig(
    changes={'deliberation': {'num_latents': 8, 'num_ahead': count}}) for count in (4, 8, 16, 32)}
CONTROLS = {
    '16 constant': ArmConfig(
        changes={'deliberation': {'num_latents': 16, 'trainable': 'constant'}}),
    'finetuned': ArmConfig('finetuned')}
# The decoder's own training ended at a rate of 1.6e-4. 'finetuned' begins at 3e-3, as latents do.
GENTLY = {f'finetuned {name}': ArmConfig(
    'finetuned', {'training': {'optimizer': {'learning_rate': rate}}})
          for name, rate in (('gently', 5e-4), ('at the final rate', 1.6e-4))}
TUNED = {
    '16, lora coprocessor': ArmConfig(changes={'deliberation': {'num_latents': 16, **ADAPTERS}}),
    'joint': ArmConfig('joint', CONTROLS['16 constant'].changes),
    'lora': ArmConfig('lora', {'deliberation': ADAPTERS})}
ARMS = {'quickstart': LATENTS | CONTROLS, 'ahead': AHEAD, 'plateau': LATENTS | CONTROLS,
        'fresh': LATENTS | CONTROLS | GENTLY, 'full': LATENTS | CONTROLS | TUNED}
PACKAGES = ('flax', 'jax', 'keras', 'matplotlib', 'numpy', 'optax', 'scipy', 'tensorflow_datasets')
FRESH_ROWS = 50_000  # of 256 tokens: nine tenths for the decoder, one tenth for the arms


def get_config(size='quickstart'):
  """Returns the study. N_A is 16 as in the paper, but for the arms of 'ahead'."""
  if size not in ARMS:
    raise UserError(f'text.py:{size}: choose one of {tuple(ARMS)}')
  experiment = bind(quickstart.get_config())
  experiment = dataclasses.replace(
      experiment,
      deliberation=dataclasses.replace(experiment.deliberation, num_ahead=16, num_traces=16),
      evaluation=dataclasses.replace(
          experiment.evaluation, num_texts=512, num_traces=8, num_ahead=32,
          positions=(1, 2, 4, 8, 16, 32)))
  if size == 'plateau':
    experiment = _with_larger_decoder(experiment)
  if size == 'fresh':
    experiment = _with_fresh_text(experiment)
  return as_config(Study(
      name=f'perplexity of text, {size}', experiment=experiment, arms=ARMS[size]))


def _with_larger_decoder(experiment):
  start = experiment.pretraining
  return dataclasses.replace(
      experiment,
      decoder=dataclasses.replace(
          experiment.decoder, embed_dim=192, num_layers=3, num_heads=6, hidden_dim=768),
      pretraining=dataclasses.replace(
          start, optimizer=dataclasses.replace(start.optimizer, learning_rate=5e-3),
          loop=dataclasses.replace(
              start.loop, num_steps=1400, eval_every=200, save_every=350)))


def _with_fresh_text(experiment):
  start = experiment.pretraining
  return dataclasses.replace(
      experiment,
      data=dataclasses.replace(
          experiment.data, source='text', files=tuple(_sources(name) for name in PACKAGES),
          max_tokens=FRESH_ROWS * experiment.data.length),
      pretraining=dataclasses.replace(
          start, row_range_percent=(0, 90),
          loop=dataclasses.replace(
              start.loop, num_steps=2800, eval_every=200, save_every=350)),
      training=dataclasses.replace(experiment.training, row_range_percent=(90, 100)))


def _sources(package):
  spec = importlib.util.find_spec(package)  # finds the package without importing it
  if spec is None:
    raise UserError(
        f'text.py:fresh reads the sources of {package}, which is not installed: run pip install '
        '-r requirements.txt')
  return str(Path(spec.origin).parent / '**' / '*.py')
