"""Makes the vocabulary and the packed rows of a config, once, for runs and evaluations to share.

  python launch/prepare.py --config=configs/quickstart.py --workdir=runs/data

The other scripts take --data=runs/data, and prepare what is missing themselves: this one is for
text that a coprocessor is only evaluated on, and for machines that train without seqio. Next, run
launch/pretrain.py, launch/train.py or launch/evaluate.py.
"""

from pathlib import Path

from latent_deliberation.cli import app
from latent_deliberation.data.loading import prepare_data
from latent_deliberation.experiment import define_config, read_config

define_config(__file__)
_WORKDIR = app.define_directory('workdir', 'Directory to write vocabulary and packed rows to.')


def main() -> None:
  experiment = read_config()
  prepare_data(experiment.data, experiment.decoder.vocab_size, Path(_WORKDIR.value))
  print(f'Data: {_WORKDIR.value}')


if __name__ == '__main__':
  app.run(main)
