"""Options, the folder of experts, and the process itself: what is refused, and a clean end."""

import dataclasses
import importlib.util
import threading

import pytest

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.errors import UserError
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.package import write_package
from latent_deliberation.serving import server as server_module
from latent_deliberation.serving.expert_folder import ExpertFolder
from latent_deliberation.serving.server import run_server
from latent_deliberation.serving.server_options import ServerOptions, check_libraries
from tests.experts import small
from tests.serving import small_server
from tests.serving.small_server import complete


@pytest.mark.parametrize('values, message', [
    ({'port': 70000}, 'port = 70000'), ({'rows': 0}, 'rows = 0'), ({'length': 0}, 'length = 0'),
    ({'latent_seconds': -1.0}, 'latent_seconds = -1'), ({'name': 'a+b'}, r"name = 'a\+b'"),
    ({'host': '0.0.0.0'}, "host = '0.0.0.0' without a key"), ({'most_queued': 0}, 'most_queued')])
def test_bad_options(values, message):
  """They are refused before a decoder is loaded."""
  with pytest.raises(UserError, match=message):
    ServerOptions('nothing', **values)


def test_key_file(tmp_path):
  path = tmp_path / 'key'
  options = ServerOptions('decoder', key_file=str(path), host='0.0.0.0')
  for content, message in (
      (None, 'no file'), ('short', '5 characters'), ('two words' * 3, '27 characters')):
    if content is not None:
      path.write_text(content)
    with pytest.raises(UserError, match=message):
      options.read_key()
  path.write_text('0123456789abcdef\n')
  assert options.read_key() == '0123456789abcdef'
  assert ServerOptions('decoder').read_key() == ''
  assert ServerOptions('runs/a/decoder').served_name == 'decoder'


@pytest.mark.parametrize('missing', ['starlette', 'uvicorn', 'prometheus_client'])
def test_missing_libraries_are_named(monkeypatch, missing):
  """All that the server imports, and what installs them."""
  check_libraries()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == missing else name)
  with pytest.raises(UserError, match=rf"needs {missing}: pip install -e '\.\[serve\]'"):
    check_libraries()


def write(folder, name, seed):
  expert = small_server.expert(name, seed)
  return write_package(folder / f'{name}@{seed}', expert.card, expert.coprocessor,
                       routing=expert.routing)


def test_folder_is_followed(tmp_path):
  """Experts come and go with their packages; a new version takes the place of the old one."""
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  folder = ExpertFolder(experts, tmp_path / 'none')
  folder.look()
  assert experts.names == ()
  folder = ExpertFolder(experts, tmp_path)
  first = write(tmp_path, 'stars', 1)
  folder.look()
  assert experts.names == ('stars',) and experts.card('stars').address == first.address
  write(tmp_path, 'law', 2)
  folder.look()
  assert experts.names == ('stars', 'law')
  (tmp_path / 'stars@1').rename(tmp_path / '.stars')  # hidden ones are not finished
  folder.look()
  assert experts.names == ('law',)
  write(tmp_path, 'stars', 3)
  folder.look()
  assert set(experts.names) == {'stars', 'law'}
  assert experts.card('stars').address != first.address


def test_damaged_package_is_left_out(tmp_path, monkeypatch):
  """It is tried once, and the others are served."""
  write(tmp_path, 'stars', 1)
  write(tmp_path, 'law', 2)
  weights, = (tmp_path / 'law@2').rglob('coprocessor.safetensors')
  weights.write_bytes(b'x' * weights.stat().st_size)
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  tried, attach = [], experts.attach
  monkeypatch.setattr(experts, 'attach',
                      lambda name, path: tried.append(name) or attach(name, path))
  folder = ExpertFolder(experts, tmp_path)
  for _ in range(2):
    folder.look()
    assert experts.names == ('stars',) and sorted(tried) == ['law', 'stars']


def test_expert_without_memory(tmp_path, monkeypatch, caplog):
  """It is tried again, and the others are served."""
  write(tmp_path, 'law', 2)
  write(tmp_path, 'stars', 1)
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  attach, room = experts.attach, []

  def attach_if_room(name, path):
    if name == 'law' and not room:
      raise MemoryError
    return attach(name, path)

  monkeypatch.setattr(experts, 'attach', attach_if_room)
  folder = ExpertFolder(experts, tmp_path)
  folder.look()
  assert experts.names == ('stars',) and 'law@2 could not be attached' in caplog.text
  room.append(True)
  folder.look()
  assert set(experts.names) == {'stars', 'law'}


def test_link_to_nowhere_in_a_package(tmp_path):
  """Such as the lock of an editor: the others are served."""
  write(tmp_path, 'stars', 1)
  write(tmp_path, 'law', 2)
  (tmp_path / 'law@2/.#README.md').symlink_to('nowhere')
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  ExpertFolder(experts, tmp_path).look()
  assert 'stars' in experts.names


def test_repaired_package_is_tried_again(tmp_path):
  """Such as one that was looked at while it was copied."""
  write(tmp_path, 'stars', 1)
  weights, = (tmp_path / 'stars@1').rglob('coprocessor.safetensors')
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-8])
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  folder = ExpertFolder(experts, tmp_path)
  folder.look()
  assert experts.names == ()
  weights.write_bytes(whole)
  folder.look()
  assert experts.names == ('stars',)


