"""Caches on disk: a document or system prompt, read and augmented once, decoded from many times."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.serialization import from_state_dict, to_state_dict
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from latent_deliberation.errors import UserError
from latent_deliberation.files import make_writable, read_text, whole_directory
from latent_deliberation.inference import passes
from latent_deliberation.inference.generator import NONE, Generator
from latent_deliberation.inference.passes import Augmentation, Model, Prompts, State
from latent_deliberation.inference.ring_cache import CachePlan
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.model.decoder import fingerprint

_DESCRIPTION, _ARRAYS, _FORMAT = 'cache.json', 'cache.safetensors', 1
_KEYS = ('decoder', 'written', 'texts', 'augmented', 'model', 'dtype', 'coprocessor',
         'global_slots', 'local_slots')


def save(directory: Path, generator: Generator, state: State,
         augmentation: Augmentation | None = None) -> None:
  """Writes a state, and latents for its end if they are given; whole or not at all.

  Raises:
    UserError: `directory` exists already; nothing is overwritten.
  """
  written = int(state.cache.write_index)
  trimmed = state.replace(cache=state.cache.resized(_trimmed(generator.model.plan, written)))
  tree = to_state_dict({'state': trimmed, 'augmentation': augmentation})
  arrays = {path: leaf for path, leaf in traverse_util.flatten_dict(tree, sep='/').items()
            if leaf is not None}
  description = {'format': _FORMAT, 'decoder': generator.fingerprint, 'written': written,
                 'texts': len(state.position), 'augmented': augmentation is not None,
                 **_layout(generator)}
  with whole_directory(Path(directory)) as partial:
    save_file(arrays, partial / _ARRAYS)
    (partial / _ARRAYS).chmod(0o644)  # safetensors lets the owner alone read it
    (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + '\n')


def load(directory: Path, generator: Generator) -> tuple[State, Augmentation | None]:
  """A state as it was saved, and the latents beside it (not attached) or None.

  The generator may have another length than the one that saved, if what is there fits.

  Raises:
    UserError: there is no cache in `directory`.
    UserError: it is damaged, of an older version, of another decoder, or laid out otherwise.
  """
  directory = Path(directory)
  described = _describe(directory)
  _check(directory, described, generator)
  plan = generator.model.plan
  template = _template(dataclasses.replace(
      generator.model, plan=_trimmed(plan, described['written'])), generator, described)
  flat = traverse_util.flatten_dict(to_state_dict(template), sep='/')
  expected = {path: leaf for path, leaf in flat.items() if leaf is not None}
  arrays = _read(directory / _ARRAYS)
  for path in sorted(arrays.keys() | expected.keys()):
    there, here = (getattr(tree.get(path), 'shape', None) for tree in (arrays, expected))
    if there != here:
      raise UserError(f'{directory / _ARRAYS}: {path} has shape {there}, {_DESCRIPTION} means '
                       f'{here}: one of the two was replaced; save the cache again')
  tree = from_state_dict(template, traverse_util.unflatten_dict(
      {path: arrays.get(path) for path in flat}, sep='/'))
  tree = generator.place(tree)
  state = tree['state']
  return state.replace(cache=state.cache.resized(plan)), tree['augmentation']


def _trimmed(plan: CachePlan, written: int) -> CachePlan:
  """The plan without the slots that no token has reached yet."""
  return dataclasses.replace(plan, global_slots=min(plan.global_slots, written),
                             local_slots=min(plan.local_slots, written))


def _layout(generator: Generator) -> dict[str, Any]:
  """What must be the same in the generator that loads, as JSON gives it back."""
  model, plan = generator.model, generator.model.plan
  layout = {'model': dataclasses.asdict(model.decoder.config), 'dtype': model.decoder.dtype,
            'coprocessor': None, 'global_slots': plan.global_slots,
            'local_slots': plan.local_slots}
  if model.coprocessor is not None:
    # Any training changes its soft tokens, which are few.
    layout['coprocessor'] = {'weights': fingerprint(generator.weights.coprocessor),
                             **dataclasses.asdict(model.coprocessor.config)}
  return json.loads(json.dumps(layout))


def _describe(directory: Path) -> dict[str, Any]:
  path = directory / _DESCRIPTION
  if not path.is_file():
    raise UserError(f'{directory} holds no {_DESCRIPTION}: give a directory that '
                            'inference.stored.save has written')
  try:
    described = json.loads(path.read_text())
    if described['format'] != _FORMAT:
      raise UserError(f'format {described["format"]!r}, expected {_FORMAT}')
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or of another format ({type(error).__name__}: {error}); '
                     'save the cache again') from error
  _refuse_older(directory, described, _KEYS)
  return described


def _refuse_older(directory: Path, there: Mapping[str, Any], expected: Iterable[str],
                  section: str = '') -> None:
  absent = [section + key for key in expected if key not in there]
  if absent:
    raise UserError(f'the cache in {directory} is of an older version, whose {_DESCRIPTION} does '
                     f'not say {absent}, which this one needs: save the cache again')


def _check(directory: Path, described: dict[str, Any], generator: Generator) -> None:
  if described['decoder'] != generator.fingerprint:
    raise UserError(f'the cache in {directory} was made by a decoder with fingerprint '
                     f'{described["decoder"]}, this one has {generator.fingerprint}: read the text '
                     'with this decoder and save it again')
  different = [(name, described[name], value) for name, value in _layout(generator).items()
               if described[name] != value]
  for name, there, here in different:
    if there is None or here is None:
      raise UserError(f'the cache in {directory} was made {_with(there)}, this generator works '
                       f'{_with(here)}: give the one that made it, or save the cache again')
    if isinstance(there, dict):
      _refuse_older(directory, there, here, f'{name}.')
      there, here = _differences(there, here)
    # Slots that are not reached yet may be more or fewer.
    if not name.endswith('_slots') or described['written'] > min(there, here):
      raise UserError(f'the cache in {directory} has {name} = {there}, this generator has {here}, '
                       f'and {described["written"]} slots are written: make a generator that has '
                       'the same, or save the cache again with this one')


def _with(coprocessor: Any) -> str:
  return 'without a coprocessor' if coprocessor is None else 'with one'


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[dict[str, Any]]:
  """Both, without what they have in common."""
  return [{name: value for name, value in one.items()
           if name not in other or other[name] != value}
          for one, other in ((there, here), (here, there))]


def _template(model: Model, generator: Generator, described: dict[str, Any]) -> dict[str, Any]:
  """Shapes of what was saved."""
  tokens = jax.ShapeDtypeStruct((described['texts'], 1), np.int32)
  count = jax.ShapeDtypeStruct((described['texts'],), np.int32)
  state = jax.eval_shape(lambda *given: passes.read(model, *given), generator.weights, tokens,
                         count)
  augmentation = None
  if described['augmented']:
    augmentation = jax.eval_shape(lambda *given: passes.augment(model, *given),
                                  generator.weights, state)
  return {'state': state, 'augmentation': augmentation}


def _read(path: Path) -> dict[str, jax.Array]:
  try:
    return load_file(path)
  except (OSError, SafetensorError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}): it is truncated or absent; save the cache '
                     'again') from error


@dataclasses.dataclass(frozen=True)
class Context:
  """One text in the decoder's cache, without latents and with them; neither is ever changed."""
  plain: State
  augmented: State


