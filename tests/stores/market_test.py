"""Indexes of experts in buckets and on the hub of Hugging Face are read like any other."""

import http.server
import json
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import add, list_added
from latent_deliberation.experts.index import publish, read_index
from latent_deliberation.experts.package import check_package, write_package
from tests import finished
from tests.experts import small
from tests.loopback import served
from tests.stores.contents_test import upload
from tests.stores.object_store import Fault

REPO = 'somebody/market'


@pytest.fixture(scope='module')
def market(tmp_path_factory):
  """A folder with an index of one expert, and its card."""
  place = tmp_path_factory.mktemp('market')
  write_package(place / 'package', small.card('stars'), small.lora(1))
  return place / 'index', publish(place / 'package', place / 'index', force=True)


def served_hub(folder):
  """Serves a folder as the data set REPO of a hub; yields the hub's address.

  It answers what a client asks to read a file: facts of paths, and contents from an offset on.
  """
  def facts(name):
    path = folder / name
    kind = 'file' if path.is_file() else 'directory'
    return {'type': kind, 'path': name, 'oid': 'a' * 40, 'size': path.stat().st_size}

  class Hub(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
      """Facts of the paths that the body names."""
      assert self.path == f'/api/datasets/{REPO}/paths-info/main'
      body = self.rfile.read(int(self.headers['Content-Length'])).decode()
      asked = urllib.parse.parse_qs(body)['paths']
      self.answer(json.dumps([facts(path) for path in asked if (folder / path).exists()]).encode())

    def do_GET(self):  # noqa: N802
      """A file, the facts of a folder's files, or those of the data set."""
      path = urllib.parse.unquote(self.path.partition('?')[0])
      if path.startswith(tree := f'/api/datasets/{REPO}/tree/main'):
        inside = folder / path.removeprefix(tree).strip('/')
        if not inside.is_dir():
          self.send_error(404)
          return
        self.answer(json.dumps([facts(each.relative_to(folder).as_posix())
                                for each in inside.iterdir()]).encode())
        return
      if path.startswith('/api/'):
        self.answer(json.dumps({'id': REPO, 'sha': 'b' * 40}).encode())
        return
      file: Path = folder / path.removeprefix(f'/datasets/{REPO}/resolve/main/')
      if not file.is_file():
        self.send_error(404)
        return
      content, span = file.read_bytes(), self.headers.get('Range', '')
      first, _, last = span.removeprefix('bytes=').partition('-')
      self.answer(content[int(first or 0):int(last) + 1 if last else None], 206 if span else 200)

    def answer(self, content, status=200):
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *unused):
      pass

  return served(Hub)


def test_in_a_bucket(market, store, place, tmp_path):
  """An index in a bucket is listed, and an expert is added from it; a lost right is told."""
  folder, card = market
  upload(folder, place)
  assert [entry.address for entry in read_index(str(place))] == [card.address]
  found, directory = add('stars', tmp_path, str(place))
  assert found == card == check_package(directory)
  store.faults['refuse'] = Fault(status=403)
  with pytest.raises(UserError, match=f'{place}/index.json cannot be read'):
    read_index(str(place))


def test_on_the_hub(market, tmp_path):
  """The same over hf://, by the commands, from a hub on this machine."""
  pytest.importorskip('huggingface_hub')
  folder, card = market
  place = f'hf://datasets/{REPO}'
  with served_hub(folder) as url:
    def run(*words):
      environment = finished.environment() | {
          'HF_ENDPOINT': url, 'HF_HUB_OFFLINE': '0', 'HF_HOME': str(tmp_path / 'home'),
          'LATENT_DELIBERATION_EXPERTS': str(tmp_path / 'added')}
      return subprocess.run([sys.executable, 'launch/experts.py', *words], cwd=finished.ROOT,
                            env=environment, capture_output=True, text=True, timeout=300)

    assert card.address in run('list', f'--index={place}').stdout
    assert run('add', f'{place}/stars').returncode == 0
  assert list_added(tmp_path / 'added') == [(card, tmp_path / 'added' / card.address)]
