"""Trains a coprocessor on the kv-cache of a frozen decoder.

  python launch/train.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --data=runs/decoder --workdir=runs/coprocessor

The config says what learns (deliberation.trainable: 'full', 'lora' or 'constant'), and how latents
are made. The same command goes on where it was stopped. Next, measure what was gained with
launch/evaluate.py.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.training.train import train_coprocessor

flags.define_config(__file__)
_DECODER = flags.define_directory('decoder', 'Of the frozen decoder.')
_WORKDIR = flags.define_directory('workdir', 'Of the run.')
_DATA = flags.define_directory('data', 'Of prepared data; default is --workdir.', '')


def main() -> None:
  data = _DATA.value or _WORKDIR.value
  train_coprocessor(flags.experiment_from_flags(), Path(_DECODER.value),
                    Path(_WORKDIR.value), Path(data))
  print(f'Coprocessor: {_WORKDIR.value}/coprocessor\n'
        f'Next: python launch/evaluate.py --coprocessor={_WORKDIR.value} '
        f'--decoder={_DECODER.value} --data={data} --config=... --output=...')


if __name__ == '__main__':
  app.run(main)
