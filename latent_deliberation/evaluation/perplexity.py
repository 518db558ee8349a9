"""Negative log-likelihood by ahead position, of a frozen decoder with and without latents."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.placement import place
from latent_deliberation.deliberation.traces import Traces, sample_traces, take_from_trunk
from latent_deliberation.evaluation.bootstrap import AheadNLL

BASELINE = 'frozen'  # the arm that all others are compared with: the decoder alone
OWN = 'own'
Control = Callable[[Array, Array], Array]


def own(outputs: Array, valid: Array) -> Array:
  """The coprocessor's own outputs."""
  del valid
  return outputs


def shuffled(outputs: Array, valid: Array) -> Array:
  """Those of the previous text in the batch: same distribution, wrong content."""
  outputs, valid = jnp.roll(outputs, 1, axis=0), jnp.roll(valid, 1, axis=0)
  # Valid traces stand first; where the other text has fewer, they come again.
  count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
  trace = jnp.arange(valid.shape[1]) % count
  return jnp.take_along_axis(outputs, trace[..., None, None], axis=1)


def zero(outputs: Array, valid: Array) -> Array:
  """None at all."""
  del valid
  return jnp.zeros_like(outputs)


def mean(outputs: Array, valid: Array) -> Array:
  """The mean over all texts and traces of the batch, at each latent: form without content."""
  average = jnp.mean(outputs, axis=(0, 1), keepdims=True, where=valid[..., None, None])
  return jnp.broadcast_to(average, outputs.shape)


ARMS: Mapping[str, Control] = {OWN: own, 'shuffled': shuffled, 'zero': zero, 'mean': mean}
# What stands in the place of an arm's own latents.
CONTROLS = tuple(name for name in ARMS if name != OWN)


# (params, decoder_params, batch, index of the batch) -> {arm: [B, A] summed nats}, [B, A] targets
Scorer = Callable[[Params, Params, Batch, int], tuple[Mapping[str, Array], Array]]


def make_scorer(deliberator: Deliberator, arms: Sequence[str], *, num_traces: int, num_ahead: int,
                loss_chunk: int, seed: int, mesh: Mesh, rules: Mapping[str, Sequence[str]],
                delay: int = 0, first_anchor: int = 0) -> Scorer:
  """Compiles the scoring of one batch under several arms, on the same traces.

  Args:
    deliberator: decoder and coprocessor.
    arms: 'frozen' (the decoder alone) and names of ARMS.
    num_traces: M; traces are drawn from fold_in(seed, index of the batch), so that two
      deliberators are scored on the same targets where their anchors may begin at the same index.
    num_ahead: A; may exceed what the coprocessor was trained with.
    delay: ahead tokens that are read before latents join the cache.
    first_anchor: see `sample_traces`; the highest of all deliberators that are to be scored on the
      same targets.
  """
  scored = deliberator.with_traces(num_traces, num_ahead)

  def score(params: Params, decoder_params: Params, batch: Batch,
            index: Array) -> tuple[dict[str, Array], Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index),
                            batch.tokens.shape[0])
    with nn.logical_axis_rules(tuple(rules.items())):
      traces = sample_traces(keys, batch, scored.config, first_anchor)
      traces = traces.replace(delay=jnp.full_like(traces.anchors, delay) if delay else None)
      states = arm_states(scored, arms, params, decoder_params, batch, traces)
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
               decoder_params: Params, batch: Batch, traces: Traces) -> dict[str, Array]:
  """Hidden states [B, M, A, D] that predict the ahead tokens, for each arm; prefilled once.

  Where 'frozen' is the only arm, `params` is not looked at.
  """
  num_ahead = traces.ahead_tokens.shape[-1]
  trunk, cache = deliberator.prefill(decoder_params, batch)
  placement = place(batch, traces.anchors, deliberator.config, num_ahead, traces.delay)
  outputs = None
  if set(arms) - {BASELINE}:
    outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
  states = {}
  for arm in arms:
    if arm == BASELINE:
      index = traces.anchors[..., None] + jnp.arange(num_ahead)
      states[arm] = take_from_trunk(trunk, jnp.minimum(index, batch.tokens.shape[1] - 1))
    else:
      latents = deliberator.latents(params, decoder_params, placement,
                                    ARMS[arm](outputs, traces.valid))
      hidden = deliberator.second_pass(decoder_params, latents, traces, placement, cache)
      if traces.delay is not None:  # the first token is predicted before latents come
        alone = take_from_trunk(trunk, traces.anchors)
        hidden = hidden.at[:, :, 0].set(
            jnp.where((traces.delay == 0)[..., None], hidden[:, :, 0], alone))
      states[arm] = hidden
  return states


def score_texts(scorer: Scorer, params: Params, decoder_params: Params,
                batches: Iterable[Batch]) -> dict[str, AheadNLL]:
  """Sums by text and ahead position over all batches, for each arm of the scorer."""
  totals: dict[str, list[np.ndarray]] = {}
  counts = []
  for index, batch in enumerate(batches):
    sums, count = jax.device_get(scorer(params, decoder_params, batch, index))
    for arm, total in sums.items():
      totals.setdefault(arm, []).append(total.astype(np.float64))
    counts.append(count)
  count = np.concatenate(counts)
  return {arm: AheadNLL(np.concatenate(total), count) for arm, total in totals.items()}
