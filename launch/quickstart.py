"""Pretrains a small decoder, trains a coprocessor on its kv-cache, and shows the gain.

  python launch/quickstart.py

It takes 11 minutes on two cores, and 17 on one. Everything is written to --workdir. The same
command resumes a run that was stopped. Open report.md there. For your own text:

  python launch/quickstart.py --workdir=runs/mine --config.data.files=notes

Sizes that a small text does not allow follow from the text. --decoder takes a decoder that exists,
and pretrains none.

Next, try prompts with launch/generate.py. For other sizes and machines, its steps are
launch/pretrain.py, launch/train.py and launch/evaluate.py.
"""

from shlex import quote

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, given_keys, read_config
from latent_deliberation.cli.quickstart import quickstart
from latent_deliberation.evaluation.report import format_table
from latent_deliberation.files import as_path
from latent_deliberation.paths import COPROCESSOR, DECODER, PRETRAINING

define_config(__file__, 'configs/quickstart.py', of_run='workdir')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of all phases; the same command resumes them.', 'runs/quickstart')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of a decoder that exists. Default: decoder_from of '
    'the config, or else one is pretrained.', '')

_OVERWRITE = app.define_overwrite('a report of other settings')


def main() -> None:
  workdir = as_path(_WORKDIR.value)
  experiment = with_decoder(read_config(on_devices=True), _DECODER.value, given_keys())
  summary = quickstart(experiment, workdir, given_keys(), _OVERWRITE.value)
  print(format_table(summary))
  if not (summary['bar'] or {}).get('passed'):
    print('More steps on more text usually help; docs/limits.md says where latents do not.')
    if not experiment.decoder_from:
      print('A decoder that was pretrained on much text needs less: try '
            '--config=configs/gemma3_270m.py in another --workdir. docs/gemma.md says how to '
            'install it.')
  decoder = experiment.decoder_from or str(workdir / PRETRAINING / DECODER)
  print(f'Report: {workdir / "report.md"}\n'
        f'Next: python launch/generate.py --decoder={quote(decoder)} '
        f'--coprocessor={quote(str(workdir / COPROCESSOR))} --compare')


if __name__ == '__main__':
  app.run(main)
