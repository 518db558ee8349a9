"""Perplexity by ahead position, in three steps.

1. Controls: outputs that replace a coprocessor's own, to tell the content of latents from their
   presence.
2. Scores: nats of every arm at each ahead position of each text, on the same traces for all arms.
3. Changes: relative change of perplexity between two arms, with a paired bootstrap over texts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.traces import (
  Traces,
  evaluation_keys,
  place,
  sample_traces,
  take_from_trunk,
)
from latent_deliberation.errors import UserError

# Names of arms.
FROZEN = 'frozen'  # the decoder alone; all other arms are compared with it
OWN = 'own'
SHUFFLED, ZERO, MEAN = 'shuffled', 'zero', 'mean'  # controls, which replace own outputs
CONSTANT = 'constant'  # soft tokens that were trained without a coprocessor
CHAIN = 'chain'  # the frozen decoder, which answers after a chain of thought that it wrote
# An interval over fewer independent texts is no evidence: a bootstrap makes it too narrow. Nothing
# is concluded from it, and it is not shown.
FEWEST_TEXTS = 20
Control = Callable[[Array, Array], Array]


def own(outputs: Array, valid: Array) -> Array:
  """Returns the coprocessor's own outputs."""
  del valid
  return outputs


def shuffled(outputs: Array, valid: Array) -> Array:
  """Returns the outputs of the previous text in the batch: same distribution, wrong content."""
  outputs, valid = jnp.roll(outputs, 1, axis=0), jnp.roll(valid, 1, axis=0)
  # Valid traces come first. If the other text has fewer traces, they are used again.
  count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
  trace = jnp.arange(valid.shape[1]) % count
  return jnp.take_along_axis(outputs, trace[..., None, None], axis=1)


def zero(outputs: Array, valid: Array) -> Array:
  """Returns outputs of zero."""
  del valid
  return jnp.zeros_like(outputs)


def mean(outputs: Array, valid: Array) -> Array:
  """Returns the batch's mean over texts and traces, for each latent: form without content."""
  where = valid[..., None, None]
  average = jnp.sum(jnp.where(where, outputs, 0), axis=(0, 1), keepdims=True) / jnp.maximum(
      1, jnp.sum(where))
  return jnp.broadcast_to(average, outputs.shape)


OUTPUTS: Mapping[str, Control] = {OWN: own, SHUFFLED: shuffled, ZERO: zero, MEAN: mean}
# Arms in which something else replaces an arm's own latents.
CONTROLS = tuple(name for name in OUTPUTS if name != OWN)


@dataclasses.dataclass(frozen=True)
class AheadNLL:
  """Scores of one arm on every text; each packed row is a text of its own until `merged`.

  Attributes:
    total: float64 [texts, A] nats at each ahead position, summed over the traces of a text.
    count: [texts, A] number of targets in that sum; 0 if no trace of the text reaches the position.
  """
  total: np.ndarray
  count: np.ndarray

  def __post_init__(self):
    if self.total.ndim != 2 or self.total.shape != self.count.shape:
      raise ValueError(
          f'total has shape {self.total.shape}, count {self.count.shape}: both must be [texts, A]')
    # A position without targets has no mean.
    targets = self.count.sum(axis=0)
    if not targets.all():
      raise UserError(
          f'ahead position {int(targets.argmin()) + 1} has no target in any of '
          f'{len(self.count)} rows. Evaluate on more or longer rows, or on fewer '
          'ahead positions.')
    # A NaN would hide in every mean, so name its place.
    finite = np.isfinite(self.total).all(axis=0)
    if not finite.all():
      position = int(finite.argmin())
      row = int(np.isfinite(self.total[:, position]).argmin())
      raise UserError(
          f'the loss of row {row} at ahead position {position + 1} is '
          f'{self.total[row, position]}. The weights or the computation are broken: score an '
          "earlier checkpoint, or set computation.dtype = 'float32'")

  @property
  def nll(self) -> np.ndarray:
    """Returns the mean nats per target at each ahead position, [A]."""
    return self.total.sum(axis=0) / self.count.sum(axis=0)

  def merged(self, labels: np.ndarray) -> 'AheadNLL':
    """Adds up the rows that have equal labels, int [texts], as one text."""
    groups, member = np.unique(labels, return_inverse=True)
    sums = np.zeros((2, len(groups), self.count.shape[1]))
    np.add.at(sums, (slice(None), member), np.stack([self.total, self.count]))
    return AheadNLL(sums[0], sums[1].astype(self.count.dtype))


# (params, decoder_params, batch, index of the batch) -> {arm: [B, A] summed nats}, [B, A] targets
Scorer = Callable[[Params, Params, Batch, int], tuple[Mapping[str, Array], Array]]


