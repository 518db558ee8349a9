"""Measures what a coprocessor gains, against controls, on held-out text.

  python launch/evaluate.py --coprocessor=runs/coprocessor --output=runs/report

Config, decoder and data are those of the run, from its run.json, unless flags say otherwise. Keys
such as --config.evaluation.num_texts=128 change what is scored. --constant adds an arm: a run of
launch/train.py with deliberation.trainable=constant. Next, open report.md in --output.
"""


from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config
from latent_deliberation.cli.trained_run import open_run
from latent_deliberation.evaluation.evaluate import evaluate
from latent_deliberation.evaluation.report import format_table
from latent_deliberation.files import as_path

define_config(__file__, of_run='coprocessor')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of the frozen decoder. Default: that of the run.', '')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Work directory of a finished training, or the coprocessor/ that it wrote.')
_DATA = app.define_directory(
    'data', 'Directory of prepared data. Default: that of the run, or of its quickstart.', '')
_OUTPUT = app.define_directory('output', 'Directory to write the report to.')
_OVERWRITE = app.define_overwrite('a report that is there already')
_CONSTANT = app.define_directory(
    'constant', 'Work directory of trained constant soft tokens, to add as an arm. Default: none.',
    '')


def main() -> None:
  run = open_run(_DECODER.value, _COPROCESSOR.value, _DATA.value)
  summary = evaluate(
      run.experiment, decoder_dir=run.decoder_dir, coprocessor_dir=run.coprocessor_dir,
      prepared_dir=run.prepared_dir, output=as_path(_OUTPUT.value),
      constant_dir=as_path(_CONSTANT.value) if _CONSTANT.value else None,
      overwrite=_OVERWRITE.value)
  print(format_table(summary))
  print(f'Report: {as_path(_OUTPUT.value) / "report.md"}')


if __name__ == '__main__':
  app.run(main)
