"""Pretrains a decoder from scratch.

  python launch/pretrain.py --config=configs/quickstart.py --workdir=runs/decoder

Text is tokenised and packed first, in --data, where there is none yet. The same command goes on
where it was stopped. Next, train a coprocessor on <workdir>/decoder with launch/train.py.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.training.pretrain import pretrain

flags.define_config(__file__)
_WORKDIR = flags.define_directory('workdir', 'Of the run.')
_DATA = flags.define_directory('data', 'Of prepared data; default is --workdir.', '')


def main() -> None:
  workdir = Path(_WORKDIR.value)
  decoder = pretrain(flags.experiment_from_flags(), workdir, Path(_DATA.value or workdir))
  print(f'Decoder: {decoder}\nNext: python launch/train.py --decoder={decoder} '
        f'--data={_DATA.value or workdir} --config=... --workdir=...')


if __name__ == '__main__':
  app.run(main)
