"""Runs a study: arms with controls over several seeds, on one frozen decoder.

  python launch/study.py --config=configs/study/hops.py:quick --workdir=runs/hops

Everything is kept in --workdir (open results.md there), and the same command goes on where it was
stopped, run by run. With --arm it trains and reports some of the arms, for a part of the time; the
report is always about the arms of the last command.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.experiment import define_config, read_config
from latent_deliberation.studies.study import run_study
from latent_deliberation.studies.study_config import Study
from latent_deliberation.studies.study_report import format_study

define_config(__file__)
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of the study; the same command resumes it.')
_ARM = flags.DEFINE_multi_string(
    'arm', [], 'Name of an arm to train and report; may be repeated. Default: all arms.')


def main() -> None:
  workdir = Path(_WORKDIR.value)
  study = read_config(Study)
  print(format_study(run_study(study, workdir, _ARM.value)))
  print(f'Report: {workdir / "results.md"}')


if __name__ == '__main__':
  app.run(main)
