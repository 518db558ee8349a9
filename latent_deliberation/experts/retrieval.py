"""Retrieval with experts: passages that are read and augmented once, found by words, gone on from.

The decoder's cache of a passage, and the latents of an expert for its end, are kept on disk under a
hash of the passage's tokens. So a document that changed is read anew, and nothing else is. BM25
finds the passage of a question (Robertson and Zaragoza 2009, by the library bm25s), and the
question follows it in the cache.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from flax.serialization import from_state_dict, to_state_dict
from safetensors import SafetensorError
from safetensors.flax import load, save

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.experts.attach import Choice, Experts, Mix
from latent_deliberation.experts.card import AUTO
from latent_deliberation.experts.passages import PASSAGE, Passage, read_passages
from latent_deliberation.files import remove_tree, write_whole
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.passes import Augmentation, State
from latent_deliberation.inference.prompt_arrays import check_room
from latent_deliberation.inference.session import (
  DecodingOptions,
  generate,
  text_of,
  with_ends,
)
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.progress import Progress

DOCUMENT, QUESTION = 'document', 'question'  # ends at which latents are made
_STORE = '.latent_deliberation'  # of the caches, inside the folder of the documents
_WORD = re.compile(r'\w+')


# --- The library ---


class Library:
  """The passages of a folder: found by words, read and augmented once.

  Attributes:
    passages: all passages.
    made, found: numbers of caches and latents that were made, and that were on disk already.
  """

  def __init__(self, passages: Sequence[Passage], experts: Experts, store: Path):
    """Indexes the passages.

    Args:
      experts: the experts, on the engine that reads the passages.
      store: directory of caches; created when the first one is written.

    Raises:
      UserError: bm25s is not installed.
    """
    if importlib.util.find_spec('bm25s') is None:
      raise UserError("retrieval needs the library bm25s: pip install -e '.[experts]'")
    import bm25s
    self.passages, self._experts, self._store = list(passages), experts, store
    self.made = self.found = 0
    self._index = bm25s.BM25()
    self._index.index([_words(passage.text) or ['-'] for passage in passages], show_progress=False)

  def search(self, question: str, count: int = 1) -> list[tuple[Passage, float]]:
    """Returns the best passages with their scores; none that has no word of the question."""
    words = _words(question)
    if not words:
      return []
    scores = np.asarray(self._index.get_scores(words))
    best = np.argsort(-scores, kind='stable')[:count]
    return [(self.passages[number], float(scores[number])) for number in best if scores[number] > 0]

  def state(self, passage: Passage) -> State:
    """Returns a passage in the decoder's cache, without latents."""
    place = self._place(passage)
    if place.is_dir():
      try:
        state, _ = prefix_cache.load(place, self._experts.engine)
        self.found += 1
        return state
      except UserError as error:
        logging.warning('The cache of %s is made anew: %s', passage.source, error)
        remove_tree(place)
    state = self._experts.engine.read([passage.ids])
    self.made += 1
    with _kept(place):
      prefix_cache.save(place, self._experts.engine, state)
    return state

  def latents(self, passage: Passage, state: State, mix: Mix) -> Augmentation:
    """Returns the latents of experts for the end of a passage, whose `state` that is."""
    path = self._place(passage).with_suffix(f'.{self._key_of(mix)}.latents')
    shapes = jax.eval_shape(lambda plain: self._experts.augment(plain, [mix]), state)
    if path.is_file():
      try:
        found = _from_flat(shapes, _read_hashed(path))
        self.found += 1
        return self._experts.engine.place(found)
      except (OSError, ValueError, KeyError, SafetensorError) as error:
        logging.warning('%s is damaged (%s): it is made anew.', path, error)
    latents = self._experts.augment(state, [mix])
    self.made += 1
    if bool(latents.finite.all()):
      with _kept(path):
        content = save(_flat(latents))
        write_whole(path, hashlib.sha256(content).digest() + content)
    return latents

  def prepare(self, mix: Mix) -> None:
    """Reads and augments all passages that are not on disk yet, with a progress bar."""
    progress = Progress('augmenting', 'passages', len(self.passages))
    for done, passage in enumerate(self.passages, 1):
      state = self.state(passage)
      if mix and len(passage.ids) > self._experts.first_anchor:
        self.latents(passage, state, mix)
      progress.update(done)

  def _place(self, passage: Passage) -> Path:
    return self._store / f'{passage.hash}-{self._engine_key()}'

  def _engine_key(self) -> str:
    """Returns a hash of what a cache depends on besides its tokens."""
    engine, room = self._experts.engine, self._experts.latents
    plan = engine.model.plan
    parts = [engine.decoder_fingerprint, engine.model.decoder.dtype, plan.latent_slots,
             plan.local_slots, None if room is None else dataclasses.asdict(room)]
    return _hash(parts)

  def _key_of(self, mix: Mix) -> str:
    """Returns a hash of experts, by their addresses or weights, and of how they are mixed."""
    return _hash([[address_of(self._experts, name), float(weight)]
                  for name, weight in sorted(mix.items())])


def address_of(experts: Experts, name: str) -> str:
  """Returns the address of an attached expert; without a card, the fingerprint of its weights."""
  known = experts.known()[name]
  return fingerprint(known.weights.coprocessor) if known.card is None else known.card.address


