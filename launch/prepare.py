"""Makes the vocabulary and the packed rows of a config, for several runs to share.

  python launch/prepare.py --config=configs/quickstart.py --workdir=runs/data

Other scripts read them with --data=runs/data, and prepare what is missing. This one is for text
that is only evaluated on, and for training on machines without seqio. Next, run
launch/pretrain.py, launch/train.py or launch/evaluate.py.
"""

from pathlib import Path
from shlex import quote

from latent_deliberation.cli import app
from latent_deliberation.data.loading import prepare_data
from latent_deliberation.experiment import define_config, read_config

define_config(__file__)
_WORKDIR = app.define_directory(
    'workdir', 'Directory to write the vocabulary and the packed rows to.')


def main() -> None:
  experiment = read_config()
  prepare_data(experiment.data, experiment.decoder.vocab_size, Path(_WORKDIR.value))
  print(f'Data: {_WORKDIR.value}\nNext: python launch/pretrain.py --data={quote(_WORKDIR.value)} '
        '--config=... --workdir=...')


if __name__ == '__main__':
  app.run(main)
