"""Measures decoding and prefill against transformers, and what deliberation costs beside them.

  pip install -e '.[parity]' && python launch/benchmark_inference.py --output=inference.json

The same random Gemma-2 weights, in three sizes, transformers in a process of its own, in turns;
the ratios are drawn as a PNG beside the JSON. Next, decode with launch/generate.py.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.benchmarks.inference_speed import benchmark
from latent_deliberation.cli import app

_OUTPUT = app.define_json('output', 'JSON file to write, with a PNG beside it.')
_REPEATS = flags.DEFINE_integer(
    'repeats', 5, 'Number of turns of each comparison.', lower_bound=1)


def main() -> None:
  result = benchmark(Path(_OUTPUT.value), _REPEATS.value)
  for name in ('decode', 'prefill'):
    for case, ratio in result[f'{name}_ratio_vs_transformers'].items():
      print(f'{name:<8} {case:<14} {ratio:5.1f} x transformers')
  for case, steps in result['augmentation_in_decode_steps'].items():
    print(f'augment  {case:<24} {steps:5.1f} decode steps')
  print(f'first token, background over plain: '
        f'{result["first_token_ratio_background_vs_plain"]:.3f}')


if __name__ == '__main__':
  app.run(main)