def test_refused_expert_is_tried_again(tmp_path):
  """Once the one is gone that has latents of another number."""
  write(tmp_path, 'stars', 1)
  other = small_server.expert('law', 2)
  two = small.lora(2, num_latents=2)  # latents do not depend on the size of the vocabulary
  write_package(tmp_path / 'law@2',
                dataclasses.replace(other.card, latents={**other.card.latents, 'number': 2}),
                dataclasses.replace(other.coprocessor, config=two.config, params=two.params))
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  folder = ExpertFolder(experts, tmp_path)
  folder.look()
  assert len(experts.names) == 1
  refused, = {'stars', 'law'} - set(experts.names)
  first, = tmp_path.glob(f'{experts.names[0]}@*')
  first.rename(tmp_path / '.gone')
  folder.look()
  assert experts.names == (refused,)


def test_folder_is_followed_after_an_error(tmp_path, monkeypatch):
  """A look that fails does not end the looks."""
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  folder, looks = ExpertFolder(experts, tmp_path), threading.Semaphore(0)

  def look():
    looks.release()
    raise RuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(folder, 'look', look)
  folder.follow(0.01)
  assert looks.acquire(timeout=20) and looks.acquire(timeout=20)
  folder.stop()


def test_expert_arrives_while_the_server_runs(tmp_path):
  """A server that began without experts serves one that is added."""
  experts = Experts(small_server.decoder(), {}, length=small_server.LENGTH)
  folder = ExpertFolder(experts, tmp_path)
  with small_server.serving(experts) as server:
    before = complete(server)['choices'][0]['text']
    write(tmp_path, 'stars', 1)
    folder.look()
    found = complete(server, model='tiny+stars')['choices'][0]
    assert found['latents']['experts'] == {'stars': 1.0}
    assert complete(server)['choices'][0]['text'] == before


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A trained coprocessor and its directory; a decoder of any name is the tiny one."""
  trained = small_server.expert('stars', 1).coprocessor
  monkeypatch.setattr(server_module, 'load_decoder', lambda *unused, **more: small_server.decoder())
  coprocessor_checkpoint.save(tmp_path / 'coprocessor', trained)
  return trained, tmp_path / 'coprocessor'


def test_coprocessor_of_ones_own(own, tmp_path, monkeypatch):
  """It is the expert 'own', whatever comes into the folder or leaves it."""
  write(tmp_path / 'folder', 'own', 2)
  write(tmp_path / 'folder', 'stars', 3)
  served = []
  monkeypatch.setattr(server_module.RunningServer, 'serve', lambda self: served.append(self))
  run_server(ServerOptions('tiny', port=0, coprocessor=str(own[1]), length=96,
                           experts=str(tmp_path / 'folder')), warm_up=False)
  server, = served
  experts, folder = server.service.experts, server._folder
  assert experts.names == ('own', 'stars') and experts.card('own') is None
  assert not experts.strict
  (tmp_path / 'folder/own@2').rename(tmp_path / 'gone')
  folder.look()
  assert experts.names == ('own', 'stars')
  folder.stop()
  server.service.batcher.close(0)


@pytest.mark.parametrize('change, message', [
    ({'decoder_fingerprint': 'd1'}, 'd1'), ({'vocabulary_hash': 'v1'}, 'vocabulary v1')])
def test_foreign_coprocessor_ends_the_server(own, tmp_path, change, message):
  """It was asked for, so there is no plain server in its place."""
  trained = dataclasses.replace(own[0], **change)
  coprocessor_checkpoint.save(tmp_path / 'foreign', trained)
  with pytest.raises(UserError, match=f"'own'.*{message}"):
    run_server(ServerOptions('tiny', port=0, coprocessor=str(tmp_path / 'foreign'), experts='none'))
  with pytest.raises(UserError, match='no trained coprocessor'):
    run_server(ServerOptions('tiny', port=0, coprocessor=str(tmp_path / 'no'), experts='none'))


def test_run_server(tmp_path, monkeypatch, capsys):
  """Everything is loaded and warmed up, one line says where, and it ends when told to."""
  write(tmp_path, 'stars', 1)
  monkeypatch.setattr(server_module, 'load_decoder', lambda *unused, **more: small_server.decoder())
  served = []

  def serve(self):
    served.append(self.service.batcher.running)
    self.stop()
    original(self)

  original = server_module.RunningServer.serve
  monkeypatch.setattr(server_module.RunningServer, 'serve', serve)
  run_server(ServerOptions('tiny', port=0, experts=str(tmp_path), length=96, rows=2))
  printed = capsys.readouterr().out
  assert "Serving tiny with the experts ['stars'] at http://127.0.0.1:" in printed
  assert served == [0]
  with pytest.raises(UserError, match='kv-cache of 1024 texts .* or fewer rows'):
    run_server(ServerOptions('tiny', port=0, experts='none', length=10**9, rows=1024))


def test_port_that_is_taken():
  with small_server.serving(small_server.experts()) as server:
    with pytest.raises(UserError, match=f'port = {server.port}'):
      with small_server.serving(small_server.experts(), port=server.port):
        pass
