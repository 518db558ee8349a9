"""A server of tiny random weights on a free port of this machine, and a client for it."""

import contextlib
import functools
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.package import Expert
from latent_deliberation.inference import passes
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.tokenizer import ByteTokenizer
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.serving.server import RunningServer
from latent_deliberation.serving.server_options import ServerOptions
from tests import tiny
from tests.experts import small

LENGTH = 96
CONFIG = tiny.dataclasses.replace(tiny.CONFIG, vocab_size=264)


@functools.cache
def decoder() -> LoadedDecoder:
  """Returns a decoder that reads bytes."""
  params = tiny.decoder_params(CONFIG)
  unstacked = {**params, 'transformer': passes.unstack(params['transformer'])}
  return LoadedDecoder(CONFIG, unstacked, fingerprint(params), ByteTokenizer())


@functools.cache
def expert(name: str, seed: int) -> Expert:
  """Returns adapters of that decoder, with a card."""
  deliberator = tiny.deliberator(CONFIG, trainable='lora')
  checkpoint = CoprocessorCheckpoint(
      CONFIG, deliberator.config, decoder().fingerprint, ByteTokenizer.hash, steps=7,
      params=tiny.coprocessor_params(deliberator, tiny.decoder_params(CONFIG), seed))
  card = small.card(name, base={'name': 'tiny', 'fingerprint': decoder().fingerprint},
                    vocabulary=ByteTokenizer.hash)
  return Expert(card, checkpoint, small.routing(seed))


def experts(kind: type[Experts] = Experts, **options: Any) -> Experts:
  """Returns 'stars' and 'law' on that decoder."""
  return kind(decoder(), {'stars': expert('stars', 1), 'law': expert('law', 2)},
              length=LENGTH, **options)


@contextlib.contextmanager
def serving(attached: Experts, key: str = '', **changes: Any) -> Iterator[RunningServer]:
  """Yields a server in a thread of this process, which ends with the block."""
  values = dict(name='tiny', port=0, rows=2, length=LENGTH, request_seconds=400.0,
                latent_seconds=200.0, drain_seconds=200.0)
  server = RunningServer(ServerOptions('tiny', **{**values, **changes}), decoder(), attached, key)
  thread = threading.Thread(target=server.serve, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.stop()
    thread.join(60)
    assert not thread.is_alive()


def send(server: RunningServer, method: str, path: str, body: Any = None,
         **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
  """Sends one request, and returns status, body and headers of the answer."""
  connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=120)
  try:
    if body is not None and not isinstance(body, bytes):
      body = json.dumps(body).encode()
    given = {'Content-Type': 'application/json', **{
        name.replace('_', '-'): value for name, value in headers.items()}}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers
  finally:
    connection.close()


def complete(server: RunningServer, **values: Any) -> dict[str, Any]:
  """Returns the answer to a request for a text."""
  values = {'model': 'tiny', 'prompt': 'Once upon a', 'temperature': 0, 'max_tokens': 8, **values}
  status, body, _ = send(server, 'POST', '/v1/completions', values)
  assert status == 200, body
  return json.loads(body)


def stream(server: RunningServer, **values: Any) -> list[dict[str, Any]]:
  """Returns the parts of a streamed answer."""
  values = {'model': 'tiny', 'prompt': 'Once upon a', 'temperature': 0, 'max_tokens': 8,
            'stream': True, **values}
  status, body, headers = send(server, 'POST', '/v1/completions', values)
  assert status == 200 and headers['content-type'].startswith('text/event-stream')
  *events, end, rest = body.decode().split('\n\n')
  assert end == 'data: [DONE]' and rest == ''
  return [json.loads(event.removeprefix('data: ')) for event in events]


def refused(server: RunningServer, values: Any, **headers: str) -> tuple[int, dict[str, Any]]:
  """Returns status and error of a request that is refused."""
  if isinstance(values, dict):
    values = {'model': 'tiny', 'prompt': 'Once upon a', 'max_tokens': 4, **values}
  status, body, _ = send(server, 'POST', '/v1/completions', values, **headers)
  return status, json.loads(body)['error']
