"""Load-tests a server of this machine: many clients, and faults injected into experts.

  pip install -e '.[serve]'
  python launch/benchmark_serving.py --decoder=runs/quickstart/pretraining/decoder \\
      --output=serving.json

The same requests are sent plain, with healthy experts, and with experts that fail, hang, give NaN
or are removed. The report has latencies and tokens/s, also as a table and a PNG. It fails if a
request is lost or a plain text changes. Next, serve with launch/serve.py.
"""

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.files import as_path
from latent_deliberation.serving.server_options import check_libraries

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_CLIENTS = flags.DEFINE_integer('clients', 64, 'Clients at once.', lower_bound=1)
_REQUESTS = flags.DEFINE_integer('requests', 4, 'Requests of each client.', lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 32, 'Tokens of a text.', lower_bound=1)
_ROWS = flags.DEFINE_integer('rows', 16, 'Texts that are decoded together.', lower_bound=1)
_LENGTH = flags.DEFINE_integer('length', 256, 'Room of a text in tokens.', lower_bound=64)
_SHARE = flags.DEFINE_float(
    'share', 0.4, 'Share of passes of experts that have a fault.', lower_bound=0, upper_bound=1)
_OUTPUT = app.define_json('output', 'JSON file to write, with .md and .png beside it.')


def main() -> None:
  check_libraries()
  from latent_deliberation.benchmarks.serving_load import LoadOptions, measure_load
  result = measure_load(as_path(_OUTPUT.value), _DECODER.value, LoadOptions(
      _CLIENTS.value, _REQUESTS.value, _MAX_TOKENS.value, _ROWS.value, _LENGTH.value,
      _SHARE.value))
  for phase, found in result['phases'].items():
    first, whole = (found['plain'][name] for name in ('first_token_seconds', 'seconds'))
    print(f'{phase:8} {found["tokens_per_second"]:8.1f} tokens/s; plain texts: first token '
          f'{first[0]:.2f} s (99%: {first[2]:.2f}), whole {whole[0]:.2f} s (99%: {whole[2]:.2f}); '
          f'{found["with_latents"]} with latents, {found["faults"]} faults, {found["lost"]} lost')


if __name__ == '__main__':
  app.run(main)
