"""Traces at chosen anchors of the batch that tests share, and the forward pass over them."""

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.deliberation.traces import Traces, gather_traces
from tests import tiny

# Documents begin at 0, 7 and 11 in the first text, and at 0 and 9 in the second, with padding from
# 15. So every trace has 3 or 5 tokens of its own document up to its anchor.
ANCHORS = jnp.array([[4, 9, 13, 15], [2, 4, 11, 13]])
WEIGHT = jax.random.normal(jax.random.key(0), (*ANCHORS.shape, tiny.CHOICES.num_ahead, 16))


def traces_at(batch: Batch, anchors: jax.Array = ANCHORS,
              delay: jax.Array | None = None) -> Traces:
  """Traces at all of the anchors, with delayed latents where a delay is given."""
  traces = gather_traces(batch, anchors, jnp.ones_like(anchors, bool), tiny.CHOICES.num_ahead)
  return traces.replace(delay=delay)


def many_traces(deliberator: Deliberator, params: Params, decoder_params: Params,
                batch: Batch) -> tuple[jax.Array, Params]:
  """Hidden states [B, M, A, D] at ANCHORS, and the gradient of their sum weighted by WEIGHT."""
  return tiny.forward_and_gradient(
      deliberator, params, decoder_params, batch, traces_at(batch), WEIGHT)
