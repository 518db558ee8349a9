"""Makes the vocabulary and the packed rows of a config, once, for runs and evaluations to share.

  python launch/prepare.py --config=configs/quickstart.py --workdir=runs/data

The other scripts take --data=runs/data, and prepare what is missing themselves: this one is for
text that a coprocessor is only evaluated on, and for machines that train without seqio. Next, run
launch/pretrain.py, launch/train.py or launch/evaluate.py.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.data.loading import prepare_data

flags.define_config(__file__)
_WORKDIR = flags.define_directory('workdir', 'Of the data.')


def main() -> None:
  prepare_data(flags.experiment_from_flags(), Path(_WORKDIR.value))
  print(f'Data: {_WORKDIR.value}')


if __name__ == '__main__':
  app.run(main)
