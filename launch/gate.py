"""Fits a gate that tells where latents are worth their time, and measures its value.

  python launch/gate.py --coprocessor=runs/coprocessor --output=runs/gate

Scores held-out text with and without latents. Half of the texts fit a gate on the decoder's hidden
state. The other half compares it with the decoder's uncertainty and with chance, by the gain at
each fraction of places that are augmented. Config, decoder and data are those of the run, unless
flags say otherwise. Next, open gate.png in --output.
"""


from shlex import quote

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config
from latent_deliberation.cli.trained_run import open_run
from latent_deliberation.evaluation.gating import PICTURE, fit_gate, format_gates
from latent_deliberation.files import as_path

define_config(__file__, of_run='coprocessor')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of the frozen decoder. Default: that of the run.', '')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Work directory of a finished training, or the coprocessor/ that it wrote.')
_DATA = app.define_directory(
    'data', 'Directory of prepared data. Default: that of the run, or of its quickstart.', '')
_OUTPUT = app.define_directory('output', 'Directory to write the gate to; must not exist yet.')


def main() -> None:
  run = open_run(_DECODER.value, _COPROCESSOR.value, _DATA.value)
  result = fit_gate(
      run.experiment, decoder_dir=run.decoder_dir, coprocessor_dir=run.coprocessor_dir,
      prepared_dir=run.prepared_dir, output=as_path(_OUTPUT.value))
  print(format_gates(result))
  output = as_path(_OUTPUT.value)
  print(f'Picture: {output / PICTURE}\nNext: python launch/generate.py '
        f'--decoder={quote(str(run.decoder_dir))} --coprocessor={quote(_COPROCESSOR.value)} '
        f'--gate={quote(str(output))} --budget=0.05')


if __name__ == '__main__':
  app.run(main)