def open_library(directory: Path, experts: Experts, tokenizer: Tokenizer, *,
                 store: Path | None = None, size: int = PASSAGE) -> Library:
  """Returns the library of a folder, whose caches are kept inside it unless `store` is given.

  Raises:
    UserError: see `read_passages` and `Library`.
  """
  passages = read_passages(directory, tokenizer, size)
  return Library(passages, experts, store or directory / _STORE)


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
  """Turns an error of writing into a warning: what cannot be kept is made again next time."""
  try:
    yield
  except (UserError, OSError) as error:  # a full disk, or another process that writes the same
    logging.warning('%s is not kept: %s', path.name, error)


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read_hashed(path: Path) -> dict[str, jax.Array]:
  """Returns the tensors of a file that begins with its SHA-256. Raises ValueError if it differs."""
  content = path.read_bytes()
  if hashlib.sha256(content[32:]).digest() != content[:32]:
    raise ValueError('its hash is another one')
  return load(content[32:])


def _flat(latents: Augmentation) -> dict[str, jax.Array]:
  return traverse_util.flatten_dict(to_state_dict(latents), sep='/')


def _from_flat(shapes: Augmentation, arrays: Mapping[str, jax.Array]) -> Augmentation:
  """Returns latents from arrays by name. Raises ValueError where they are of another shape."""
  for name, shape in _flat(shapes).items():
    if arrays[name].shape != shape.shape or arrays[name].dtype != shape.dtype:
      raise ValueError(f'{name} is {arrays[name].shape}, expected {shape.shape}')
  return from_state_dict(shapes, traverse_util.unflatten_dict(dict(arrays), sep='/'))


# --- Questions ---


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer and where it is from.

  Attributes:
    text: the answer.
    source: passage that it follows; '' where no document was found.
    score: BM25 score of the passage.
    experts: weight by name of the experts whose latents were read; empty for none.
    fault: why an expert that was asked for gave no latents; '' for no fault.
    seconds: seconds by part: 'search', 'read' and 'decode'.
  """
  text: str
  source: str
  score: float
  experts: Mix
  fault: str
  seconds: Mapping[str, float]


def format_question(question: str, follows: bool) -> str:
  """Returns the prompt of a question, which follows a document or begins a text."""
  return f'{chr(10) * 2 if follows else ""}Question: {question}\nAnswer:'


def check_question(question: str, at: str, max_tokens: int) -> None:
  """Raises UserError for what `ask` can answer from no library."""
  if not question.strip():
    raise UserError('the question is empty: write one')
  if at not in (DOCUMENT, QUESTION):
    raise UserError(f'at = {at!r}: give {DOCUMENT!r} or {QUESTION!r}')
  check_integer('max_tokens', max_tokens, 1)


def ask(library: Library, experts: Experts, tokenizer: Tokenizer, question: str, *,
        choice: Choice = None, at: str = DOCUMENT, max_tokens: int = 64) -> Answer:
  """Answers a question after the passage that has its words, or without one if there is none.

  Args:
    choice: what the question asks for; see `experts.attach`.
    at: 'document' for latents at the end of the passage, which are on disk after the first time;
      'question' for new ones at the end of the question.
    max_tokens: largest number of tokens of the answer.

  Raises:
    UserError: see `check_question`; or the question does not fit the cache after its passage.
  """
  check_question(question, at, max_tokens)
  begun = time.perf_counter()
  (passage, score), = library.search(question) or [(None, 0.0)]
  searched = time.perf_counter()
  prompt = format_question(question, passage is not None)
  engine = experts.engine
  room, before = engine.model.plan.global_slots, () if passage is None else passage.ids
  ids = tokenizer.encode(prompt) if passage is None else tokenizer.encode_more(prompt)
  check_room(np.array([len(before) + len(ids)]), max_tokens, room, ['the question, with its text,'])
  if passage is None:
    state, mix, fault = _augmented(experts, engine.read([ids]), choice, prompt)
  else:
    state, text = library.state(passage), passage.text
    if at == QUESTION:
      state, text = engine.read_on(state, [ids]), passage.text + prompt
    state, mix, fault = _augmented(experts, state, choice, text,
                                   (library, passage) if at == DOCUMENT else None)
    if at == DOCUMENT:
      state = engine.read_on(state, [ids])
  jax.block_until_ready(state)
  read = time.perf_counter()
  options = with_ends(DecodingOptions(max_tokens), tokenizer, ('\n',))
  completion, = generate(engine, state, options)
  ended = time.perf_counter()
  return Answer(text_of(completion, tokenizer, ('\n',), ids).strip(),
                '' if passage is None else passage.source, score, mix, fault,
                {'search': searched - begun, 'read': read - searched, 'decode': ended - read})


def _augmented(experts: Experts, state: State, choice: Choice, text: str,
               stored: tuple[Library, Passage] | None = None) -> tuple[State, Mix, str]:
  """Returns a state with latents at its end, the experts of these, and a fault.

  Whatever an expert does, the plain state is there.
  """
  source = experts.source([choice], [text])
  (has_room,), (mix,) = source.wants(state), source.mixes
  if not mix:
    # An unknown name was warned of.
    return state, {}, '' if choice in (None, 'none', AUTO) else f'there is no expert {choice!r}'
  if not has_room:
    return state, {}, '' if choice == AUTO else 'the text is too short for latents'
  try:
    if stored is None:
      latents = experts.augment(state, [mix])
    else:
      library, passage = stored
      latents = library.latents(passage, state, mix)
    if not bool(latents.finite.all()):
      raise RuntimeError('its latents are not finite')
  except RuntimeError as error:  # of an expert, or of the device
    logging.warning('No latents of %s: %s. The decoder continues without them.', list(mix), error)
    return state, {}, f'{list(mix)}: {error}'
  return experts.engine.attach(state, latents), mix, ''
