"""States on disk, and contexts: texts read and augmented once, and decoded from many times.

`save` and `load` keep any state, with latents for its end if there are any. A context is one text,
such as a document or a system prompt, that launch/augment.py saves so that prompts may follow it.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.serialization import from_state_dict, to_state_dict
from safetensors import SafetensorError
from safetensors.flax import load_file

from latent_deliberation.array_types import PyTree
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.files import (
  as_path,
  at_hand,
  explain_failed_write,
  make_writable,
  new_file,
  read_text,
  seal,
  sha256_of,
  unseal,
  whole_directory,
)
from latent_deliberation.inference import passes
from latent_deliberation.inference.engine import NONE, Engine
from latent_deliberation.inference.passes import Augmentation, Model, State
from latent_deliberation.inference.prompt_arrays import Prompts
from latent_deliberation.inference.ring_cache import CachePlan
from latent_deliberation.inference.tokenizer import IDS_BEFORE, Tokenizer
from latent_deliberation.model.checkpoints.safetensors_io import save_tensors
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import with_current_names

_DESCRIPTION, _ARRAYS = 'cache.json', 'cache.safetensors'
_FORMATS = {'bfloat16': 2}  # by dtype, else 1; in format 1, its keys had other axes
_KEYS = ('decoder', 'written', 'texts', 'augmented', 'model', 'dtype', 'coprocessor',
         'global_slots', 'local_slots')
_STORED_NAMES = {  # of some leaves; the others are stored under their paths in the tree
    'state/cache/write_index': 'state/cache/cursor',
    'augmentation/next_position': 'augmentation/anchor',
    'augmentation/next_position_after': 'augmentation/ahead'}


def save(directory: Path, engine: Engine, state: State,
         augmentation: Augmentation | None = None) -> None:
  """Writes a state, and latents for its end if they are given; whole or not at all.

  Raises:
    UserError: `directory` exists already; nothing is overwritten. Or it cannot be written.
  """
  written = int(state.cache.write_index)
  # Slots that no token has reached are not written.
  trimmed = state.replace(cache=state.cache.resized(_trimmed(engine.model.plan, written)))
  arrays = {path: leaf for path, leaf in _flatten(
      {'state': trimmed, 'augmentation': augmentation}).items() if leaf is not None}
  description = {'format': _FORMATS.get(engine.model.decoder.dtype, 1),
                 'decoder': engine.decoder_fingerprint, 'written': written,
                 'texts': len(state.position), 'augmented': augmentation is not None,
                 **_layout(engine)}
  with whole_directory(as_path(directory)) as partial, explain_failed_write(directory):
    with new_file(partial / _ARRAYS) as path:
      save_tensors(path, arrays)
      description['sha256'] = sha256_of(path)
    (partial / _DESCRIPTION).write_text(json.dumps(seal(description), indent=2) + '\n')


def load(directory: Path, engine: Engine) -> tuple[State, Augmentation | None]:
  """Reads a state as it was saved, and its latents (not attached) or None.

  The engine may have another length than the one that saved, if the saved texts fit.

  Raises:
    UserError: there is no cache in `directory`, or it is damaged, of an older version, of another
      decoder, or of another layout.
  """
  directory = at_hand(as_path(directory))
  description = _describe(directory)
  _check(directory, description, engine)

  # The shapes that the description means, which the arrays must have.
  plan = engine.model.plan
  template = _template(dataclasses.replace(
      engine.model, plan=_trimmed(plan, description['written'])), engine, description)
  flat = _flatten(template)
  expected = {path: leaf for path, leaf in flat.items() if leaf is not None}
  arrays = _read(directory / _ARRAYS, description.get('sha256'))
  for path in sorted(arrays.keys() | expected.keys()):
    saved, described = (getattr(tree.get(path), 'shape', None) for tree in (arrays, expected))
    if saved != described:
      raise UserError(f'{directory / _ARRAYS}: {path} has shape {saved}, but {_DESCRIPTION} means '
                      f'{described}: one of the two was replaced. Save the cache again')

  # Build the tree from names on disk, then give it the slots of this engine.
  tree_paths = {stored: path for path, stored in _STORED_NAMES.items()}
  tree = engine.place(from_state_dict(template, traverse_util.unflatten_dict(
      {tree_paths.get(path, path): arrays.get(path) for path in flat}, sep='/')))
  state = tree['state']
  return state.replace(cache=state.cache.resized(plan)), tree['augmentation']


def _flatten(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a tree, None included, by their names on disk."""
  flat = traverse_util.flatten_dict(to_state_dict(tree), sep='/')
  return {_STORED_NAMES.get(path, path): leaf for path, leaf in flat.items()}


