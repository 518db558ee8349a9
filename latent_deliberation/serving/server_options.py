"""Options of a server, checked before anything is loaded."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from latent_deliberation.errors import UserError, check_integer, check_number
from latent_deliberation.files import read_text

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
_FEWEST_CHARACTERS = 16  # of a key


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """Options of a server, checked before a decoder is loaded.

  Attributes:
    decoder: directory, GGUF file or name of the decoder.
    name: name of the decoder in requests; '' for the last part of `decoder`.
    coprocessor: directory of a coprocessor of one's own, which is the expert 'own'; '' for none.
    experts: folder of experts to follow; '' for that of added experts, 'none' for none.
    router: what NAME+auto means; see `experts.routing`.
    vocabulary, dtype: see `api.load_decoder`.
    host, port: where to listen.
    key_file: file with the key that requests must have; '' for none, on loopback alone.
    rows: texts that are decoded together.
    length: tokens of a text, prompt included.
    most_queued: texts that may wait.
    most_texts: texts of one request.
    most_bytes: bytes of one request.
    request_seconds: time that a text may take, wait included.
    latent_seconds: time after which a text goes on without latents.
    drain_seconds: time in which running texts may end when the server ends.
    look_seconds: time between two looks at the folder of experts.
  """
  decoder: str
  name: str = ''
  coprocessor: str = ''
  experts: str = ''
  router: str = 'gain'
  vocabulary: str = ''
  dtype: str = 'float32'
  host: str = '127.0.0.1'
  port: int = 8000
  key_file: str = ''
  rows: int = 8
  length: int = 2048
  most_queued: int = 256
  most_texts: int = 16
  most_bytes: int = 2**20
  request_seconds: float = 120.0
  latent_seconds: float = 10.0
  drain_seconds: float = 30.0
  look_seconds: float = 5.0

  def __post_init__(self):
    check_integer('port', self.port, 0, 65535)
    check_integer('rows', self.rows, 1, 1024)
    for name in ('length', 'most_queued', 'most_texts', 'most_bytes'):
      check_integer(name, getattr(self, name), 1)
    for name in ('request_seconds', 'latent_seconds', 'drain_seconds', 'look_seconds'):
      check_number(name, getattr(self, name), 0)
    if self.latent_seconds >= self.request_seconds:
      raise UserError(f'latent_seconds = {self.latent_seconds:g}: a text whose expert hangs needs '
                      'time to go on without it, so give less than request_seconds = '
                      f'{self.request_seconds:g}')
    if not re.fullmatch(r'[\w.-]{1,80}', self.served_name):
      raise UserError(f'name = {self.served_name!r:.80}: give up to 80 letters, digits and . _ -')
    if not self.key_file and self.host not in LOOPBACK:
      raise UserError(f'host = {self.host!r} without a key: whoever reaches this machine could use '
                      'the server. Give --key_file, or stay with --host=127.0.0.1')

  @property
  def served_name(self) -> str:
    """Name of the decoder in requests."""
    return self.name or Path(self.decoder).name or 'decoder'

  def read_key(self) -> str:
    """Returns the key. Raises UserError where the file is absent or the key too short."""
    if not self.key_file:
      return ''
    key = read_text(Path(self.key_file), 'the key of the server').strip()
    if len(key) < _FEWEST_CHARACTERS or not key.isascii() or not key.isprintable() or ' ' in key:
      raise UserError(f'{self.key_file} has a key of {len(key)} characters: write one line '
                      f'of {_FEWEST_CHARACTERS} or more ASCII characters without spaces, such '
                      'as that of: openssl rand -hex 32')
    return key


def check_libraries() -> None:
  """Raises UserError where the libraries of the server are not installed."""
  missing = [name for name in ('starlette', 'uvicorn', 'prometheus_client')
             if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"the server needs {' and '.join(missing)}: pip install -e '.[serve]'")
