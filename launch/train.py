"""Trains a coprocessor on the kv-cache of a frozen decoder.

  python launch/train.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --data=runs/decoder --workdir=runs/coprocessor

The config says which parameters are trained (deliberation.trainable: 'full', 'lora' or 'constant')
and how latents are made. The same command resumes a run that was stopped. Next, measure the gain
with launch/evaluate.py.
"""

from pathlib import Path
from shlex import quote

from latent_deliberation.cli import app
from latent_deliberation.experiment import define_config, read_config
from latent_deliberation.training.train import train_coprocessor

define_config(__file__)
_DECODER = app.define_decoder('decoder', 'Directory or GGUF file of the frozen decoder.')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of the run; the same command resumes it.')
_DATA = app.define_directory('data', 'Directory of prepared data. Default: --workdir.', '')


def main() -> None:
  prepared_dir = _DATA.value or _WORKDIR.value
  train_coprocessor(read_config(), Path(_DECODER.value), Path(_WORKDIR.value), Path(prepared_dir))
  print(f'Coprocessor: {_WORKDIR.value}/coprocessor\n'
        f'Next: python launch/evaluate.py --coprocessor={quote(_WORKDIR.value)} '
        f'--decoder={quote(_DECODER.value)} --data={quote(prepared_dir)} --config=... --output=...')


if __name__ == '__main__':
  app.run(main)
