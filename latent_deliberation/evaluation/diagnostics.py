"""Diagnostics of the latents in training: size, gate, and the number of directions in use.

They show whether the latents are alive: other than the embeddings that they start from, and not
all alike.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from latent_deliberation.array_types import Array, Batch, Bool, Float, Params, typed
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import place, sample_traces

Diagnose = Callable[[Params, Params, Batch], Mapping[str, float]]


def make_diagnosis(deliberator: Deliberator, mesh: Mesh,
                   rules: Mapping[str, Sequence[str]]) -> Diagnose:
  """Compiles diagnose(params, decoder_params, batch) -> figures, on the same traces at every call.

  The figures:
    'norm': root mean square of the latents, divided by that of input embeddings.
    'moved': the same for latents minus the embeddings that they start from.
    'gate': root mean square of the gate; absent for 'paper' latents.
    'effective_rank': see `effective_rank`, of the coprocessor's outputs.
  """

  @jax.jit
  def figures(params: Params, decoder_params: Params, batch: Batch) -> dict[str, Array]:
    with nn.logical_axis_rules(tuple(rules.items())):
      traces = sample_traces(jax.random.split(jax.random.key(0), len(batch.tokens)), batch,
                             deliberator.config)
      trunk, cache = deliberator.prefill(decoder_params, batch)
      placement = place(batch, traces.anchors, deliberator.config, deliberator.config.num_ahead)
      outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
      latents = deliberator.latents(params, decoder_params, placement, outputs)
      # With outputs of zero, latents are the embeddings that they start from.
      base = deliberator.latents(params, decoder_params, placement, jnp.zeros_like(outputs))
    # Compare with embeddings as the decoder reads them: Gemma's are scaled by sqrt(D).
    config = deliberator.decoder.config
    embedding = _size(decoder_params['embedder']['table'])
    if config.scale_embeddings:
      embedding = embedding * config.embed_dim ** 0.5
    # Invalid traces have arbitrary anchors and do not count.
    valid = jnp.broadcast_to(traces.valid[..., None], outputs.shape[:-1])
    found = {'norm': _size(latents, valid) / embedding,
             'moved': _size(latents - base, valid) / embedding,
             'effective_rank': effective_rank(outputs.reshape(-1, outputs.shape[-1]),
                                              valid.reshape(-1))}
    return found | ({'gate': _size(params['gate'])} if 'gate' in params else {})

  def diagnose(params: Params, decoder_params: Params, batch: Batch) -> Mapping[str, float]:
    with jax.set_mesh(mesh):
      return {name: float(value)
              for name, value in figures(params, decoder_params, batch).items()}

  return diagnose


def _size(x: Array, valid: Array | None = None) -> Array:
  """Returns the root mean square in float32, over valid vectors (along the last axis) or all."""
  squares = jnp.square(x.astype(jnp.float32))
  if valid is None:
    return jnp.sqrt(jnp.mean(squares))
  squares = jnp.where(valid[..., None], squares, 0)
  return jnp.sqrt(jnp.sum(squares) / (jnp.maximum(1, jnp.sum(valid)) * x.shape[-1]))


@typed
def effective_rank(rows: Float[Array, 'R D'], valid: Bool[Array, 'R']) -> Float[Array, '']:
  """Returns exp(entropy of the spectrum of the rows' covariance), between 1 and D.

  Equal rows have rank 1, and so do rows on a line. Rows that are not valid are left out. See Roy
  and Vetterli (2007).
  """
  rows, where = rows.astype(jnp.float32), valid[:, None]
  centred = jnp.where(where, rows - jnp.mean(rows, axis=0, where=where), 0)
  # Eigenvalues are variances. Rounding may make a small one negative.
  variance = jnp.maximum(jnp.linalg.eigvalsh(centred.T @ centred), 0)
  share = variance / jnp.maximum(jnp.sum(variance), jnp.finfo(jnp.float32).tiny)
  return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0)))
