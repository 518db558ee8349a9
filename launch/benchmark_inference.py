"""Times prefill and decoding against transformers, and the cost of an augmentation.

  pip install -e '.[parity]'
  python launch/benchmark_inference.py --output=inference.json

Both sides have the same weights: random ones of Gemma 2's kind in three sizes, or with --decoder
those of a decoder that exists, in float32 and in bfloat16. They run in turns, transformers in a
process of its own. The ratios are drawn as a PNG next to the JSON. Next, decode with
launch/generate.py.
"""


from absl import flags

from latent_deliberation.benchmarks.inference_speed import benchmark
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_OUTPUT = app.define_json('output', 'JSON file to write, with a PNG next to it.')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of a decoder. Default: random decoders of three '
    'sizes.', '')
_REPEATS = flags.DEFINE_integer(
    'repeats', 5, 'Number of turns of each comparison.', lower_bound=1)


def main() -> None:
  result = benchmark(as_path(_OUTPUT.value), _REPEATS.value, _DECODER.value)
  for name in ('decode', 'prefill'):
    for case, ratio in result[f'{name}_ratio_vs_transformers'].items():
      print(f'{name:<8} {case:<28} {ratio:5.1f} x as fast as transformers')
  for case, steps in result['augmentation_in_decode_steps'].items():
    print(f'augment  {case:<24} {steps:5.1f} decode steps')
  print('time to the first token, with a coprocessor in the background over without one: '
        f'{result["first_token_ratio_background_vs_plain"]:.3f}')


if __name__ == '__main__':
  app.run(main)
