"""Serves a decoder and its experts over HTTP, as OpenAI's completions API, with a page at /.

  python launch/serve.py --decoder=runs/quickstart/pretraining/decoder
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "decoder", "prompt": "def read(", "max_tokens": 32}'

A model is NAME, NAME+EXPERT, NAME+a:0.5,b:0.5 or NAME+auto. Experts are those that
launch/experts.py add has put into --experts; they come and go while the server runs. A coprocessor
of your own, --coprocessor, is the expert 'own'. Next, open the
page in a browser, or read docs/serving.md.
"""

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.experts.routing import ROUTERS
from latent_deliberation.serving.server_options import ServerOptions, check_libraries

_DEFAULT = ServerOptions('decoder')
_DECODER = app.define_decoder(
    'decoder',
    'Directory, GGUF file or name of the decoder; launch/convert.py --list has the names.')
_NAME = flags.DEFINE_string(
    'name', '', 'Name of the decoder in requests. Default: the last part of --decoder.')
_EXPERTS = app.define_directory(
    'experts', "Folder of experts to follow, or 'none'. Default: that of launch/experts.py add.",
    '', on_disk=True)
_COPROCESSOR = app.define_directory(
    'coprocessor',
    "Work directory of a finished training, or the coprocessor/ that it wrote: the expert 'own'. "
    'Default: none.', '')
_ROUTER = flags.DEFINE_enum('router', _DEFAULT.router, sorted(ROUTERS), 'Router of NAME+auto.')
_VOCABULARY = app.define_vocabulary()
_DTYPE = app.define_dtype()
_HOST = flags.DEFINE_string(
    'host', _DEFAULT.host, 'Address to listen on. Others than loopback need --key_file.')
_PORT = flags.DEFINE_integer('port', _DEFAULT.port, 'Port to listen on; 0 for any free one.')
_KEY_FILE = app.define_file(
    'key_file', 'File with the key that requests must send. Default: no key.', '')
_ROWS = flags.DEFINE_integer('rows', _DEFAULT.rows, 'Texts that are decoded together.')
_LENGTH = flags.DEFINE_integer(
    'length', _DEFAULT.length, 'Room of a text in tokens, prompt included.')
_MOST_QUEUED = flags.DEFINE_integer(
    'most_queued', _DEFAULT.most_queued, 'Texts that may wait; further ones get status 429.')
_MOST_TEXTS = flags.DEFINE_integer('most_texts', _DEFAULT.most_texts, 'Texts of one request.')
_MOST_BYTES = flags.DEFINE_integer('most_bytes', _DEFAULT.most_bytes, 'Bytes of one request.')
_REQUEST_SECONDS = flags.DEFINE_float(
    'request_seconds', _DEFAULT.request_seconds, 'Time that a text may take, wait included.')
_LATENT_SECONDS = flags.DEFINE_float(
    'latent_seconds', _DEFAULT.latent_seconds, 'Time after which a text goes on without latents.')
_DRAIN_SECONDS = flags.DEFINE_float(
    'drain_seconds', _DEFAULT.drain_seconds, 'Time for running texts when the server ends.')
_WARM_UP = flags.DEFINE_bool('warm_up', True, 'Compile before the first request.')


def main() -> None:
  options = ServerOptions(
      decoder=_DECODER.value, name=_NAME.value, coprocessor=_COPROCESSOR.value,
      experts=_EXPERTS.value, router=_ROUTER.value, vocabulary=_VOCABULARY.value,
      dtype=_DTYPE.value, host=_HOST.value,
      port=_PORT.value, key_file=_KEY_FILE.value, rows=_ROWS.value, length=_LENGTH.value,
      most_queued=_MOST_QUEUED.value, most_texts=_MOST_TEXTS.value, most_bytes=_MOST_BYTES.value,
      request_seconds=_REQUEST_SECONDS.value, latent_seconds=_LATENT_SECONDS.value,
      drain_seconds=_DRAIN_SECONDS.value)
  check_libraries()
  from latent_deliberation.serving.server import run_server
  run_server(options, _WARM_UP.value)


if __name__ == '__main__':
  app.run(main)
