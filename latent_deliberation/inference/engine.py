"""A decoder with its weights on devices: the programs of inference, checked and called.

`Engine` works on ids and states. `open_engine` makes one from directories, `build_engine` from what
is loaded already; both check here, and only here, that decoder, coprocessor and gate belong
together.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Params, PyTree
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  CoprocessorCheckpoint,
  Description,
)
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError, differences
from latent_deliberation.files import as_path
from latent_deliberation.inference import passes
from latent_deliberation.inference.background import AugmentationStats
from latent_deliberation.inference.decode import Decoded, Sampling, decode
from latent_deliberation.inference.passes import Augmentation, Model, State
from latent_deliberation.inference.policy import FittedGate, Gate
from latent_deliberation.inference.prompt_arrays import (
  Prompts,
  align,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.ring_cache import (
  RingKVCache,
  cache_bytes,
  check_length,
  plan_cache,
)
from latent_deliberation.inference.tokenizer import Tokenizer, tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder, fingerprint
from latent_deliberation.model.products import Quantised
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, batch_sharding, batch_shards

GREEDY = Sampling()
BATCH_BUDGET = 2 * 2**30  # bytes that texts decoded together may take by default


class Engine:
  """A frozen decoder, with or without a coprocessor.

  Attributes:
    model: the part that is compiled in.
    weights: unstacked weights. Drop the stacked ones to free their memory.
    worker: engine that makes the latents; itself, or one of the same weights on other devices.
    decoder_fingerprint: fingerprint of the decoder's weights.
    stats: outcomes of augmentations so far.
  """

  def __init__(self, decoder_config: TransformerConfig, decoder_params: Params, *, length: int,
               coprocessor: tuple[DeliberationConfig, Params] | None = None,
               dtype: str = 'float32', mesh: Mesh | None = None,
               rules: Mapping[str, Sequence[str]] = DEFAULT_RULES,
               worker: 'Engine | None' = None, decoder_fingerprint: str = '',
               room: DeliberationConfig | None = None):
    """Unstacks the weights.

    Args:
      decoder_config: sizes of the decoder.
      decoder_params: its weights. Their 'transformer' may be unstacked already.
      length: largest number of tokens of a text, prompt included.
      coprocessor: its config and parameters; None for the plain decoder.
      dtype: dtype of the computation and the cache.
      mesh, rules: devices that hold the weights, and the mapping onto them; None for one device.
      worker: see above; None for itself.
      decoder_fingerprint: see above; computed if it is not given.
      room: without a coprocessor, latents that `attach` may get from elsewhere; None for none.

    Raises:
      UserError: `length` is below 1, the coprocessor has other widths, or weights are int8.
    """
    check_length(decoder_config, length, dtype, mesh)
    if isinstance(decoder_params['embedder']['table'], Quantised):
      raise UserError("the decoder's weights are int8, which inference does not support: give the "
                      'weights as they are stored')
    # The plan of the cache depends on the latents.
    config, params = coprocessor or (None, None)
    if config is not None:
      check_coprocessor(decoder_config, config, params)
    room, num_latents, refining = config or room, 0, False
    if room is not None:
      num_latents, refining = room.num_latents, room.latents == 'refining'
    # As in training, a CPU does all but products in float32.
    device = next(iter(decoder_params['embedder']['table'].devices()))
    activations = 'float32' if device.platform == 'cpu' else dtype
    # jit compiles for the values of the static part, so all of them must be hashable.
    self.model = Model(
        decoder=Decoder(decoder_config, dtype=dtype, activations=activations),
        coprocessor=None,
        plan=plan_cache(decoder_config, length, num_latents, refining),
        rules=() if mesh is None else tuple((name, tuple(axes)) for name, axes in rules.items()))
    if config is not None:
      self.model = self.model.with_coprocessor(config)
    self.weights = passes.assemble(decoder_params, config, params)
    self.worker = worker or self
    self.decoder_fingerprint = decoder_fingerprint or fingerprint(decoder_params)
    self.stats = AugmentationStats()
    self._mesh, self._rules = mesh, rules
    self._warned = False

  @property
  def shards(self) -> int:
    """Number that must divide the number of texts."""
    return batch_shards(self._mesh, self._rules) if self._mesh is not None else 1

  @property
  def first_anchor(self) -> int:
    """Least index of a token that latents may follow. Raises UserError without a coprocessor."""
    if self.model.coprocessor is None:
      raise UserError('there is no coprocessor, which makes the latents: give one')
    return self.model.coprocessor.config.first_anchor

  @property
  def batch_size(self) -> int:
    """Number of texts whose caches and logits fit BATCH_BUDGET, 1 or more."""
    config = self.model.decoder.config
    # Logits are float32, and a step holds those before it and those after it.
    logits = 2 * 4 * config.vocab_size
    return max(1, BATCH_BUDGET // (
        cache_bytes(self.model.plan, config, self.model.decoder.dtype) + logits))

  def read(self, prompts: Prompts) -> State:
    """Reads texts of any lengths from their beginnings.

    Raises:
      UserError: there is no prompt, one is empty or too long or has an unknown token, or their
        number does not divide over the mesh.
    """
    self._check_texts(prompts)
    return self._call(passes.read, *self.place(align(prompts)))

  def read_on(self, state: State, prompts: Prompts) -> State:
    """Reads more of every text of a state, which stays as it is; empty prompts add nothing.

    Raises:
      UserError: as `read`, or there is not one prompt for each text.
    """
    self._check_more(state, prompts)
    return self._call(passes.read_on, state, *self.place(align(prompts)))

  def score_on(self, state: State, prompts: Prompts) -> list[np.ndarray]:
    """Returns the log-probabilities, nats, of the tokens that `read_on` would read.

    Raises:
      UserError: see `read_on`.
    """
    self._check_more(state, prompts)
    tokens, count = align(prompts)
    return _rows(self._call(passes.score_on, state, *self.place((tokens, count))), count)

  def wants(self, state: State) -> np.ndarray:
    """Returns the texts of a state that may get latents, bool [B]: all of them."""
    return np.ones(len(state.position), bool)

  def augment(self, state: State) -> Augmentation:
    """Makes latents for the end of every text of a state, which stays as it is.

    Raises:
      UserError: there is no coprocessor, or a text is too short for refining latents.
    """
    check_anchors(np.asarray(state.lengths), self.first_anchor)
    # A worker on other devices gets a copy of the state, and its latents come back.
    if self.worker is not self:
      return self.place(self.worker.augment(self.worker.place(state)))
    return self._call(passes.augment, state)

  def attach(self, state: State, augmentation: Augmentation,
             rows: np.ndarray | None = None) -> State:
    """Returns the state with latents in the texts `rows` (bool [B]), or in all.

    To detach them, go back to `state`: it stays as it is.
    """
    rows = np.ones(len(state.position), bool) if rows is None else rows
    with self._context():
      return passes.attach(self.model, state, augmentation, self.place(rows))

  def choose(self, rows: np.ndarray, chosen: State, other: State) -> State:
    """Takes `chosen` for the texts `rows` and `other` for the others; see `passes.choose`."""
    with self._context():
      return passes.choose(self.place(rows), chosen, other)

  def decode(self, state: State, keys: Array, *, count: int | np.ndarray, active: np.ndarray,
             limit: int, size: int, sampling: Sampling = GREEDY, eos: tuple[int, ...] = (),
             num_ids: int | None = None, threshold: float | None = None,
             gate: Gate | None = None, gate_from: np.ndarray | None = None,
             forced: np.ndarray | None = None, rows: PyTree = None, num_top: int = 0,
             ) -> tuple[State, Decoded]:
    """Decodes up to `limit` tokens; the keys and values of `state` are overwritten.

    Args:
      gate_from: int32 [B], see `decode.decode`, as for the others; None for 0.
      forced: int32 [B, size].
    """
    cache = state.cache
    # Keys and values are donated, so they are passed apart from the rest of the state.
    bare = state.replace(cache=cache.replace(keys=(), values=()))
    gate_from = np.zeros(len(active), np.int32) if gate_from is None else gate_from
    threshold = None if threshold is None else np.float32(threshold)
    forced = None if forced is None else self.place(forced).T
    # A vocabulary of as many ids as there are embeddings needs no check of what is drawn.
    if num_ids is not None and num_ids >= self.model.decoder.config.vocab_size:
      num_ids = None
    return self._call(
        decode, (cache.keys, cache.values), bare, keys, np.asarray(count, np.int32),
        self.place(active), np.int32(limit), threshold, gate, self.place(gate_from), forced, rows,
        sampling=sampling, size=size, eos=eos, num_ids=num_ids, num_top=num_top)

  def warm_up(self, batch: int) -> None:
    """Compiles the program that makes latents for `batch` texts, before the first texts need it.

    Raises:
      UserError: there is no coprocessor, or the cache has no room for latents.
    """
    # The shortest texts that can have latents. Their tokens do not matter.
    shortest = [0] * (self.first_anchor + 1)
    state = self.read([shortest] * (batch + -batch % self.shards))
    jax.block_until_ready(self.attach(state, self.augment(state)))

  def place(self, tree: PyTree) -> PyTree:
    """Puts scalars, and arrays whose first axis is the texts, on the devices of this engine."""
    if self._mesh is None:
      return jax.device_put(tree, next(iter(self.weights.embedder['table'].devices())))
    texts, everywhere = (batch_sharding(self._mesh, self._rules),
                         NamedSharding(self._mesh, PartitionSpec()))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, texts if leaf.ndim else everywhere), tree)

  def warn(self, reason: str) -> None:
    """Logs, once in the life of this engine, why there are no latents."""
    if not self._warned:
      logging.warning('No latents: %s. The decoder continues without them. This is logged once; '
                      'Engine.stats counts how often it happens.', reason)
    self._warned = True

  def _check_texts(self, prompts: Prompts) -> None:
    check_prompts(prompts, np.zeros(len(prompts)), self.model.decoder.config.vocab_size)
    check_room(np.array([len(prompt) for prompt in prompts]), 0, self.model.plan.global_slots)
    if len(prompts) % self.shards:
      raise UserError(f'{len(prompts)} prompts do not divide over the {self.shards} shards of the '
                      'mesh: give a multiple')

  def _check_more(self, state: State, prompts: Prompts) -> None:
    lengths = np.asarray(state.lengths)
    if len(prompts) != len(lengths):
      raise UserError(f'{len(prompts)} prompts for a state of {len(lengths)} texts: give one for '
                      'each, which may be empty')
    check_prompts(prompts, lengths, self.model.decoder.config.vocab_size)
    check_room(lengths + [len(prompt) for prompt in prompts], 0, self.model.plan.global_slots)

  def _call(self, program: Callable[..., PyTree], *arrays: PyTree, **options: object) -> PyTree:
    with self._context():
      return program(self.model, self.weights, *arrays, **options)

  def _context(self) -> contextlib.AbstractContextManager:
    # Entered at every call, since a mesh is set for one thread alone.
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def copied(state: State) -> State:
  """Returns the state with keys and values of its own, which may be overwritten."""
  return state.replace(cache=_copy(state.cache))


@jax.jit
def _copy(cache: RingKVCache) -> RingKVCache:
  return jax.tree.map(jnp.copy, cache)


def _rows(aligned: Array, count: np.ndarray) -> list[np.ndarray]:
  """Takes the padding off rows [B, T] whose texts are at their ends."""
  return [row[len(row) - size:] for row, size in zip(np.asarray(aligned), count, strict=True)]


def check_coprocessor(decoder_config: TransformerConfig, config: DeliberationConfig,
                      params: Params) -> None:
  """Raises UserError where inference cannot run this coprocessor with this decoder."""
  if config.reads == 'states':
    raise UserError("this coprocessor has reads = 'states': it reads the decoder's hidden states, "
                    'which generation does not keep. Use one that reads the cache')
  expected = (config.num_latents, decoder_config.embed_dim)
  if params['soft_tokens'].shape != expected:
    raise UserError(
        f'the soft tokens of the coprocessor have shape {params["soft_tokens"].shape}, but '
        f'{expected} is expected: give the decoder that it was trained on')


# --- From disk ---

NONE = 'none'  # given in the place of a coprocessor


@dataclasses.dataclass(frozen=True)
class LoadedDecoder:
  """A decoder in memory.

  Attributes:
    config: its sizes.
    params: its weights, with the transformer unstacked; matrices are in `dtype` or narrower.
    fingerprint: fingerprint of the weights as stored.
    tokenizer: tokenizer that it was trained with.
    dtype: dtype of the computation and the cache.
  """
  config: TransformerConfig
  params: Params
  fingerprint: str
  tokenizer: Tokenizer
  dtype: str = 'float32'


def open_engine(decoder_dir: Path, coprocessor: str = '', vocabulary: str = '', length: int = 2048,
                gate: FittedGate | None = None,
                dtype: str = 'float32') -> tuple[Engine, Tokenizer]:
  """Opens a decoder and its coprocessor from disk, after all checks that need no weights.

  Args:
    decoder_dir: directory of a decoder, in any format that `model.weights` reads.
    coprocessor: directory of a coprocessor, or the work directory that holds it; '' or 'none' for
      none.
    vocabulary: path of a SentencePiece model or tokenizer.json, or 'byte'; '' for the decoder's
      own.
    length: largest number of tokens of a text.
    gate: gate to check against the decoder.
    dtype: see `read_decoder`.

  Raises:
    UserError: one of them is absent or damaged, or they do not belong together.
  """
  checkpoint = weights.open_checkpoint(decoder_dir)
  check_length(checkpoint.config, length, dtype)
  tokenizer = tokenizer_of(checkpoint, vocabulary)
  # Everything that descriptions can tell, before any weights are read.
  place = None
  if coprocessor not in ('', NONE):
    place = coprocessor_checkpoint.locate_coprocessor(as_path(coprocessor))
  description = None if place is None else coprocessor_checkpoint.describe(place)
  check_match(checkpoint.config, checkpoint.fingerprint, description, gate)
  decoder = read_decoder(checkpoint, tokenizer, dtype)
  trained = None if place is None else coprocessor_checkpoint.load(place)
  return build_engine(decoder, trained, length, gate), tokenizer


def read_decoder(checkpoint: weights.Checkpoint, tokenizer: Tokenizer,
                 dtype: str = 'float32') -> LoadedDecoder:
  """Reads the weights of a decoder; `dtype` is that of the computation."""
  params = checkpoint.load()
  decoder_fingerprint = checkpoint.fingerprint or fingerprint(params)
  params = weights.round_matrices(params, dtype)
  params = {**params, 'transformer': passes.unstack(params['transformer'])}
  return LoadedDecoder(checkpoint.config, params, decoder_fingerprint, tokenizer, dtype)


def build_engine(decoder: LoadedDecoder, coprocessor: CoprocessorCheckpoint | None, length: int,
                 gate: FittedGate | None = None) -> Engine:
  """Puts a decoder and its coprocessor together.

  Raises:
    UserError: they do not belong together, or see Engine.
  """
  check_match(decoder.config, decoder.fingerprint, coprocessor, gate)
  pair = None
  if coprocessor is not None:
    # It may have been trained on int8 weights, which inference does not read.
    coprocessor_checkpoint.compare_frozen_dtype(
        coprocessor, decoder.params['embedder']['table'].dtype.name)
    pair = coprocessor.config, weights.round_matrices(coprocessor.params, decoder.dtype)
  return Engine(decoder.config, decoder.params, length=length, coprocessor=pair,
                dtype=decoder.dtype, decoder_fingerprint=decoder.fingerprint)


def check_match(decoder_config: TransformerConfig, decoder_fingerprint: str,
                coprocessor: Description | None, gate: FittedGate | None) -> None:
  """Raises UserError where a coprocessor or a gate was made for another decoder.

  Args:
    decoder_fingerprint: '' while it is not known; then only the sizes are compared.
  """
  if coprocessor is not None and coprocessor.decoder_config != decoder_config:
    lines = differences(dataclasses.asdict(coprocessor.decoder_config),
                        dataclasses.asdict(decoder_config), 'decoder.')
    raise UserError('\n'.join(['the coprocessor was trained on another decoder:', *lines,
                               'Give the decoder that it was trained on.']))
  if coprocessor is not None and decoder_fingerprint:
    coprocessor_checkpoint.check_decoder(coprocessor, decoder_fingerprint)
  if gate is not None and decoder_fingerprint:
    gate.check_decoder(decoder_fingerprint)