def make_scorer(deliberator: Deliberator, arms: Sequence[str], *, num_traces: int, num_ahead: int,
                loss_chunk: int, seed: int, mesh: Mesh, rules: Mapping[str, Sequence[str]],
                delay: int = 0, first_anchor: int = 0,
                constant: Deliberator | None = None) -> Scorer:
  """Compiles the scoring of one batch under several arms, on the same traces.

  Traces are drawn from fold_in(seed, index of the batch). Two deliberators get the same targets if
  they get the same `first_anchor`.

  Args:
    deliberator: decoder and coprocessor.
    arms: 'frozen' (the decoder alone), names of OUTPUTS, and 'constant' if `constant` is given.
    num_traces: M, traces of a text.
    num_ahead: A, ahead positions; may exceed the number of the training.
    loss_chunk: targets of a text whose logits exist at the same time.
    seed: seed of the traces.
    mesh: devices to compute on.
    rules: logical axis rules.
    delay: ahead tokens that are read before latents join the cache.
    first_anchor: lowest index of an anchor, see `sample_traces`. To compare deliberators, give the
      highest first anchor of them all.
    constant: decoder and constant soft tokens, which share the prefill. The parameters of a score
      are then a pair: those of the coprocessor, and those of the soft tokens.
  """
  # Scoring may have other numbers of traces and ahead tokens than training.
  scored = deliberator.with_traces(num_traces, num_ahead)
  soft = constant and constant.with_traces(num_traces, num_ahead)

  def score(params: Params, decoder_params: Params, batch: Batch,
            index: Array) -> tuple[dict[str, Array], Array]:
    params, soft_tokens = params if soft else (params, None)
    keys = evaluation_keys(seed, index, batch)
    with nn.logical_axis_rules(tuple(rules.items())):
      traces = sample_traces(keys, batch, scored.config, first_anchor)
      # Every trace has the same delay, so that arms differ in latents alone.
      traces = traces.replace(delay=jnp.full_like(traces.anchors, delay) if delay else None)
      states = arm_states(scored, arms, params, decoder_params, batch, traces,
                          (soft, soft_tokens))
      nll = {arm: ahead_nll(hidden, traces, decoder_params,
                            scored.decoder.config.final_softcap, loss_chunk)
             for arm, hidden in states.items()}
    valid = traces.ahead_valid
    return {arm: jnp.sum(values * valid, axis=1) for arm, values in nll.items()}, valid.sum(axis=1)

  compiled = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def scorer(params: Params, decoder_params: Params, batch: Batch, index: int):
    with jax.set_mesh(mesh):
      return compiled(params, decoder_params, batch, jnp.asarray(index))

  return scorer


def arm_states(deliberator: Deliberator, arms: Sequence[str], params: Params,
               decoder_params: Params, batch: Batch, traces: Traces,
               constant: tuple[Deliberator | None, Params | None] = (None, None),
               ) -> dict[str, Array]:
  """Returns hidden states [B, M, A, D] that predict the ahead tokens, by arm, after one prefill.

  `params` is not read if 'frozen' is the only arm. `constant` has constant soft tokens, and their
  parameters, for the arm of this name.
  """
  num_ahead = traces.ahead_tokens.shape[-1]
  trunk, cache = deliberator.prefill(decoder_params, batch)
  placement = place(batch, traces.anchors, deliberator.config, num_ahead, traces.delay)
  outputs = None
  if set(arms) - {FROZEN, CONSTANT}:
    outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
  states = {}
  for arm in arms:
    if arm == FROZEN:
      # Each trunk state predicts the next token. Targets past the end are not valid.
      index = traces.anchors[..., None] + jnp.arange(num_ahead)
      states[arm] = take_from_trunk(trunk, jnp.minimum(index, batch.tokens.shape[1] - 1))
    else:
      # Other arms replace the outputs, and go through the same second pass.
      if arm == CONSTANT:
        maker, weights = constant
        replaced = maker.coprocess(weights, decoder_params, placement, trunk, cache)
      else:
        maker, weights, replaced = deliberator, params, OUTPUTS[arm](outputs, traces.valid)
      latents = maker.latents(weights, decoder_params, placement, replaced)
      hidden = deliberator.second_pass(decoder_params, latents, traces, placement, cache)
      if traces.delay is not None:  # a delay lets the trunk predict the first token
        alone = take_from_trunk(trunk, traces.anchors)
        hidden = hidden.at[:, :, 0].set(
            jnp.where((traces.delay == 0)[..., None], hidden[:, :, 0], alone))
      states[arm] = hidden
  return states


