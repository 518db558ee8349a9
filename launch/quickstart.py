"""Pretrains a small decoder, trains a coprocessor on its kv-cache, and shows the gain.

  python launch/quickstart.py

It takes 11 minutes on two cores, and 17 on one. Everything is written to --workdir. The same
command resumes a run that was stopped. Open report.md there. For your own text:

  python launch/quickstart.py --workdir=runs/mine --config.data.source=text \\
      --config.data.files="('notes/*.txt',)"

Next, try prompts with launch/generate.py. For other sizes and machines, its steps are
launch/pretrain.py, launch/train.py and launch/evaluate.py.
"""

from pathlib import Path
from shlex import quote

from latent_deliberation.cli import app
from latent_deliberation.cli.quickstart import quickstart
from latent_deliberation.evaluation.report import format_table
from latent_deliberation.experiment import define_config, read_config
from latent_deliberation.paths import COPROCESSOR, DECODER, PRETRAINING

define_config(__file__, 'configs/quickstart.py')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of all phases; the same command resumes them.', 'runs/quickstart')


def main() -> None:
  workdir = Path(_WORKDIR.value)
  summary = quickstart(read_config(), workdir)
  print(format_table(summary))
  print(f'Report: {workdir / "report.md"}\n'
        f'Next: python launch/generate.py --decoder={quote(str(workdir / PRETRAINING / DECODER))} '
        f'--coprocessor={quote(str(workdir / COPROCESSOR))} --compare')


if __name__ == '__main__':
  app.run(main)
