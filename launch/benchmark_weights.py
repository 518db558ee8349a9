"""Measures the memory and the time to load a decoder of a published size.

  python launch/benchmark_weights.py --preset=gemma2_2b --output=weights.json

Writes a directory in Hugging Face's format with random weights next to --output, loads it in a
process of its own, and removes it. It takes 5.2 GB of disk for gemma2_2b. Next, describe a real
checkpoint with launch/convert.py.
"""


from absl import flags

from latent_deliberation.benchmarks.loading_memory import benchmark
from latent_deliberation.cli import app
from latent_deliberation.files import as_path
from latent_deliberation.model.transformer_config import PRESETS

_PRESET = flags.DEFINE_enum(
    'preset', 'gemma2_2b', sorted(PRESETS), 'Published size of the decoder.')
_OUTPUT = app.define_json('output', 'JSON file to write.')


def main() -> None:
  measured = benchmark(_PRESET.value, as_path(_OUTPUT.value))
  print(f'{measured["weight_bytes"] / 1e9:.2f} GB of weights in {measured["seconds"]:.0f} s '
        f'({measured["seconds_over_safetensors_alone"]:.1f} x the time in which safetensors alone '
        f'reads them); peak memory {measured["peak_bytes"] / 1e9:.2f} GB, '
        f'{measured["peak_over_weights"]:.2f} x the weights')


if __name__ == '__main__':
  app.run(main)