def score_texts(scorer: Scorer, params: Params, decoder_params: Params,
                batches: Iterable[Batch]) -> dict[str, AheadNLL]:
  """Scores all batches with every arm of the scorer."""
  totals, count = sum_scores(scorer, params, decoder_params, batches)
  return {arm: AheadNLL(total, count) for arm, total in totals.items()}


def sum_scores(scorer: Scorer, params: Params, decoder_params: Params, batches: Iterable[Batch],
               ) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns summed nats by arm, float64 [texts, A], and the number of their targets."""
  totals: dict[str, list[np.ndarray]] = {}
  counts = []
  for index, batch in enumerate(batches):
    sums, count = jax.device_get(scorer(params, decoder_params, batch, index))
    for arm, total in sums.items():
      totals.setdefault(arm, []).append(total.astype(np.float64))
    counts.append(count)
  return {arm: np.concatenate(total) for arm, total in totals.items()}, np.concatenate(counts)


@dataclasses.dataclass(frozen=True)
class Change:
  """Change of perplexity in percent at each ahead position, [A], with the ends of its interval."""
  percent: np.ndarray
  low: np.ndarray
  high: np.ndarray


def check_paired(arms: Mapping[str, AheadNLL]) -> None:
  """Raises ValueError unless all arms scored the same targets of the same texts."""
  (first, reference), *others = arms.items()
  for name, arm in others:
    if arm.count.shape != reference.count.shape:
      raise ValueError(
          f'{name} has [texts, A] = {list(arm.count.shape)}, {first} has '
          f'{list(reference.count.shape)}. Evaluate both on the same texts and ahead positions.')
    if not np.array_equal(arm.count, reference.count):
      # The first place that differs is enough to find the cause.
      text, position = np.argwhere(arm.count != reference.count)[0]
      raise ValueError(
          f'text {text} has {arm.count[text, position]} targets at ahead position {position + 1} '
          f'in {name} and {reference.count[text, position]} in {first}. Evaluate both on the same '
          'traces.')


def check_positions(positions: Sequence[int] | None, length: int) -> None:
  """Raises ValueError unless the positions of a table increase, and are of the `length` scored."""
  if not positions or list(positions) != sorted(set(positions) & set(range(1, length + 1))):
    raise ValueError(f'positions = {positions}: must increase, from 1 to the {length} scored ahead '
                     'positions')


def relative_change(arm: AheadNLL, baseline: AheadNLL, samples: int = 2000,
                    seed: int = 0) -> Change:
  """Returns the relative change of perplexity from `baseline` to `arm`, with its 95% interval.

  The change is 100 * (exp(nll_arm - nll_baseline) - 1), with nll the mean over all targets.

  The interval is a paired percentile bootstrap (Efron 1979). Each draw takes texts with
  replacement, the same for both arms. What makes a text hard for both then cancels. It takes texts
  and not targets, because targets of one text are not independent. If few texts reach a
  position, a draw may hold none of them; such a draw is left out at that position. An interval over
  fewer than FEWEST_TEXTS texts is computed, but should not be shown.

  Args:
    arm, baseline: scores on the same targets.
    samples: draws of the bootstrap; memory is 16 bytes for each draw and text.
    seed: seed of the bootstrap.

  Raises:
    ValueError: the arms did not score the same targets.
    UserError: only one text has targets at a position.
  """
  check_paired({'arm': arm, 'baseline': baseline})
  texts = len(arm.count)
  reached = np.count_nonzero(arm.count, axis=0)
  if reached.min() < 2:
    raise UserError(
        f'ahead position {int(reached.argmin()) + 1} has targets in 1 of {texts} texts, and an '
        'interval needs 2. Evaluate on more texts, or on fewer ahead positions.')
  weights = bootstrap_weights(texts, samples, seed)  # the same for both arms
  difference, count = weights @ (arm.total - baseline.total), weights @ arm.count
  # NaN leaves a draw without targets out of the percentiles.
  drawn = np.where(count > 0, difference, np.nan) / np.maximum(count, 1)
  low, high = _to_percent(np.nanpercentile(drawn, (2.5, 97.5), axis=0))
  return Change(_to_percent(arm.nll - baseline.nll), low, high)


@functools.lru_cache(maxsize=1)  # a report uses the same draws for every arm
def bootstrap_weights(items: int, samples: int, seed: int = 0) -> np.ndarray:
  """Returns how often each draw of a bootstrap takes each item, float64 [samples, items].

  A draw takes as many items as there are, with replacement (Efron 1979).
  """
  rng = np.random.default_rng(seed)
  weights = rng.multinomial(items, np.full(items, 1 / items), size=samples).astype(np.float64)
  weights.flags.writeable = False  # it is shared
  return weights


def _to_percent(difference: np.ndarray) -> np.ndarray:
  return 100 * np.expm1(difference)
