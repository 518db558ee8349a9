"""Measures a config's train step on one device with fused and with plain attention.

  python launch/benchmark_attention.py --config=configs/gemma2_2b.py --output=fused.json
  python launch/benchmark_attention.py --config=configs/gemma2_2b.py --output=dense.json \\
      --config.decoder.num_layers=4 --dense_mask

Forward and backward on random weights and texts, in alternating turns, with loss and norm of the
gradient, which must agree. Next, set --config.computation.attention for launch/train.py.
"""

from pathlib import Path

from latent_deliberation.benchmarks.attention_speed import benchmark
from latent_deliberation.cli import app, flags

flags.define_config(__file__)
_TEXTS = flags.define_count('texts', 1, 'Texts of the batch.')
_DENSE = flags.define_switch('dense_mask', 'Compare with one dense mask, too.')
_OUTPUT = flags.define_json('output', 'JSON file to write.')
_REPEATS = flags.define_count('repeats', 10, 'Turns of the comparison.')


def main() -> None:
  result = benchmark(flags.experiment_from_flags(), _TEXTS.value, _DENSE.value,
                     Path(_OUTPUT.value), _REPEATS.value)
  for way, measured in result['measured'].items():
    print(f'{way:<11} {result["seconds"][way]:8.3f} s  loss {measured["loss"]:.4f}  gradient '
          f'{measured["gradient_norm"]:.4g}  temporary {measured["temporary_bytes"] / 1e9:.1f} GB')
  for other, ratio in result['over_ours'].items():
    print(f'fused is {ratio:.2f} x faster than: {other}')


if __name__ == '__main__':
  app.run(main)
