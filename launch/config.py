"""Prints the keys of a config with their values and meanings, or writes the reference of all keys.

  python launch/config.py --config=configs/quickstart.py
  python launch/config.py --config=configs/study/pointer_chasing.py:quick
  python launch/config.py --reference=docs/config.md

Overrides are printed as they would be used: add --config.training.batch_size=16, for instance.
Nothing is trained. Next, run the config: launch/quickstart.py, launch/train.py or launch/study.py.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_sizes
from latent_deliberation.cli.config_reference import format_values, write_reference
from latent_deliberation.experiment import Experiment
from latent_deliberation.studies.study_config import Study

define_config(__file__, 'configs/quickstart.py')
_REFERENCE = app.define_file(
    'reference', 'Markdown file to write the reference of all keys to. Default: only print.', '')


def main() -> None:
  if _REFERENCE.value:
    write_reference(Path(_REFERENCE.value), (Experiment, Study))
    print(f'Reference: {_REFERENCE.value}')
    return
  kind = Study if 'experiment' in flags.FLAGS.config else Experiment
  print(format_values(read_sizes(kind)))


if __name__ == '__main__':
  app.run(main)