def _trimmed(plan: CachePlan, written: int) -> CachePlan:
  """Returns the plan without the slots that no token has reached yet."""
  return dataclasses.replace(plan, global_slots=min(plan.global_slots, written),
                             local_slots=min(plan.local_slots, written))


def _layout(engine: Engine) -> dict[str, Any]:
  """Returns what must be equal in the engine that loads, as JSON gives it back."""
  model, plan = engine.model, engine.model.plan
  layout = {'model': dataclasses.asdict(model.decoder.config), 'dtype': model.decoder.dtype,
            'coprocessor': None, 'global_slots': plan.global_slots,
            'local_slots': plan.local_slots}
  if model.coprocessor is not None:
    # The soft tokens are few, and any training changes them.
    layout['coprocessor'] = {'weights': fingerprint(engine.weights.coprocessor),
                             **dataclasses.asdict(model.coprocessor.config)}
  return json.loads(json.dumps(layout))


def _describe(directory: Path) -> dict[str, Any]:
  path = directory / _DESCRIPTION
  if not path.is_file():
    raise UserError(f'{directory} holds no {_DESCRIPTION}: give a directory that launch/augment.py '
                    'or prefix_cache.save has written')
  try:
    # Saved names of keys and values may be old ones.
    description = with_current_names(unseal(path.read_bytes(), path))
    found, expected = description['format'], _FORMATS.get(description.get('dtype'), 1)
    if found != expected:
      raise UserError(f'{path} has the format {found!r}, expected {expected}. Save the cache again')
  except UserError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or of another format ({type(error).__name__}: {error}). '
                    'Save the cache again') from error
  absent = [key for key in _KEYS if key not in description]
  if absent:
    raise UserError(f'the cache in {directory} is of an older version: its {_DESCRIPTION} lacks '
                    f'{absent}. Save the cache again')
  return description


def _check(directory: Path, description: dict[str, Any], engine: Engine) -> None:
  if description['decoder'] != engine.decoder_fingerprint:
    raise UserError(f'the cache in {directory} was made by a decoder with fingerprint '
                    f'{description["decoder"]}, but this one has {engine.decoder_fingerprint}: '
                    'save the cache again with this decoder')
  # The layout: model, dtype, coprocessor and slots.
  description = _with_defaults(directory, description)
  different = [(name, description[name], value) for name, value in _layout(engine).items()
               if description[name] != value]
  for name, saved, current in different:
    if saved is None or current is None:
      raise UserError(f'the cache in {directory} was made {_with(saved)}, but is to be used '
                      f'{_with(current)}: give the coprocessor that made it, or save it again')
    if isinstance(saved, dict):
      saved, current = _differences(saved, current)
    # The numbers of slots may differ, unless more are written than one of the two has.
    if not name.endswith('_slots') or description['written'] > min(saved, current):
      raise UserError(f'the cache in {directory} has {name} = {saved}, but the current value is '
                      f'{current}, and {description["written"]} slots are written: use the saved '
                      'value, or save the cache again')


def _with_defaults(directory: Path, description: dict[str, Any]) -> dict[str, Any]:
  """Returns the description with the defaults of config keys that are newer than the cache."""
  try:
    filled = {'model': dataclasses.asdict(TransformerConfig(**description['model']))}
    if description['coprocessor'] is not None:
      weights, config = description['coprocessor']['weights'], dict(description['coprocessor'])
      del config['weights']
      filled['coprocessor'] = {
          'weights': weights, **dataclasses.asdict(DeliberationConfig(**config))}
  except (TypeError, KeyError) as error:
    raise UserError(f'the cache in {directory} is of another version ({error}): save it again'
                    ) from error
  return {**description, **json.loads(json.dumps(filled))}


