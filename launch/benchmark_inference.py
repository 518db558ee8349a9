"""Times prefill and decoding against transformers, and the cost of an augmentation.

  pip install -e '.[parity]'
  python launch/benchmark_inference.py --output=inference.json

Both sides have the same random Gemma 2 weights, in three sizes. They run in turns, transformers in
a process of its own. The ratios are drawn as a PNG next to the JSON. Next, decode with
launch/generate.py.
"""


from absl import flags

from latent_deliberation.benchmarks.inference_speed import benchmark
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_OUTPUT = app.define_json('output', 'JSON file to write, with a PNG next to it.')
_REPEATS = flags.DEFINE_integer(
    'repeats', 5, 'Number of turns of each comparison.', lower_bound=1)


def main() -> None:
  result = benchmark(as_path(_OUTPUT.value), _REPEATS.value)
  for name in ('decode', 'prefill'):
    for case, ratio in result[f'{name}_ratio_vs_transformers'].items():
      print(f'{name:<8} {case:<14} {ratio:5.1f} x as fast as transformers')
  for case, steps in result['augmentation_in_decode_steps'].items():
    print(f'augment  {case:<24} {steps:5.1f} decode steps')
  print('time to the first token, with a coprocessor in the background over without one: '
        f'{result["first_token_ratio_background_vs_plain"]:.3f}')


if __name__ == '__main__':
  app.run(main)
