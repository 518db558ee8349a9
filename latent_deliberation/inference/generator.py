"""A decoder with its weights on devices: the programs of inference, checked and called."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Params, PyTree
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  check_decoder,
  compare_frozen_dtype,
  describe,
  locate_coprocessor,
)
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.inference import passes
from latent_deliberation.inference import tokenizer as tokenizers
from latent_deliberation.inference.background import AugmentationStats
from latent_deliberation.inference.decode import Decoded, decode
from latent_deliberation.inference.passes import (
  Augmentation,
  Model,
  Prompts,
  State,
  Weights,
  align,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.policy import FittedGate
from latent_deliberation.inference.ring_cache import RingKVCache, plan_cache
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder, fingerprint
from latent_deliberation.model.decoder import fingerprint as compute_fingerprint
from latent_deliberation.model.layers import Quantised
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.paths import VOCABULARY_FILE
from latent_deliberation.sharding import DEFAULT_RULES, batch_sharding, batch_shards


class Generator:
  """A frozen decoder, with or without a coprocessor.

  Attributes:
    model: what is compiled in.
    weights: unstacked; drop the stacked ones to have their memory back.
    worker: makes the latents; itself, or a generator of the same weights on other devices.
    fingerprint: of the decoder's weights.
    counts: what became of augmentations so far.
  """

  def __init__(self, config: TransformerConfig, params: Params, *, length: int,
               coprocessor: tuple[DeliberationConfig, Params] | None = None,
               dtype: str = 'float32', mesh: Mesh | None = None,
               rules: Mapping[str, Sequence[str]] = DEFAULT_RULES,
               worker: 'Generator | None' = None, fingerprint: str = ''):
    """Takes the weights apart.

    Args:
      config, params: of the decoder.
      length: tokens that a text may have, prompt and all.
      coprocessor: its choices and parameters; None for the plain decoder.
      dtype: of the computation and the cache.
      mesh, rules: on which the weights lie, and how; without a mesh, on one device.
      worker: see above.
      fingerprint: of the decoder's weights; computed where it is not given.

    Raises:
      UserError: `length` is not positive, the coprocessor has other widths, or weights are int8.
    """
    if length < 1:
      raise UserError(f'length = {length}: a cache needs room for 1 token at least')
    if isinstance(params['embedder']['table'], Quantised):
      raise UserError("the decoder's weights are in int8, which inference does not compute with: "
                       'give them as they are stored')
    choices, trained = coprocessor or (None, None)
    num_latents, refining = 0, False
    if choices is not None:
      _check_choices(config, choices, trained)
      num_latents, refining = choices.num_latents, choices.latents == 'refining'
    self.model = Model(
        decoder=Decoder(config, dtype=dtype),
        coprocessor=None if choices is None else Coprocessor(config, choices, dtype=dtype),
        plan=plan_cache(config, length, num_latents, refining),
        rules=() if mesh is None else tuple((name, tuple(axes)) for name, axes in rules.items()))
    self.weights = _take_apart(params, choices, trained)
    self.worker = worker or self
    self.fingerprint = fingerprint or compute_fingerprint(params)
    self.stats = AugmentationStats()
    self._mesh, self._rules = mesh, rules
    self._warned = False

  @property
  def shards(self) -> int:
    """What the number of texts must be a multiple of."""
    return batch_shards(self._mesh, self._rules) if self._mesh is not None else 1

  def read(self, prompts: Prompts) -> State:
    """Reads texts from their beginnings, of any lengths.

    Raises:
      UserError: there is no prompt, one is empty or too long or has an unknown token, or they do
        not divide over the mesh.
    """
    self._check_texts(prompts)
    return self._call(passes.read, *self.place(align(prompts)))

  def read_on(self, state: State, prompts: Prompts) -> State:
    """Reads more of every text of a state, which stays as it is; empty prompts add nothing.

    Raises:
      UserError: as `read`, or there is not one prompt for each text.
    """
    lengths = np.asarray(state.lengths)
    if len(prompts) != len(lengths):
      raise UserError(f'{len(prompts)} prompts for a state of {len(lengths)} texts: give one for '
                       'each, which may be empty')
    check_prompts(prompts, lengths, self.model.decoder.config.vocab_size)
    check_room(lengths + [len(prompt) for prompt in prompts], 0, self.model.plan.global_slots)
    return self._call(passes.read_on, state, *self.place(align(prompts)))

  def augment(self, state: State) -> Augmentation:
    """Latents for the end of every text of a state, which stays as it is.

    Raises:
      UserError: there is no coprocessor.
      UserError: a text is too short for refining latents.
    """
    if self.model.coprocessor is None:
      raise UserError('this generator has no coprocessor: make one that has, for latents')
    check_anchors(np.asarray(state.lengths), self.model.coprocessor.config.first_anchor)
    if self.worker is not self:
      return self.place(self.worker.augment(self.worker.place(state)))
    return self._call(passes.augment, state)

  def attach(self, state: State, augmentation: Augmentation,
             rows: np.ndarray | None = None) -> State:
    """The state with latents, in the texts `rows` (bool [B]) or in all.

    To detach them again, go back to `state`: it stays as it is.
    """
    rows = np.ones(len(state.position), bool) if rows is None else rows
    with self._context():
      return passes.attach(self.model, state, augmentation, self.place(rows))

  def warm_up(self, batch: int) -> None:
    """Compiles what makes latents for so many texts, so that the first do not wait for it.

    Raises:
      UserError: there is no coprocessor.
      UserError: the cache has no room for latents.
    """
    if self.model.coprocessor is None:
      raise UserError('this generator has no coprocessor: there is nothing to compile')
    shortest = [0] * (self.model.coprocessor.config.first_anchor + 1)
    state = self.read([shortest] * (batch + -batch % self.shards))
    jax.block_until_ready(self.attach(state, self.augment(state)))

  def entropies(self, prompts: Prompts) -> list[np.ndarray]:
    """Entropy of the next token behind every token of each prompt, nats; for `policy.calibrate`.

    Raises:
      UserError: see `read`.
    """
    self._check_texts(prompts)
    tokens, count = align(prompts)
    found = np.asarray(self._call(passes.entropies, *self.place((tokens, count))))
    return [row[len(row) - size:] for row, size in zip(found, count, strict=True)]

  def choose(self, rows: np.ndarray, chosen: State, other: State) -> State:
    """`chosen` for the texts `rows`, `other` for the rest; both have written as many slots."""
    with self._context():
      return passes.choose(self.place(rows), chosen, other)

  def decode(self, state: State, *arguments: PyTree, **how: object) -> tuple[State, Decoded]:
    """See `inference.decode`; the keys and values of `state` are overwritten."""
    cache = state.cache
    bare = state.replace(cache=cache.replace(keys=(), values=()))
    return self._call(decode, (cache.keys, cache.values), bare, *arguments, **how)

  def place(self, tree: PyTree) -> PyTree:
    """Arrays whose first axis is the texts, on the devices of this generator; scalars, too."""
    if self._mesh is None:
      return jax.device_put(tree, next(iter(self.weights.embedder['table'].devices())))
    texts, everywhere = (batch_sharding(self._mesh, self._rules),
                         NamedSharding(self._mesh, PartitionSpec()))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, texts if leaf.ndim else everywhere), tree)

  def warn(self, reason: str) -> None:
    """Says why there are no latents, once in the life of this generator."""
    if not self._warned:
      logging.warning('No latents: %s. The decoder goes on without them; this is said once, '
                      'Generator.stats has the number of times.', reason)
    self._warned = True

  def _check_texts(self, prompts: Prompts) -> None:
    check_prompts(prompts, np.zeros(len(prompts)), self.model.decoder.config.vocab_size)
    check_room(np.array([len(prompt) for prompt in prompts]), 0, self.model.plan.global_slots)
    if len(prompts) % self.shards:
      raise UserError(f'{len(prompts)} prompts do not divide over the {self.shards} shards of the '
                       'mesh: give a multiple')

  def _call(self, program: Callable[..., PyTree], *arguments: PyTree, **how: object) -> PyTree:
    with self._context():
      return program(self.model, self.weights, *arguments, **how)

  def _context(self) -> contextlib.AbstractContextManager:
    # Entered at every call, since a mesh is set for one thread alone.
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def copied(state: State) -> State:
  """The state with keys and values of its own, which may be overwritten."""
  return state.replace(cache=_copy(state.cache))


@jax.jit
def _copy(cache: RingKVCache) -> RingKVCache:
  return jax.tree.map(jnp.copy, cache)


def _check_choices(config: TransformerConfig, choices: DeliberationConfig, trained: Params) -> None:
  if choices.reads == 'states':
    raise UserError("this coprocessor has reads = 'states': it reads the decoder's hidden states, "
                     'which generation does not keep; generate with one that reads the cache')
  expected = (choices.num_latents, config.embed_dim)
  if trained['soft_tokens'].shape != expected:
    raise UserError(
        f'the soft tokens of the coprocessor have shape {trained["soft_tokens"].shape}, its '
        f'choices and the decoder ask for {expected}: it belongs to another decoder')


def _take_apart(params: Params, choices: DeliberationConfig | None,
                trained: Params | None) -> Weights:
  layers = passes.unstack(params['transformer'])
  if choices is None:
    return Weights(params['embedder'], layers)
  coprocessor_layers = {
      'full': lambda: passes.unstack(trained['transformer']),
      'lora': lambda: passes.adapt(layers, trained['lora']),
      'constant': lambda: None,
  }[choices.trainable]()
  own = {name: trained[name] for name in ('soft_tokens', 'gate') if name in trained}
  return Weights(params['embedder'], layers, own, coprocessor_layers)


NONE = 'none'  # in the place of a coprocessor


def open_generator(decoder: Path, coprocessor: str = '', vocabulary: str = '',
                   length: int = 2048,
                   gate: FittedGate | None = None) -> tuple[Generator, Tokenizer]:
  """A decoder and its coprocessor from disk; all that can be checked without weights is, first.

  Args:
    decoder: a directory of any format that `model.weights` reads.
    coprocessor: a trained package, or the work directory that holds it; '' or 'none' for none.
    vocabulary: path of a SentencePiece model, or 'byte'; '' for the decoder's own.
    length: tokens that a text may have.
    gate: to be checked against the decoder.

  Raises:
    UserError: there is no decoder, coprocessor or vocabulary.
    UserError: one of them is damaged, or they do not belong together.
  """
  checkpoint = weights.open_checkpoint(decoder)
  tokenizer = open_tokenizer(checkpoint, vocabulary)
  trained = None
  if coprocessor not in ('', NONE):
    place = locate_coprocessor(Path(coprocessor))
    trained = describe(place)
    if trained.decoder_config != checkpoint.config:
      raise UserError(f'the coprocessor in {place} is for a decoder with {trained.decoder_config}, the one '
                       f'in {decoder} has {checkpoint.config}: give the decoder that it was '
                       'trained on')

  def check_digest(decoder_fingerprint: str) -> None:
    if trained is not None:
      check_decoder(trained, decoder_fingerprint)
    if gate is not None:
      gate.check_decoder(decoder_fingerprint)

  if checkpoint.fingerprint:
    check_digest(checkpoint.fingerprint)
  params = checkpoint.load()
  decoder_fingerprint = checkpoint.fingerprint or fingerprint(params)
  check_digest(decoder_fingerprint)
  if trained is not None:
    compare_frozen_dtype(trained, params['embedder']['table'].dtype.name)
    trained = (trained.config, coprocessor_checkpoint.load(place).params)
  return Generator(checkpoint.config, params, length=length, coprocessor=trained,
                   fingerprint=decoder_fingerprint), tokenizer


def open_tokenizer(checkpoint: weights.Checkpoint, vocabulary: str = '') -> Tokenizer:
  """The tokenizer that is asked for, or the one that lies beside a decoder or its run.

  Raises:
    UserError: there is none.
    UserError: it is not the one that the decoder was trained with.
  """
  if not vocabulary and checkpoint.vocabulary == tokenizers.ByteTokenizer.hash:
    vocabulary = tokenizers.BYTES
  if not vocabulary:
    directory = checkpoint.directory.absolute()
    places = [place / VOCABULARY_FILE for place in (directory, *directory.parents[:2])]
    found = checkpoint.tokenizer or next((path for path in places if path.is_file()), None)
    if found is None:
      raise UserError(f'no vocabulary beside the decoder in {directory}: give --vocabulary='
                              f'PATH, its SentencePiece model, or --vocabulary={tokenizers.BYTES}')
    vocabulary = str(found)
  tokenizer = tokenizers.open_tokenizer(vocabulary)
  if checkpoint.vocabulary and tokenizer.hash != checkpoint.vocabulary:
    raise UserError(f'the decoder in {checkpoint.directory} was trained with the vocabulary '
                     f'{checkpoint.vocabulary}, {vocabulary} is {tokenizer.hash}: give the '
                     'vocabulary.model of its data')
  if tokenizer.size > checkpoint.config.vocab_size:
    raise UserError(f'{vocabulary} has {tokenizer.size} pieces, the decoder in '
                     f'{checkpoint.directory} has {checkpoint.config.vocab_size} embeddings: give '
                     'the vocabulary that it was trained with')
  return tokenizer
