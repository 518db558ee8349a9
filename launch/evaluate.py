"""Measures what a coprocessor gains, against controls, on held-out text.

  python launch/evaluate.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --coprocessor=runs/coprocessor --data=runs/decoder --output=runs/report

The config is that of the training, except for its section `evaluation`. With --constant, a run of
train.py with deliberation.trainable=constant (pause tokens) joins the table. Open report.md next.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.evaluation.evaluate import evaluate
from latent_deliberation.evaluation.report import format_table

flags.define_config(__file__)
_DECODER = flags.define_directory('decoder', 'Of the frozen decoder.')
_COPROCESSOR = flags.define_directory('coprocessor', 'Of a finished train.py.')
_DATA = flags.define_directory('data', 'Of prepared data.')
_OUTPUT = flags.define_directory('output', 'For the report.')
_CONSTANT = flags.define_directory(
    'constant', 'The same, for constant soft tokens.', '')


def main() -> None:
  summary = evaluate(
      flags.experiment_from_flags(), decoder=Path(_DECODER.value),
      coprocessor=Path(_COPROCESSOR.value), data=Path(_DATA.value), output=Path(_OUTPUT.value),
      constant=Path(_CONSTANT.value) if _CONSTANT.value else None)
  print(format_table(summary))
  print(f'Report: {Path(_OUTPUT.value) / "report.md"}')


if __name__ == '__main__':
  app.run(main)
