"""A folder of experts that a server follows: what is put there is attached, what leaves, detached.

Each package in the folder is an expert under the name on its card. So experts come and go while
texts run, by launch/experts.py add and remove, and never by a request.
"""

import threading
from pathlib import Path

from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import list_added
from latent_deliberation.experts.attach import Experts


class ExpertFolder:
  """Keeps the experts of one folder attached."""

  def __init__(self, experts: Experts, directory: Path):
    """Follows a folder, which need not exist yet."""
    self._experts, self._directory = experts, directory
    self._taken = experts.names  # attached by somebody else, who detaches them
    # By name of what was attached, or refused: fingerprint, and a mark of its files.
    self._known: dict[str, tuple[str, int]] = {}
    self._stopped = threading.Event()

  def look(self) -> None:
    """Attaches and detaches what has changed since the last look.

    Of several packages with one name, the first by address stays. A package of another decoder, or
    with a name that is taken, is left out, with one warning.
    """
    found: dict[str, tuple[tuple[str, int], Path]] = {}
    for card, path in list_added(self._directory):
      try:
        found.setdefault(card.name, ((card.fingerprint, _mark_of(path)), path))
      except FileNotFoundError:  # removed meanwhile
        continue
    gone = [name for name, version in self._known.items()
            if name not in found or found[name][0] != version]
    for name in gone:
      del self._known[name]
      if name in self._experts.names and name not in self._taken:
        self._experts.detach(name)
        logging.info('The expert %s was removed.', name)
    if gone:  # those that were refused may fit now, since all have the same latents
      self._known = {name: version for name, version in self._known.items()
                     if name in self._experts.names}
    for name, (version, path) in found.items():
      if name not in self._known:
        try:
          self._add(name, version[0], path)
        except Exception:  # such as no memory; other experts may fit, and the next look tries again
          logging.exception('%s could not be attached', path)
        else:
          self._known[name] = version

  def _add(self, name: str, fingerprint: str, path: Path) -> None:
    if name in self._taken:
      logging.warning('%s is left out: another expert has the name %r', path, name)
    elif self._experts.attach(name, path):
      logging.info('The expert %s@%s is attached.', name, fingerprint)

  def follow(self, seconds: float) -> None:
    """Looks again every so many seconds, in a thread, until `stop` is called."""
    def work() -> None:
      while not self._stopped.wait(seconds):
        try:
          self.look()
        except (UserError, OSError) as error:  # half a package, or a folder that has gone
          logging.warning('%s: %s', self._directory, error)
        except Exception:
          logging.exception('%s could not be followed', self._directory)

    threading.Thread(target=work, daemon=True, name='expert folder').start()

  def stop(self) -> None:
    """Ends the thread after its look."""
    self._stopped.set()


def _mark_of(package: Path) -> int:
  """Returns a number that changes with any file of a package, such as one that is still copied."""
  # Of a link, its own: an editor's lock is a link to nowhere.
  stats = [(path.name, path.lstat()) for path in sorted(package.rglob('*'))]
  return hash(tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