def _with(coprocessor: Any) -> str:
  return 'without a coprocessor' if coprocessor is None else 'with a coprocessor'


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns both, without what they have in common."""
  return [{name: value for name, value in one.items()
           if name not in other or other[name] != value}
          for one, other in ((saved, current), (current, saved))]


def _template(model: Model, engine: Engine, description: dict[str, Any]) -> dict[str, Any]:
  """Returns the shapes of what was saved."""
  # The shapes of a state do not depend on the length of its prompt.
  tokens = jax.ShapeDtypeStruct((description['texts'], 1), np.int32)
  count = jax.ShapeDtypeStruct((description['texts'],), np.int32)
  state = jax.eval_shape(lambda *arrays: passes.read(model, *arrays), engine.weights, tokens,
                         count)
  augmentation = None
  if description['augmented']:
    augmentation = jax.eval_shape(lambda *arrays: passes.augment(model, *arrays), engine.weights,
                                  state)
  return {'state': state, 'augmentation': augmentation}


def _read(path: Path, sha256: str | None) -> dict[str, jax.Array]:
  """Returns the arrays of a file that has this hash; None for a cache of earlier code."""
  try:
    found = sha256_of(path)
    if sha256 not in (None, found):
      raise UserError(f'{path} is damaged: its hash is {found[:16]}..., and was {sha256[:16]}... '
                      'when it was written. Save the cache again')
    return load_file(path)
  except (OSError, SafetensorError) as error:
    raise UserError(f'{path} cannot be read ({error}): it is truncated or absent. Save the cache '
                    'again') from error


@dataclasses.dataclass(frozen=True)
class Context:
  """One text in the decoder's cache, without latents and with them. Neither is ever changed."""
  plain: State
  augmented: State

  @functools.cached_property
  def end(self) -> list[int]:
    """The last ids of the text."""
    count = min(IDS_BEFORE, int(self.plain.lengths[0]))
    return np.asarray(self.plain.cache.newest(count).tokens[0]).tolist()


def check_context(output: Path, document: Path, coprocessor: str) -> str:
  """Returns the text of a document, after all checks that need no decoder.

  Args:
    output: directory to write the context to.
    document: file with the text.
    coprocessor: directory of the coprocessor that makes the latents.

  Raises:
    UserError: `output` exists or cannot be written, the document is absent, empty or not UTF-8, or
      no coprocessor is given.
  """
  if coprocessor in ('', NONE):
    raise UserError(f'--coprocessor={coprocessor}: there is no coprocessor, which makes the '
                    'latents. Give the directory of a trained one')
  if output.exists():
    raise UserError(f'{output} exists already and is not overwritten: give another directory')
  text = read_text(document, 'the text to read ahead of time')
  if not text:
    raise UserError(f'{document} is empty: give a file with a text')
  make_writable(output.absolute().parent)
  return text


def save_context(text: str, output: Path, engine: Engine, tokenizer: Tokenizer) -> int:
  """Reads a text, makes latents for its end and writes both; returns its number of tokens.

  Raises:
    UserError: the text is longer than the engine's cache, or too short for latents.
  """
  ids = tokenizer.encode(text)
  state = engine.read([ids])
  save(output, engine, state, engine.augment(state))
  return len(ids)


def open_context(directory: Path, engine: Engine) -> Context:
  """Reads what `save_context` has written.

  Raises:
    UserError: it has several texts or no latents, or see `load`.
  """
  state, latents = load(directory, engine)
  if len(state.position) != 1 or latents is None:
    raise UserError(f'the cache in {directory} has {len(state.position)} texts '
                    f'{"without" if latents is None else "with"} latents, but 1 text with latents '
                    'is expected: write one with launch/augment.py')
  return Context(state, engine.attach(state, latents))


def read_after(engine: Engine, context: Context, prompts: Prompts, plain: bool = False) -> State:
  """Reads each prompt after the context; `plain` leaves its latents out."""
  state = context.plain if plain else context.augmented
  # The context is one text. Every prompt gets a copy of its cache.
  repeated = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, len(prompts), axis=0) if leaf.ndim else leaf, state)
  return engine.read_on(repeated, prompts)
