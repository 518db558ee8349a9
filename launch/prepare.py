"""Makes the vocabulary and the packed rows of a config, for several runs to share.

  python launch/prepare.py --config=configs/quickstart.py --workdir=runs/data

Other scripts read them with --data=runs/data, and prepare what is missing. This one is for text
that is only evaluated on, and for training on machines without seqio. Next, run
launch/pretrain.py, launch/train.py or launch/evaluate.py.
"""

from shlex import quote

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import (
  config_arguments,
  define_config,
  given_keys,
  read_config,
)
from latent_deliberation.data.loading import prepare_data
from latent_deliberation.files import as_path

define_config(__file__)
_WORKDIR = app.define_directory(
    'workdir', 'Directory to write the vocabulary and the packed rows to.')


def main() -> None:
  experiment = with_decoder(read_config(), given=given_keys())
  prepare_data(experiment.data, experiment.decoder.vocab_size, as_path(_WORKDIR.value))
  script, data = 'train' if experiment.decoder_from else 'pretrain', _WORKDIR.value
  print(f'Data: {data}\nNext: python launch/{script}.py {config_arguments()} '
        f'--data={quote(data)} --workdir={quote(f"{data}/{script}")}')


if __name__ == '__main__':
  app.run(main)
