"""Runs a study: arms with controls over several seeds, on one frozen decoder.

  python launch/study.py --config=configs/study/pointer_chasing.py:quick --workdir=runs/chasing

Everything is kept in --workdir. The same command resumes a study that was stopped. With --arm it
trains and reports some of the arms, in less time. A report of other settings or of more arms needs
--overwrite. Next, open results.md in --workdir.
"""


from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, given_keys, read_config
from latent_deliberation.files import as_path
from latent_deliberation.studies.study import run_study, take_decoder
from latent_deliberation.studies.study_config import Study
from latent_deliberation.studies.study_report import format_study

define_config(__file__, of_run='workdir')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of the study; the same command resumes it.')
_ARM = flags.DEFINE_multi_string(
    'arm', [], 'Name of an arm to train and report. Default: all arms')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of a decoder that exists. Default: decoder_from of '
    'the experiment, or else one is pretrained.', '')

_OVERWRITE = app.define_overwrite('a report of other settings, or of more arms')


def main() -> None:
  workdir = as_path(_WORKDIR.value)
  study = take_decoder(read_config(Study, on_devices=True), _DECODER.value, given_keys())
  print(format_study(run_study(study, workdir, _ARM.value, given_keys(), _OVERWRITE.value)))
  print(f'Report: {workdir / "results.md"}')


if __name__ == '__main__':
  app.run(main)
