"""Scores answers under several arms, after one reading of each context.

Many contexts are packed in a trunk row, which the decoder reads once. Each answer is a trace over
the shared cache, by the attention that training has. Every arm reads the same traces, and differs
in its latents alone: own ones, another example's, constant ones, or none.

`AnswerScorer` takes requests in ids. answer_packing.py says how they become arrays.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Bool, Float, Int, Params, PyTree, typed
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.loss import (
  OutputHead,
  by_platform,
  by_slices,
  chosen_logits,
  head_logits,
  nll_at_once,
  sum_blocks,
)
from latent_deliberation.deliberation.traces import Placement, place, take_from_trunk
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import (
  Context,
  Request,
  find_partners,
  group,
)
from latent_deliberation.evaluation.answer_packing import AnswerBatch, Call, pack, plan
from latent_deliberation.evaluation.perplexity import CONSTANT, FROZEN, MEAN, OWN, SHUFFLED, ZERO
from latent_deliberation.model.attention import AttentionMaskSpec, KVCache
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.layers import output_head
from latent_deliberation.sharding import batch_sharding, batch_shards

# Arms in the order of tables. 'mean' has the mean outputs over contexts of the task.
ARMS = (FROZEN, OWN, SHUFFLED, ZERO, MEAN, CONSTANT)
LOGIT_ROWS = 1024  # targets of all arms whose logits exist at the same time
MEAN_CONTEXTS = 256  # contexts that the mean outputs are taken over, at most


@typed
def nll_and_likeliest(hidden: Float[Array, 'B N D'], targets: Int[Array, 'B N'],
                      unembedding: OutputHead, cap: float | None,
                      chunk: int) -> tuple[Float[Array, 'B N'], Bool[Array, 'B N']]:
  """Returns `loss.token_nll`, and whether no token has a higher logit than the target.

  Both come from one pass over the output head. Arguments are those of `token_nll`.
  """

  def at_once(cap: float | None, *arrays: PyTree) -> tuple[Array, Array]:
    logits = head_logits(cap, arrays[0], arrays[2])  # XLA computes them once, with those of the nll
    return nll_at_once(cap, *arrays), chosen_logits(logits, arrays[1]) >= jnp.max(logits, axis=-1)

  def by_blocks(cap: float | None, *arrays: PyTree) -> tuple[Array, Array]:
    sums = sum_blocks(cap, *arrays)
    return sums.nll, sums.chosen >= sums.peak

  measure = functools.partial(by_platform, by_blocks, at_once, cap)
  return by_slices(measure, hidden, targets, unembedding, chunk)


@dataclasses.dataclass(frozen=True)
class Source:
  """A maker of latents: a coprocessor, or constant soft tokens.

  Attributes:
    coprocessor: the module.
    params: its parameters.
  """
  coprocessor: Coprocessor
  params: Params


@dataclasses.dataclass(frozen=True)
class Scored:
  """The scores of some requests.

  Attributes:
    numbers: [n] number of each request.
    nats: float64 [n, arms] negative log-likelihood of the whole continuation.
    greedy: bool [n, arms] whether each of its tokens is the likeliest one.
  """
  numbers: np.ndarray
  nats: np.ndarray
  greedy: np.ndarray


class AnswerScorer:
  """Scores continuations of contexts under several arms.

  Attributes:
    arms: names of ARMS, in the order of the scores.
  """

  def __init__(self, decoder: Decoder, decoder_params: Params, arms: Sequence[str], *, mesh: Mesh,
               rules: Mapping[str, Sequence[str]], own: Source | None = None,
               constant: Source | None = None):
    """Checks that every arm can be scored.

    Args:
      decoder: the frozen decoder, without weights.
      decoder_params: its weights.
      arms: see above.
      mesh, rules: devices that hold the weights, and the mapping onto them.
      own: the coprocessor; None scores the decoder alone.
      constant: trained constant soft tokens, for the arm of this name.

    Raises:
      UserError: an arm is unknown, or lacks what makes its latents; or the constant soft tokens
        are of another number or kind.
    """
    check_arms(arms, own is not None, constant is not None)
    _check_kinds(own, constant)
    self.arms = tuple(arms)
    self._decoder, self._decoder_params = decoder, decoder_params
    self._sources = {name: source for name, source in ((OWN, own), (CONSTANT, constant)) if source}
    self._mesh, self._rules = mesh, rules
    compiled = functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._programs = {name: compiled(functools.partial(self._score, name)) for name in (
        self.arms, (FROZEN,))}
    self._sum_outputs = compiled(self._sum)
    self._mean = None

  @property
  def config(self):
    """Config of the latents; None for the decoder alone."""
    source = next(iter(self._sources.values()), None)
    return source and source.coprocessor.config

  def has_room(self, request: Request) -> bool:
    """Whether the latents of the arms fit before the request's anchor."""
    anchor = len(request.context) - 1 if request.anchor is None else request.anchor
    return self.config is None or anchor >= self.config.first_anchor

  def set_params(self, params: Params) -> None:
    """Takes other parameters of the coprocessor, as its training goes on."""
    self._sources[OWN] = dataclasses.replace(self._sources[OWN], params=params)

  def score(self, requests: Sequence[Request],
            skip: Collection[int] = ()) -> Iterator[tuple[Scored, int]]:
    """Yields the scores of each call, and the number of calls that are left.

    A request without room for latents gets the score of the frozen decoder in every arm.

    Args:
      requests: all requests of a task. Another example's latents come from these.
      skip: numbers of requests that need no score, since they have one already.

    Raises:
      UserError: a request is empty; see `answer_contexts.group`.
    """
    contexts = group(requests)
    has_room = [self.config is None or context.anchor >= self.config.first_anchor
                for context in contexts]
    # A partner lends its latents, so it needs room for them.
    lenders = [number for number, fits in enumerate(has_room) if fits]
    find_partners(contexts, lenders)
    skip = set(skip)
    wanted = [number for number, context in enumerate(contexts) if not skip >= set(
        context.requests)]
    augmented, short = ([number for number in wanted if has_room[number] == chosen]
                        for chosen in (True, False))
    if MEAN in self.arms and augmented:
      self._mean = self._mean_outputs(contexts, lenders)
    calls = [*((self.arms, call) for call in self._plan(contexts, augmented, self.arms)),
             *(((FROZEN,), call) for call in self._plan(contexts, short, (FROZEN,)))]
    for done, (arms, call) in enumerate(calls, start=1):
      yield self._score_call(arms, contexts, call), len(calls) - done

  def _plan(self, contexts: Sequence[Context], chosen: Sequence[int],
            arms: Sequence[str]) -> list[Call]:
    num_latents = 1 if tuple(arms) == (FROZEN,) else self.config.num_latents
    return plan(contexts, chosen, num_latents=num_latents, partners=SHUFFLED in arms,
                shards=batch_shards(self._mesh, self._rules)) if chosen else []

  def _score_call(self, arms: tuple[str, ...], contexts: Sequence[Context], call: Call) -> Scored:
    batch, first = pack(contexts, call)
    params = {name: source.params for name, source in self._sources.items()}
    with jax.set_mesh(self._mesh):
      nll, likeliest = jax.device_get(self._programs[arms](
          params, self._decoder_params, self._place(batch), self._mean))
    # Each request is the sum of its targets.
    numbers, nats, greedy = [], [], []
    for number, start in first.items():
      for request, targets in contexts[number].requests.items():
        at = start + np.array(targets)
        numbers.append(request)
        nats.append(nll[:, at].sum(axis=-1, dtype=np.float64))
        greedy.append(likeliest[:, at].all(axis=-1))
    repeated = (len(numbers), len(self.arms))  # the frozen decoder alone counts for every arm
    return Scored(np.array(numbers), np.broadcast_to(np.array(nats), repeated),
                  np.broadcast_to(np.array(greedy), repeated))

  def _place(self, batch: AnswerBatch) -> AnswerBatch:
    """Puts a batch, which every process has whole, on the devices."""
    everywhere = NamedSharding(self._mesh, PartitionSpec())
    # The prefix and the targets belong to all rows.
    shardings = AnswerBatch(**{
        field.name: everywhere if field.name in ('prefix', 'source', 'targets')
        else batch_sharding(self._mesh, self._rules) for field in dataclasses.fields(batch)})

    def put(sharding: NamedSharding, leaves: PyTree) -> PyTree:
      return jax.tree.map(lambda leaf: jax.make_array_from_callback(
          leaf.shape, sharding, lambda index: leaf[index]), leaves)

    return jax.tree.map(put, shardings, batch)

  # --- The programs ---

  def _score(self, arms: tuple[str, ...], params: Mapping[str, Params], decoder_params: Params,
             batch: AnswerBatch, mean: Array | None) -> tuple[Array, Array]:
    """Returns nats and whether it is the likeliest token, [arms, N] each, of every target."""
    with nn.logical_axis_rules(tuple(self._rules.items())):
      read = _read(self._decoder, decoder_params, batch)
      computed = tuple(dict.fromkeys(map(self._same_as, arms)))
      states = self._states(computed, params, decoder_params, batch, read, mean)
      # One pass over the head for all arms, divided over the shards.
      flat = states.reshape(len(computed) * batch_shards(self._mesh, self._rules), -1,
                            states.shape[-1])
      flat = nn.with_logical_constraint(flat, ('batch', None, None))
      nll, likeliest = nll_and_likeliest(
          flat, jnp.tile(batch.targets, len(computed)).reshape(flat.shape[:2]),
          output_head(decoder_params), self._decoder.config.final_softcap,
          chunk=max(1, LOGIT_ROWS // len(flat)))
      index = np.array([computed.index(self._same_as(arm)) for arm in arms])
      return tuple(leaf.reshape(len(computed), -1)[index] for leaf in (nll, likeliest))

  def _same_as(self, arm: str) -> str:
    """Returns the arm whose states an arm has: refining latents of zero are the frozen decoder."""
    return FROZEN if arm == ZERO and self._refines else arm

  @property
  def _refines(self) -> bool:
    return self.config is not None and self.config.latents == 'refining'

  def _states(self, arms: tuple[str, ...], params: Mapping[str, Params], decoder_params: Params,
              batch: AnswerBatch, read: '_Read', mean: Array | None) -> Array:
    """Returns hidden states [arms, N, D] that predict the targets."""
    if arms == (FROZEN,):
      # No latents. Their place in each trace is hidden, and its state is that of the anchor.
      shape = (*batch.anchors.shape, 1, self._decoder.config.embed_dim)
      latents, shown = jnp.zeros((1, *shape), self._decoder.dtype), jnp.array([False])
      placement = None
    else:
      placement = place(read.trunk, batch.anchors, self.config, 1)
      latents = self._latents(arms, params, decoder_params, batch, placement, read, mean)
      # Refining latents of zero are the frozen decoder, and round as those of the other arms do.
      shown = jnp.array([arm != FROZEN or self._refines for arm in arms])

    def second_pass(arm: tuple[Array, Array]) -> Array:
      return _second_pass(self._decoder, decoder_params, *arm, batch, placement, read)

    # A loop over the arms is compiled once, and rounds alike for all of them.
    return jax.lax.map(second_pass, (latents, shown))

  def _latents(self, arms: Sequence[str], params: Mapping[str, Params], decoder_params: Params,
               batch: AnswerBatch, placement: Placement, read: '_Read',
               mean: Array | None) -> Array:
    """Returns the latents of each arm, [arms, B, C, Z, D]; the base tokens for the frozen one."""
    outputs = {name: self._outputs(name, params, decoder_params, placement, read)
               for name in self._sources if {OWN: {OWN, SHUFFLED}, CONSTANT: {CONSTANT}}[name]
               & set(arms)}
    shape = (*batch.anchors.shape, self.config.num_latents, self._decoder.config.embed_dim)
    made = []
    for arm in arms:
      name = CONSTANT if arm == CONSTANT else OWN
      if arm == FROZEN:
        made.append(self._decoder.apply({'params': decoder_params}, placement.base_tokens,
                                        method='embed'))
        continue
      if arm == SHUFFLED:
        used = outputs[OWN].reshape(-1, *shape[2:])[batch.partners]
      elif arm in outputs:
        used = outputs[arm]
      else:
        used = jnp.broadcast_to(0.0 if arm == ZERO else mean, shape).astype(self._decoder.dtype)
      made.append(self._deliberator(name).latents(params[name], decoder_params, placement, used))
    return jnp.stack(made)

  def _outputs(self, name: str, params: Mapping[str, Params], decoder_params: Params,
               placement: Placement, read: '_Read') -> Array:
    return self._deliberator(name).coprocess(params[name], decoder_params, placement, read.hidden,
                                             read.cache)

  def _deliberator(self, name: str) -> Deliberator:
    return Deliberator(self._decoder, self._sources[name].coprocessor)

  def _mean_outputs(self, contexts: Sequence[Context], lenders: Sequence[int]) -> Array:
    """Returns the coprocessor's mean outputs [Z, D], over contexts spread evenly over the task."""
    chosen = lenders[::-(-len(lenders) // MEAN_CONTEXTS)]
    total, count = 0.0, 0
    params = {OWN: self._sources[OWN].params}
    for call in self._plan(contexts, chosen, (OWN,)):
      with jax.set_mesh(self._mesh):
        total += jax.device_get(self._sum_outputs(
            params, self._decoder_params, self._place(pack(contexts, call)[0])))
      count += sum(map(len, call.rows))
    return np.asarray(total / count, np.float32)

  def _sum(self, params: Mapping[str, Params], decoder_params: Params,
           batch: AnswerBatch) -> Array:
    with nn.logical_axis_rules(tuple(self._rules.items())):
      read = _read(self._decoder, decoder_params, batch)
      placement = place(read.trunk, batch.anchors, self.config, 1)
      outputs = self._outputs(OWN, params, decoder_params, placement, read)
      return jnp.sum(outputs.astype(jnp.float32), axis=(0, 1),
                     where=batch.contexts[..., None, None])


@dataclasses.dataclass(frozen=True)
class _Read:
  """Trunk rows that the decoder has read: tokens, hidden states and kv-cache."""
  trunk: Batch
  hidden: Array
  cache: KVCache


def _read(decoder: Decoder, decoder_params: Params, batch: AnswerBatch) -> _Read:
  """Reads the trunk rows; a common prefix is read once and copied into the cache of each row."""
  variables = {'params': decoder_params}
  shared = batch.prefix.tokens.shape[1]
  if not shared:
    hidden, cache = decoder.apply(variables, batch.batch.tokens, batch.batch.positions,
                                  batch.batch.segments, method='prefill')
    return _Read(batch.batch, hidden, cache)
  before, prefix = decoder.apply(variables, batch.prefix.tokens, batch.prefix.positions,
                                 batch.prefix.segments, method='prefill')
  rows = len(batch.batch.tokens)
  repeat = lambda leaf, axis: jnp.repeat(leaf, rows, axis)  # noqa: E731
  prefix = KVCache(repeat(prefix.keys, 1), repeat(prefix.values, 1), repeat(prefix.positions, 0),
                   repeat(prefix.segments, 0))
  positions, segments = batch.batch.positions[:, None], batch.batch.segments[:, None]
  x = decoder.apply(variables, batch.batch.tokens[:, None], method='embed')
  hidden, fresh = decoder.apply(
      variables, x, positions, AttentionMaskSpec(segments, jnp.full((rows, 1), shared)), prefix,
      method='transform')
  trunk = jax.tree.map(lambda first, rest: jnp.concatenate([repeat(first, 0), rest], axis=1),
                       batch.prefix, batch.batch)
  return _Read(trunk, jnp.concatenate([repeat(before, 0), hidden[:, 0]], axis=1),
               prefix.append(fresh, positions, segments))


def _second_pass(decoder: Decoder, decoder_params: Params, latents: Array, shown: Array,
                 batch: AnswerBatch, placement: Placement | None, read: _Read) -> Array:
  """Returns the hidden states [N, D] that predict the targets, after the latents of one arm.

  Args:
    latents: [B, C, Z, D] latents of each context.
    shown: bool []; if False, the latents are hidden and the trace goes on from the anchor.
    placement: placement of the latents; None if they are never shown.
  """
  owner, is_latent = jnp.maximum(batch.owner, 0), batch.latent >= 0
  of_owner = lambda values: jnp.take_along_axis(values, owner, axis=1)  # noqa: E731
  # Positions: ahead tokens follow the anchor, or what the placement says.
  anchor = take_from_trunk(read.trunk.positions, batch.anchors)
  begin, prefix_length, latent_positions = anchor + 1, batch.anchors + 1, anchor[..., None]
  if placement is not None:
    begin = jnp.where(shown, placement.ahead_positions[..., 0], begin)
    prefix_length = jnp.where(shown, placement.decoder_prefix_length, prefix_length)
    latent_positions = placement.latent_positions
  number = jnp.maximum(batch.latent, 0)
  at_latent = jax.vmap(lambda row, context, latent: row[context, latent])
  positions = jnp.where(is_latent, at_latent(latent_positions, owner, number),
                        of_owner(begin) + batch.ahead)
  # Each token sees its own context, and of the row its own trace.
  segments = of_owner(take_from_trunk(read.trunk.segments, batch.anchors))
  segments = jnp.where((batch.owner >= 0) & (shown | ~is_latent), segments, 0)
  tokens = decoder.apply({'params': decoder_params}, batch.tokens[:, None], method='embed')
  x = jnp.where(is_latent[:, None, :, None], at_latent(latents, owner, number)[:, None], tokens)
  mask_spec = AttentionMaskSpec(segments[:, None], of_owner(prefix_length)[:, None],
                                batch.first[:, None])
  hidden, _ = decoder.apply({'params': decoder_params}, x, positions[:, None], mask_spec,
                            read.cache, method='transform')
  # Without latents, the anchor predicts the first ahead token.
  alone = take_from_trunk(take_from_trunk(read.hidden, batch.anchors), owner)
  hidden = jnp.where((is_latent & ~shown)[..., None], alone, hidden[:, 0])
  return hidden.reshape(-1, hidden.shape[-1])[batch.source]


def check_arms(arms: Sequence[str], has_own: bool, has_constant: bool) -> None:
  """Checks names of arms, and that there is what makes their latents.

  Args:
    arms: names of ARMS.
    has_own: whether there is a coprocessor.
    has_constant: whether there are trained constant soft tokens.

  Raises:
    UserError: there is no arm; or one is unknown, repeated, or lacks its latents.
  """
  if not arms or len(set(arms)) < len(arms):
    raise UserError(f'arms = {list(arms)}: give one or more of {ARMS}, each once')
  for arm in arms:
    if arm not in ARMS:
      raise UserError(f'arm {arm!r} is unknown: give one of {ARMS}')
    if arm == CONSTANT and not has_constant:
      raise UserError(f'arm {arm!r} needs trained constant soft tokens: give their directory '
                      '(constant, or --constant)')
    if arm not in (FROZEN, CONSTANT) and not has_own:
      raise UserError(f'arm {arm!r} needs a coprocessor: give its directory (coprocessor, or '
                      f'--coprocessor), or the arm {FROZEN!r} alone')


def _check_kinds(own: Source | None, constant: Source | None) -> None:
  """Raises UserError where constant soft tokens are of another kind or number than own latents."""
  if own is not None and constant is not None:
    ours, theirs = own.coprocessor.config, constant.coprocessor.config
    for key in ('num_latents', 'latents', 'positions'):
      if getattr(ours, key) != getattr(theirs, key):
        raise UserError(f'the constant soft tokens have {key} = {getattr(theirs, key)!r}, and the '
                        f'coprocessor has {getattr(ours, key)!r}: give constant soft tokens of '
                        'the same kind')
