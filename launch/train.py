"""Trains a coprocessor on the kv-cache of a frozen decoder.

  python launch/train.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --data=runs/decoder --workdir=runs/coprocessor

The config says which parameters are trained (deliberation.trainable: 'full', 'lora' or 'constant')
and how latents are made. Architecture and vocabulary are the decoder's. The same command resumes a
run that was stopped. Next, measure the gain with launch/evaluate.py.
"""

from shlex import quote

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, given_keys, read_config
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path
from latent_deliberation.training.run_identity import find_data
from latent_deliberation.training.train import train_coprocessor

define_config(__file__, of_run='workdir')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of the frozen decoder. Default: decoder_from of the '
    'config.', '')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of the run; the same command resumes it.')
_DATA = app.define_directory(
    'data', 'Directory of prepared data. Default: that of the run to resume, or else --workdir.',
    '')


def main() -> None:
  workdir = as_path(_WORKDIR.value)
  prepared_dir = find_data(workdir, _DATA.value)
  experiment = with_decoder(read_config(on_devices=True), _DECODER.value, given_keys())
  if not experiment.decoder_from:
    raise UserError("--decoder = '': give the directory of a decoder, or set decoder_from")
  train_coprocessor(experiment, as_path(experiment.decoder_from), workdir, prepared_dir)
  print(f'Coprocessor: {_WORKDIR.value}/coprocessor\n'
        f'Next: python launch/evaluate.py --coprocessor={quote(_WORKDIR.value)} '
        f'--data={quote(str(prepared_dir))} --output={quote(f"{_WORKDIR.value}/report")}')


if __name__ == '__main__':
  app.run(main)
