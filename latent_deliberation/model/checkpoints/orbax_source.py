"""Orbax checkpoints of a tree of arrays, such as those of Google's gemma library."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Sharding

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError
from latent_deliberation.model.checkpoints.source import Stored

_MARKS = ('_METADATA', 'manifest.ocdbt', 'checkpoint')


def is_orbax(directory: Path) -> bool:
  """Whether a directory looks like an orbax checkpoint."""
  return any((directory / mark).is_file() for mark in _MARKS)


class OrbaxSource:
  """A Source. Opening it reads metadata only.

  Args:
    rename: from the keys of an array, joined by '/', to its name in `tensors`.

  Raises:
    UserError: the checkpoint cannot be read, or an array is there twice.
  """

  def __init__(self, directory: Path, rename: Callable[[str], str]):
    self.directory = Path(directory).absolute()
    self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
      metadata = self._checkpointer.metadata(self.directory).item_metadata
    except Exception as error:  # orbax raises many kinds for files that are cut short or missing
      raise UserError(f'{directory} is not a whole orbax checkpoint ({_short(error)}): download '
                       'or write it again') from error
    if metadata is None:  # orbax only logs what it could not read
      raise UserError(f'{directory} is not a whole orbax checkpoint (its _METADATA is missing or '
                       'damaged): download or write it again')
    self.tensors: dict[str, Stored] = {}
    self._keys: dict[str, tuple[str, ...]] = {}
    for keys, leaf in traverse_util.flatten_dict(metadata.tree).items():
      name = rename('/'.join(map(str, keys)))
      if name in self.tensors:
        raise UserError(f'{directory} has {name} twice, under {self._keys[name]} and {keys}: '
                         'write it again with one of the two')
      self.tensors[name] = Stored(tuple(leaf.shape), str(leaf.dtype))
      self._keys[name] = keys

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """See Source."""
    keys = self._keys[name]
    leaf = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, strict=False)
    wanted = jax.ShapeDtypeStruct(shape, self.tensors[name].dtype, sharding=sharding)
    try:
      restored = self._checkpointer.restore(self.directory, args=ocp.args.PyTreeRestore(
          item=traverse_util.unflatten_dict({keys: wanted}),
          restore_args=traverse_util.unflatten_dict({keys: leaf}), partial_restore=True))
    except Exception as error:  # as above
      raise UserError(f'{name} of {self.directory} cannot be read ({_short(error)}): the '
                       'checkpoint is damaged; download or write it again') from error
    return traverse_util.flatten_dict(restored)[keys]


def _short(error: Exception) -> str:
  """What an error says, without the whole specification of a TensorStore."""
  return textwrap.shorten(str(error), 200)
