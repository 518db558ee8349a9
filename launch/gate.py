"""Fits a gate that tells where latents are worth their time, and measures its value.

  python launch/gate.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --coprocessor=runs/coprocessor --data=runs/decoder --output=runs/gate

Scores held-out text with and without latents. Half of the texts fit a gate on the decoder's hidden
state. The other half compares it with the decoder's uncertainty and with chance, by the gain at
each fraction of places that are augmented. Give the config of the training. Next, open gate.png in
--output.
"""

from pathlib import Path

from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_config
from latent_deliberation.evaluation.gating import PICTURE, fit_gate

define_config(__file__)
_DECODER = app.define_decoder('decoder', 'Directory or GGUF file of the frozen decoder.')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Work directory of a finished training, or the coprocessor/ that it wrote.')
_DATA = app.define_directory('data', 'Directory of prepared data.')
_OUTPUT = app.define_directory('output', 'Directory to write the gate to; must not exist yet.')


def main() -> None:
  result = fit_gate(
      read_config(), decoder_dir=Path(_DECODER.value), coprocessor_dir=Path(_COPROCESSOR.value),
      prepared_dir=Path(_DATA.value), output=Path(_OUTPUT.value))
  print('Fraction augmented; for each gate the mean gain of a place in millinats [95% interval], '
        'and the part of it above chance:')
  for number, fraction in enumerate(result['curves']['random']['fractions']):
    if number % 4 == 0:
      cells = (
          f'{name} ' + ', '.join(
              '{:6.2f} [{:6.2f}, {:6.2f}]'.format(*(1e3 * curve[key][number] for key in keys))
              for keys in (('gain', 'low', 'high'), ('above_chance', 'above_low', 'above_high')))
          for name, curve in result['curves'].items())
      print(f'{fraction:4.0%}  ' + '  '.join(cells))
  print(f'Picture: {Path(_OUTPUT.value) / PICTURE}')


if __name__ == '__main__':
  app.run(main)
