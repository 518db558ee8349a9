"""Runs a study: arms with controls over several seeds, on one frozen decoder.

  python launch/study.py --config=configs/study/hops.py:quick --workdir=runs/hops

Everything is kept in --workdir (open results.md there), and the same command goes on where it was
stopped, run by run.
"""

from pathlib import Path

from latent_deliberation.evaluation.study_page import format_study
from latent_deliberation.jobs import command_line, job_flags
from latent_deliberation.jobs.study import run_study
from latent_deliberation.jobs.study_config import Study

job_flags.define_config(__file__)
_WORKDIR = job_flags.define_directory('workdir', 'Of the study.')


def main() -> None:
  workdir = Path(_WORKDIR.value)
  print(format_study(run_study(job_flags.config_from_flags(Study), workdir)))
  print(f'Report: {workdir / "results.md"}')


if __name__ == '__main__':
  command_line.run(main)