def check_context(output: Path, document: Path, coprocessor: str) -> str:
  """The text of a document, if it can be read and its cache written; before a decoder is loaded.

  Raises:
    UserError: there is something at `output`.
    UserError: there is no such document.
    UserError: `output` cannot be written.
    UserError: the document is empty or no UTF-8, or no coprocessor is given.
  """
  if coprocessor in ('', NONE):
    raise UserError(f'--coprocessor={coprocessor}: latents for the text are made by one: give the '
                     'directory of a trained coprocessor')
  if output.exists():
    raise UserError(f'{output} exists already and is not written over: give another')
  text = read_text(document, 'the text to read ahead of time')
  if not text:
    raise UserError(f'{document} is empty: give a text')
  make_writable(output.absolute().parent)
  return text


def save_context(text: str, output: Path, generator: Generator, tokenizer: Tokenizer) -> int:
  """Reads a text, makes latents for its end and writes both; returns its number of tokens.

  Raises:
    UserError: the text is longer than the generator's cache, or too short for latents.
  """
  ids = tokenizer.encode(text)
  state = generator.read([ids])
  save(output, generator, state, generator.augment(state))
  return len(ids)


def open_context(directory: Path, generator: Generator) -> Context:
  """What `save_context` has written.

  Raises:
    UserError: it has several texts or no latents, or see `load`.
  """
  state, latents = load(directory, generator)
  if len(state.position) != 1 or latents is None:
    raise UserError(f'the cache in {directory} has {len(state.position)} texts '
                     f'{"without" if latents is None else "with"} latents beside them, 1 with '
                     'latents is expected: write one with launch/augment.py')
  return Context(state, generator.attach(state, latents))


def read_behind(generator: Generator, context: Context, prompts: Prompts,
                plain: bool = False) -> State:
  """The state of each prompt behind the context; `plain` leaves its latents out."""
  state = context.plain if plain else context.augmented
  repeated = jax.tree.map(
      lambda leaf: jnp.repeat(leaf, len(prompts), axis=0) if leaf.ndim else leaf, state)
  return generator.read_on(repeated, prompts)
