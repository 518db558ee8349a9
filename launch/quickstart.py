"""Pretrains a small decoder, trains a coprocessor on its kv-cache, and shows what it gained.

  python launch/quickstart.py

takes about a quarter of an hour on two cores. Everything is kept in --workdir (open report.md
there), and the same command goes on where it was stopped. On your own text:

  python launch/quickstart.py --workdir=runs/mine --config.data.source=text \\
      --config.data.files="('notes/*.txt',)"

Next: launch/pretrain.py, train.py and evaluate.py are its steps, for other sizes and machines.
"""

from pathlib import Path

from latent_deliberation.cli import app
from latent_deliberation.cli.quickstart import quickstart
from latent_deliberation.evaluation.report import format_table
from latent_deliberation.experiment import define_config, read_config

define_config(__file__, 'configs/quickstart.py')
_WORKDIR = app.define_directory(
    'workdir', 'Directory for everything; the same command resumes it.', 'runs/quickstart')


def main() -> None:
  workdir = Path(_WORKDIR.value)
  summary = quickstart(read_config(), workdir)
  print(format_table(summary))
  print(f'Report: {workdir / "report.md"}')


if __name__ == '__main__':
  app.run(main)
