"""Decoders in repositories of Hugging Face: hf://ORG/NAME, downloaded once by huggingface_hub.

  hf://ORG/NAME              config, safetensors and tokenizer; or the one GGUF file that it has
  hf://ORG/NAME/FILE.gguf    one of several GGUF files
  hf://ORG/NAME@REVISION     a branch, tag or commit; default main

The library keeps downloads in its own cache, where they are found without a network. Without one,
the only GGUF file of a repository in the cache is taken to be its only one.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.hugging_face_config import COMPANIONS, CONFIG
from latent_deliberation.model.checkpoints.safetensors_io import INDEX
from latent_deliberation.model.checkpoints.source import PICKLES

_ADDRESS = re.compile(
    r'hf://(?P<repo>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>.+))?')
_PATTERNS = (CONFIG, 'model*.safetensors', INDEX, 'tokenizer*', *COMPANIONS)
# Errors of the library, by class: what is wrong, and what to do. The first that fits counts.
_REMEDIES = (
    ('GatedRepoError', 'is gated', 'accept its terms at https://huggingface.co/{repo}, then log in '
     'with `hf auth login` or set HF_TOKEN'),
    ('RepositoryNotFoundError', 'does not exist, or is private', 'check the name; for a private '
     'one, log in with `hf auth login` or set HF_TOKEN'),
    ('RevisionNotFoundError', 'has no such revision', 'give a branch, tag or commit after @'),
    ('LocalEntryNotFoundError', 'is not in the cache, and the network cannot be reached',
     'connect this machine; or run `hf download {repo} --local-dir DIR` on another one, copy DIR '
     'here and give its path'),
    ('EntryNotFoundError', 'has no such file', 'give one that is listed at '
     'https://huggingface.co/{repo}'),
    ('HFValidationError', 'is not the name of a repository', 'give hf://ORG/NAME'))


def is_address(text: str) -> bool:
  """Whether a text begins as the address of a repository does."""
  return text.startswith('hf:/')


def download(address: str) -> Path:
  """Returns the directory or the GGUF file of a repository, and downloads it if it is not there.

  Raises:
    UserError: the address is malformed, huggingface_hub is not installed, or there is no such
      repository, access or network; or the repository has no weights that we read.
  """
  address = re.sub('^hf:/+', 'hf://', address)  # a Path keeps one of the two slashes
  parts = _ADDRESS.fullmatch(address)
  if parts is None:
    raise UserError(f'{address}: write hf://ORG/NAME, hf://ORG/NAME/FILE.gguf or '
                    'hf://ORG/NAME@REVISION')
  hub = _import_library(address)
  repo, file, revision = parts['repo'], parts['file'], parts['revision']
  try:
    if file:
      return Path(hub.hf_hub_download(repo, file, revision=revision))
    directory = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS))
    if any(directory.glob('*.safetensors')):
      return directory
    # Without safetensors, the repository may have one GGUF file. The cache may lack some of them.
    try:
      names = hub.list_repo_files(repo, revision=revision)
    except Exception:
      cached = list(directory.rglob('*.gguf'))
      if len(cached) == 1:
        return cached[0]
      raise
    files = [name for name in names if name.endswith('.gguf')]
    if len(files) == 1:
      return Path(hub.hf_hub_download(repo, files[0], revision=revision))
  except Exception as error:
    raise _explain(error, address, repo, hub) from error
  if files:
    raise UserError(f'{address} has {len(files)} GGUF files: give one of them as '
                    f'hf://{repo}/FILE.gguf, with FILE.gguf of {", ".join(files)}')
  found = [name for name in names if Path(name).suffix in ('.safetensors', *PICKLES)]
  raise UserError(f'{address} has neither model*.safetensors nor a GGUF file, but '
                  f'{", ".join(found) or "no weights"}: give another repository, or a directory '
                  'that save_pretrained of transformers wrote')


def _import_library(address: str) -> ModuleType:
  """Returns huggingface_hub, which is an extra. UserError: it is not installed."""
  if importlib.util.find_spec('huggingface_hub') is None:
    raise UserError(f"{address} needs the library huggingface_hub: pip install -e '.[hub]'")
  import huggingface_hub
  return huggingface_hub


def _explain(error: Exception, address: str, repo: str, hub: ModuleType) -> UserError:
  """Returns a UserError for an error of the library."""
  for name, wrong, remedy in _REMEDIES:
    if isinstance(error, getattr(hub.errors, name)):
      return UserError(f'{address} {wrong}: {remedy.format(repo=repo)}')
  # The library also raises what its HTTP client and the disk raise.
  return UserError(f'{address} cannot be downloaded ({type(error).__name__}: {error}): try again')
