"""Addresses of repositories become local files, with huggingface_hub's functions replaced."""

import re
from pathlib import Path

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import hub
from latent_deliberation.model.checkpoints.hugging_face_config import COMPANIONS

library = pytest.importorskip('huggingface_hub')


class FakeRepository:
  """Takes the place of the library's functions: files of a repository, and what was requested."""

  def __init__(self, directory, files):
    self.directory, self.files, self.requests, self.has_network = directory, files, [], True

  def write(self, name):
    (self.directory / name).write_bytes(b'GGUF')
    return str(self.directory / name)

  def snapshot_download(self, repo, revision, allow_patterns):
    self.requests.append((repo, revision))
    for name in self.files:
      if any(Path(name).match(pattern) for pattern in allow_patterns):
        self.write(name)
    return str(self.directory)

  def hf_hub_download(self, repo, file, revision):
    self.requests.append((repo, file, revision))
    return self.write(file)

  def list_repo_files(self, repo, revision):
    if not self.has_network:
      raise library.errors.OfflineModeIsEnabled('offline')
    return self.files


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A function that makes a repository of these files."""
  def make(*files):
    repository = FakeRepository(tmp_path, files)
    for name in ('snapshot_download', 'hf_hub_download', 'list_repo_files'):
      monkeypatch.setattr(library, name, getattr(repository, name))
    return repository

  return make


def test_safetensors(fake, tmp_path):
  """Config, safetensors, tokenizer and what texts are written with are downloaded, and no more."""
  repository = fake('config.json', 'model-00001-of-00002.safetensors', 'tokenizer.model',
                    'model.safetensors.index.json', 'tokenizer.json', 'consolidated.safetensors',
                    'pytorch_model.bin', 'README.md', 'model-Q4_K_M.gguf', *COMPANIONS[1:])
  assert hub.download('hf://org/name') == tmp_path
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
      {'config.json', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json',
       'tokenizer.model', *COMPANIONS})
  assert repository.requests == [('org/name', None)]


@pytest.mark.parametrize('address, request_', [
    ('hf://org/name', ('org/name', 'one.gguf', None)),
    ('hf://org/name@v1.0/a', ('org/name', 'one.gguf', 'v1.0/a')),
    ('hf://org/name/one.gguf', ('org/name', 'one.gguf', None)),
    ('hf://org/name/one.gguf@main', ('org/name', 'one.gguf', 'main'))])
def test_gguf(fake, tmp_path, address, request_):
  """The one GGUF file of a repository is found by its address, with or without its name."""
  repository = fake('README.md', 'config.json', 'one.gguf')
  assert hub.download(address) == tmp_path / 'one.gguf'
  assert repository.requests[-1] == request_
  repository.has_network = False  # where the cache is what there is
  assert hub.download(address) == tmp_path / 'one.gguf'
  # A Path keeps one of the two slashes. The file opens, and says that it is no decoder.
  with pytest.raises(UserError, match=f'{tmp_path}/one.gguf .*GGUF file'):
    weights.open_checkpoint(Path(address))


def test_gguf_of_several_in_the_cache(fake, tmp_path):
  """A file that was downloaded by its name does not stand for the repository."""
  repository = fake('a.gguf', 'b.gguf')
  assert hub.download('hf://org/name/a.gguf') == tmp_path / 'a.gguf'
  with pytest.raises(UserError, match='hf://org/name has 2 GGUF files'):
    hub.download('hf://org/name')
  repository.has_network = False
  hub.download('hf://org/name/b.gguf')
  with pytest.raises(UserError, match='hf://org/name cannot be downloaded'):
    hub.download('hf://org/name')


@pytest.mark.parametrize('files, message', [
    (('weights.safetensors', 'adapter.bin', 'README.md'),
     'neither model.*safetensors nor a GGUF file, but weights.safetensors, adapter.bin: '),
    (('README.md',), 'but no weights'),
    (('a.gguf', 'b.gguf'), 'hf://org/name has 2 GGUF files: .*hf://org/name/FILE.gguf.*a.gguf, b'),
    (('config.json', 'pytorch_model.bin'),
     'neither model.*safetensors nor .* but pytorch_model.bin')])
def test_no_weights_or_several(fake, files, message):
  """Several GGUF files are listed; a repository without weights that we read is refused."""
  fake(*files)
  with pytest.raises(UserError, match=message):
    hub.download('hf://org/name')


@pytest.mark.parametrize('address', ['hf://gpt2', 'hf://org/name/model.safetensors', 'hf://org/n@'])
def test_malformed_address(address):
  """What is no address of a repository is refused before anything is requested."""
  with pytest.raises(UserError, match=f'{address}: .*hf://ORG/NAME@REVISION'):
    hub.download(address)


@pytest.mark.parametrize('error, message', [
    ('GatedRepoError', 'gated.*https://huggingface.co/org/name.*hf auth login.*HF_TOKEN'),
    ('RepositoryNotFoundError', 'does not exist.*HF_TOKEN'),
    ('RevisionNotFoundError', 'no such revision.*@'),
    ('EntryNotFoundError', 'no such file.*https://huggingface.co/org/name')])
def test_refused(monkeypatch, error, message):
  """Errors of the library become one line with the remedy."""
  kind = getattr(library.errors, error)

  def refuse(*unused, **also):
    raise kind.__new__(kind)  # its arguments are an answer of the server

  monkeypatch.setattr(library, 'snapshot_download', refuse)
  with pytest.raises(UserError, match=f'hf://org/name@v1 .*{message}'):
    hub.download('hf://org/name@v1')


def test_no_network(monkeypatch, tmp_path):
  """Without a network, the library's own error becomes one line; what is cached is found."""
  cache = tmp_path / 'cache'
  monkeypatch.setattr(library.constants, 'HF_HUB_CACHE', str(cache))
  monkeypatch.setattr(library.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(UserError, match='hf://org/name .*network.*hf download org/name'):
    hub.download('hf://org/name')
  snapshot = cache / 'models--org--name/snapshots' / ('0' * 40)
  (cache / 'models--org--name/refs').mkdir(parents=True)
  (cache / 'models--org--name/refs/main').write_text(snapshot.name)
  snapshot.mkdir(parents=True)
  (snapshot / 'model.safetensors').write_bytes(b'')
  assert hub.download('hf://org/name') == snapshot


def test_library_missing(monkeypatch):
  """Without the library, the error says how to install it."""
  monkeypatch.setattr(hub.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=re.escape("pip install -e '.[hub]'")):
    hub.download('hf://org/name')
