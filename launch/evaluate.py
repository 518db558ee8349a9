"""Measures what a coprocessor gains, against controls, on held-out text.

  python launch/evaluate.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --coprocessor=runs/coprocessor --data=runs/decoder --output=runs/report

Give the config of the training; its section `evaluation` may differ. --constant adds an arm: a run
of launch/train.py with deliberation.trainable=constant (pause tokens). Next, open report.md in
--output.
"""

from pathlib import Path

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_config
from latent_deliberation.evaluation.evaluate import evaluate
from latent_deliberation.evaluation.report import format_table

define_config(__file__)
_DECODER = app.define_decoder('decoder', 'Directory or GGUF file of the frozen decoder.')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Work directory of a finished training, or the coprocessor/ that it wrote.')
_DATA = app.define_directory('data', 'Directory of prepared data.')
_OUTPUT = app.define_directory('output', 'Directory to write the report to.')
_CONSTANT = app.define_directory(
    'constant', 'Work directory of trained constant soft tokens, to add as an arm. Default: none.',
    '')


def main() -> None:
  summary = evaluate(
      read_config(), decoder_dir=Path(_DECODER.value), coprocessor_dir=Path(_COPROCESSOR.value),
      prepared_dir=Path(_DATA.value), output=Path(_OUTPUT.value),
      constant_dir=Path(_CONSTANT.value) if _CONSTANT.value else None)
  print(format_table(summary))
  print(f'Report: {Path(_OUTPUT.value) / "report.md"}')


if __name__ == '__main__':
  app.run(main)
