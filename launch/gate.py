"""Fits a gate that tells where latents are worth their time, and draws what it buys.

  python launch/gate.py --config=configs/quickstart.py --decoder=runs/decoder/decoder \\
      --coprocessor=runs/coprocessor --data=runs/decoder --output=runs/gate

Held-out text is scored with and without latents; half of the texts fit a gate on the decoder's
hidden state, the others compare it with the decoder's uncertainty and with chance: gain against the
fraction of places that are augmented. The config is that of the training. Next, look at gate.png.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.evaluation.gating import PICTURE, fit_gate

flags.define_config(__file__)
_DECODER = flags.define_directory('decoder', 'Of the frozen decoder.')
_COPROCESSOR = flags.define_directory('coprocessor', 'Of a finished train.py.')
_DATA = flags.define_directory('data', 'Of prepared data.')
_OUTPUT = flags.define_directory('output', 'To be written; must not exist yet.')


def main() -> None:
  result = fit_gate(
      flags.experiment_from_flags(), decoder=Path(_DECODER.value),
      coprocessor=Path(_COPROCESSOR.value), data=Path(_DATA.value), output=Path(_OUTPUT.value))
  print('fraction augmented; by gate, mean gain of a place in millinats [95% interval], and what'
        ' of it is above chance')
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
