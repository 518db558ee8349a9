"""A server from its options: loads, warms up, listens, and ends cleanly."""

import asyncio
import logging as python_logging
import socket
import threading
from collections.abc import Sequence
from typing import Any

import uvicorn
from absl import logging

from latent_deliberation.api import load_coprocessor, load_decoder
from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import added_directory
from latent_deliberation.experts.attach import Experts
from latent_deliberation.inference.engine import GREEDY, LoadedDecoder
from latent_deliberation.inference.ring_cache import check_length
from latent_deliberation.inference.session import ends_of
from latent_deliberation.progress import announced
from latent_deliberation.serving.batcher import Batcher, TextRequest
from latent_deliberation.serving.expert_folder import ExpertFolder
from latent_deliberation.serving.expert_guard import ExpertGuard
from latent_deliberation.serving.http_api import Service, build_app
from latent_deliberation.serving.protocol import Limits
from latent_deliberation.serving.server_options import LOOPBACK, ServerOptions
from latent_deliberation.serving.service_metrics import ServiceMetrics

OWN_EXPERT = 'own'  # name of the expert that --coprocessor is


class RunningServer:
  """A decoder, its experts and a batcher behind HTTP.

  Attributes:
    service: what the API serves.
    port: port on which it listens.
  """

  def __init__(self, options: ServerOptions, loaded: LoadedDecoder, experts: Experts,
               key: str = '', folder: ExpertFolder | None = None):
    """Starts the batcher and opens the port; `serve` answers.

    Raises:
      UserError: the port is taken, or not ours.
    """
    self.options, self._folder = options, folder
    self._socket = _listen(options.host, options.port)
    self.port = self._socket.getsockname()[1]
    metrics = ServiceMetrics()
    batcher = Batcher(ExpertGuard(experts, options.latent_seconds), options.rows,
                      ends_of(loaded.tokenizer), loaded.tokenizer.size,
                      most_queued=options.most_queued, seconds=options.request_seconds,
                      metrics=metrics)
    hosts = ('127.0.0.1', 'localhost', '[::1]', '::1') if options.host in LOOPBACK else ('*',)
    self.service = Service(
        options.served_name, experts, loaded.tokenizer, batcher,
        Limits(options.length, options.most_texts, options.most_bytes, options.rows), metrics, key,
        hosts)
    config = uvicorn.Config(
        build_app(self.service), loop='asyncio', http='h11', ws='none', lifespan='off',
        access_log=False, log_config=None, server_header=False, timeout_keep_alive=15,
        limit_concurrency=4 * options.most_queued + 64,
        timeout_graceful_shutdown=int(options.drain_seconds) + 10)
    self._server = _Server(config, self._drain)

  def warm_up(self) -> None:
    """Compiles the programs that every text needs, so that the first requests do not wait."""
    service, guard = self.service, self.service.batcher.guard
    guard.timeout = self.options.request_seconds  # compiling is no fault of an expert
    ids = [service.tokenizer.bos] * (service.experts.first_anchor + 2)
    # One after the other: the likeliest tokens are reported by another program.
    for choice, wants_top in ((None, False), (None, True), *(
        (name, False) for name in service.experts.names[:1])):
      ended = threading.Event()
      service.batcher.submit([TextRequest(ids, '', (choice,), GREEDY, 0, 2, None, wants_top)],
                             [lambda update, ended=ended: update.ended_by and ended.set()])
      ended.wait(self.options.request_seconds)
    guard.timeout = self.options.latent_seconds

  def serve(self) -> None:
    """Answers requests until SIGTERM, SIGINT or `stop`, and then ends what runs."""
    try:
      self._server.run([self._socket])
    except KeyboardInterrupt:  # uvicorn raises the signal again once all is done
      pass
    finally:
      if self._folder is not None:
        self._folder.stop()
      self.service.batcher.close(0)
      self._socket.close()

  def stop(self) -> None:
    """Ends `serve`, as a signal does."""
    self._server.should_exit = True

  def _drain(self) -> None:
    self.service.batcher.close(self.options.drain_seconds)


class _Server(uvicorn.Server):
  """A server whose batcher finishes its texts while connections are still open."""

  def __init__(self, config: uvicorn.Config, drain: Any):
    super().__init__(config)
    self._drain = drain

  async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
    """Takes no more requests, and lets those that are here end."""
    draining = asyncio.create_task(asyncio.to_thread(self._drain))
    await super().shutdown(list(sockets or []))
    await draining


def _listen(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)  # from here on clients wait, and are not refused
  except (OSError, TypeError, UnicodeError) as error:  # the last two for a name that is none
    listener.close()
    raise UserError(f'host = {host!r}, port = {port}: {getattr(error, "strerror", error)}. Give '
                    'another one') from error
  return listener


def run_server(options: ServerOptions, warm_up: bool = True) -> None:
  """Loads everything and serves until the process is told to end.

  Raises:
    UserError: the decoder, the coprocessor, the key or the port cannot be used.
  """
  key = options.read_key()
  _listen(options.host, options.port).close()  # a port that is taken is told before the long part
  own = {OWN_EXPERT: load_coprocessor(options.coprocessor)} if options.coprocessor else {}
  loaded = load_decoder(options.decoder, vocabulary=options.vocabulary, dtype=options.dtype)
  check_length(loaded.config, options.length, loaded.dtype, texts=options.rows)
  experts = Experts(loaded, own, length=options.length, router=options.router, strict=True)
  experts.strict = False  # unlike the coprocessor, experts of the folder may be left out
  folder = None
  if options.experts != 'none':
    folder = ExpertFolder(experts, added_directory(options.experts))
    folder.look()
  server = RunningServer(options, loaded, experts, key, folder)
  if warm_up:
    with announced('compiling'):
      server.warm_up()
  if folder is not None:
    folder.follow(options.look_seconds)
  python_logging.getLogger('uvicorn').setLevel(python_logging.WARNING)
  host = f'[{options.host}]' if ':' in options.host else options.host
  print(f'Serving {options.served_name} with the experts {list(experts.names)} at '
        f'http://{host}:{server.port}/ (Ctrl-C ends it)', flush=True)
  server.serve()
  logging.info('The server has ended, and all texts with it.')
