"""Times a config's train step on one device, with fused and with plain attention.

  python launch/benchmark_attention.py --config=configs/gemma2_2b.py --output=fused.json
  python launch/benchmark_attention.py --config=configs/gemma2_2b.py --output=dense.json \\
      --config.decoder.num_layers=4 --dense_mask

Weights and texts are random. Both ways run forward and backward, in turns, and must agree in the
loss and in the norm of the gradient. Next, set --config.computation.attention for launch/train.py.
"""


from absl import flags

from latent_deliberation.benchmarks.attention_speed import benchmark
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, read_sizes
from latent_deliberation.files import as_path

define_config(__file__)
_TEXTS = flags.DEFINE_integer('texts', 1, 'Number of texts in the batch.', lower_bound=1)
_DENSE = flags.DEFINE_bool('dense_mask', False, 'Also time one dense mask over trunk and traces.')
_OUTPUT = app.define_json('output', 'JSON file to write.')
_REPEATS = flags.DEFINE_integer(
    'repeats', 10, 'Number of turns; each way runs once a turn.', lower_bound=1)


def main() -> None:
  result = benchmark(read_sizes(), _TEXTS.value, _DENSE.value,
                     as_path(_OUTPUT.value), _REPEATS.value)
  for way, measured in result['measured'].items():
    print(f'{way:<11} {result["seconds"][way]:8.3f} s  loss {measured["loss"]:.4f}  gradient norm '
          f'{measured["gradient_norm"]:.4g}  temporary {measured["temporary_bytes"] / 1e9:.1f} GB')
  for other, ratio in result['over_ours'].items():
    print(f'fused is {ratio:.2f} x as fast as: {other}')


if __name__ == '__main__':
  app.run(main)
