"""One host of TPUs, a v5e-4 or a v6e-8: the paper's job in a batch that fits, for several Gemmas.

  python launch/compile.py --config=configs/one_host.py:v6e-8/gemma3_4b --topology=v6e:2x4
  python launch/train.py --config=configs/one_host.py:v6e-8/gemma3_4b --decoder=DIRECTORY \\
      --workdir=runs/coprocessor

The job is that of configs/gemma2_2b.py with 64 texts a step. After the colon comes a host and the
architecture of the decoder, which SETTINGS lists. docs/planner.md has an estimate of each. The
weights are those of --decoder. A v5e-4 is --topology=v5e:2x2. The first command needs
pip install -e '.[tpu]'. Text is yours, as in configs/gemma2_2b.py.
"""

from configs import gemma2_2b
from latent_deliberation.errors import UserError

CHIPS = {'v5e-4': 4, 'v6e-8': 8}
_SMALL = {'accumulation': 8, 'loss_chunk': 256, 'replicate_frozen': True}
# Host and decoder -> what its memory needs: microbatches and settings of `computation`.
SETTINGS = {
    'v5e-4/gemma3_1b': {'accumulation': 16, 'replicate_frozen': True},
    'v5e-4/gemma2_2b': {'accumulation': 16, 'remat': 'full'},
    'v6e-8/gemma3_1b': _SMALL,
    'v6e-8/gemma2_2b': _SMALL,
    'v6e-8/gemma3_4b': {**_SMALL, 'remat': 'mid'},
    'v6e-8/gemma3_27b': {'accumulation': 8, 'remat': 'full', 'trainable': 'lora'},
}


def get_config(choice: str = 'v6e-8/gemma2_2b'):
  """Returns the config for a host and a decoder, a key of SETTINGS."""
  if choice not in SETTINGS:
    raise UserError(f'one_host.py:{choice}: it must be one of {list(SETTINGS)}')
  host, _, preset = choice.partition('/')
  config, settings = gemma2_2b.get_config(preset), dict(SETTINGS[choice])
  config.mesh.data, config.mesh.fsdp = 1, CHIPS[host]
  config.training.batch_size, config.training.accumulation = 64, settings.pop('accumulation')
  config.evaluation.batch_size, config.evaluation.num_texts = 8, 64
  config.deliberation.trainable = settings.pop('trainable', config.deliberation.trainable)
  config.computation.update(settings)
  return config
