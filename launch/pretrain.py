"""Pretrains a decoder from scratch.

  python launch/pretrain.py --config=configs/quickstart.py --workdir=runs/decoder

Text is first tokenised and packed in --data, if that has not been done. The same command resumes a
run that was stopped. Next, train a coprocessor for <workdir>/decoder with launch/train.py.
"""

from shlex import quote

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import config_arguments, define_config, read_config
from latent_deliberation.files import as_path
from latent_deliberation.training.pretrain import pretrain
from latent_deliberation.training.run_identity import find_data

define_config(__file__)
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of the run; the same command resumes it.')
_DATA = app.define_directory(
    'data', 'Directory of prepared data. Default: that of the run to resume, or else --workdir.',
    '')


def main() -> None:
  workdir = as_path(_WORKDIR.value)
  prepared_dir = find_data(workdir, _DATA.value)
  decoder_dir = pretrain(read_config(on_devices=True), workdir, prepared_dir)
  run = f'{_WORKDIR.value}/coprocessor'
  print(f'Decoder: {decoder_dir}\nNext: python launch/train.py --decoder={quote(str(decoder_dir))} '
        f'--data={quote(str(prepared_dir))} {config_arguments()} --workdir={quote(run)}')


if __name__ == '__main__':
  app.run(main)
