"""The paper's forward pass as its figure draws it: one sequence, one dense mask. Slow and plain.

It follows the definition, one text at a time, and shares nothing with the library but the names of
weights. The trunk and all traces form ONE sequence of T + M (Z + A - 1) tokens. `sees` decides for
any two of them whether one may attend to the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.model.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a token in the long sequence.

  Attributes:
    trace: number of its trace; None for a token of the trunk.
    order: index in the trunk, or in its trace.
    segment: number of its document; 0 for padding.
    position: position id, for the rotary embedding and the sliding window.
    trunk_seen: largest number of trunk tokens that it may see.
    first_seen: order of the first token of its own trace that it may see.
  """
  trace: int | None
  order: int
  segment: int
  position: int
  trunk_seen: int
  first_seen: int = 0


def sees(query: Place, key: Place, window: float) -> bool:
  """Whether `query` attends to `key` in a layer that reaches `window` positions."""
  if query.segment == 0 or query.segment != key.segment:
    return False
  if query.position - key.position >= window:
    return False
  if key.trace is None:
    return key.order < query.trunk_seen
  return key.trace == query.trace and query.first_seen <= key.order <= query.order


def masks(queries: list[Place], keys: list[Place], config: TransformerConfig) -> list[np.ndarray]:
  """The dense mask [queries, keys] of every layer."""
  windows = [config.window if kind == 'local' else np.inf for kind in config.layer_kinds]
  return [np.array([[sees(q, k, window) for k in keys] for q in queries]) for window in windows]


def text_forward(config: TransformerConfig, choices: DeliberationConfig, params: Params,
                 decoder_params: Params, tokens: np.ndarray, segments: np.ndarray,
                 positions: np.ndarray, anchors: np.ndarray, delays: np.ndarray,
                 num_ahead: int) -> Array:
  """Hidden states [M, A, D] that predict the ahead tokens of one packed text [T]."""
  latents, length = choices.num_latents, len(tokens)
  trunk = [Place(None, i, segments[i], positions[i], i + 1) for i in range(length)]
  soft_places, fed_places, base_tokens, ahead_tokens = [], [], [], []
  for trace, (anchor, delay) in enumerate(zip(anchors, delays, strict=True)):
    position, shown, ahead_from = positions[anchor], anchor + 1, positions[anchor] + 1
    if choices.latents == 'refining':
      latent_positions = [position - latents + 1 + i for i in range(latents)]
      base = [anchor - latents + 1 + i for i in range(latents)]
      shown = anchor + 1 - latents
    else:
      base = [anchor] * latents
      if choices.positions == 'share':
        latent_positions = [position] * latents
      else:
        latent_positions = [position + 1 + i for i in range(latents)]
        ahead_from += latents
    fed_positions = latent_positions + [ahead_from + i for i in range(num_ahead - 1)]
    segment = segments[anchor]
    soft_places += [Place(trace, i, segment, p, anchor + 1)
                    for i, p in enumerate(latent_positions)]
    places = [Place(trace, i, segment, p, shown) for i, p in enumerate(fed_positions)]
    for i in range(min(delay, num_ahead - 1)):  # read before there were latents
      places[latents + i] = Place(trace, latents + i, segment, position + 1 + i, anchor + 1,
                                  latents)
    fed_places += places
    base_tokens.append(tokens[base])
    ahead_tokens.append(tokens[np.minimum(anchor + 1 + np.arange(num_ahead - 1), length - 1)])

  table = decoder_params['embedder']['table'] * np.sqrt(config.embed_dim)
  base = table[np.stack(base_tokens)]  # [M, Z, D]

  # First pass: the trunk alone, for the keys and values that the coprocessor reads.
  _, cached = transformer(config, decoder_params['transformer'], table[tokens], positions,
                          masks(trunk, trunk, config))

  # The coprocessor: the soft tokens of all traces after the cached trunk.
  soft = jnp.broadcast_to(params['soft_tokens'], base.shape)
  if choices.trainable == 'constant':
    outputs = soft
  else:
    if choices.soft_tokens == 'additive':
      soft = soft + base
    factor = 1 if choices.lora_alpha is None else choices.lora_alpha / choices.lora_rank
    weights = params['transformer'] if choices.trainable == 'full' else merged(
        decoder_params['transformer'], params['lora'], factor)
    outputs, _ = transformer(
        config, weights, soft.reshape(-1, config.embed_dim),
        np.array([place.position for place in soft_places]),
        masks(soft_places, trunk + soft_places, config), cached)
    outputs = outputs.reshape(base.shape)
  if choices.latents == 'paper':
    z = outputs
  elif choices.gate == 'channel':
    z = base + params['gate'] * outputs
  else:
    z = base + jnp.einsum('MZD,DE->MZE', outputs, params['gate'])

  # Second pass: the trunk again, then the latents and ahead tokens of every trace.
  fed = jnp.concatenate([z, table[np.stack(ahead_tokens)]], axis=1)
  places = trunk + fed_places
  hidden, _ = transformer(
      config, decoder_params['transformer'],
      jnp.concatenate([table[tokens], fed.reshape(-1, config.embed_dim)]),
      np.array([place.position for place in places]), masks(places, places, config))
  return hidden[length:].reshape(fed.shape)[:, latents - 1:]


def forward(config: TransformerConfig, choices: DeliberationConfig, params: Params,
            decoder_params: Params, batch: Batch, anchors: np.ndarray, num_ahead: int,
            delays: np.ndarray | None = None) -> Array:
  """Hidden states [B, M, A, D]; `batch`, `anchors` and `delays` [B, M] are concrete."""
  delays = np.zeros_like(anchors) if delays is None else delays
  rows = zip(*map(np.asarray, (batch.tokens, batch.segments, batch.positions, anchors, delays)),
             strict=True)
  return jnp.stack([text_forward(config, choices, params, decoder_params, *row, num_ahead)
                    for row in rows])


def transformer(config: TransformerConfig, weights: Params, x: Array, positions: np.ndarray,
                layer_masks: list[np.ndarray], cached: list[tuple[Array, Array]] | None = None,
                ) -> tuple[Array, list[tuple[Array, Array]]]:
  """Gemma 2 over one sequence x [Q, D]; keys of `cached` come before its own."""
  half = config.head_dim // 2
  angle = positions[:, None, None] * config.rope_base ** (-np.arange(half) / half)
  turn = np.exp(1j * angle).astype(np.complex64)
  return layers(config, weights, x, turn, layer_masks, cached)


@functools.partial(jax.jit, static_argnums=0)
def layers(config: TransformerConfig, weights: Params, x: Array, turn: Array,
           layer_masks: list[Array], cached: list[tuple[Array, Array]] | None,
           ) -> tuple[Array, list[tuple[Array, Array]]]:
  """The same, with the factors [Q, 1, H / 2] that rotate queries and keys."""
  kept = []
  for layer, mask in enumerate(layer_masks):
    w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], weights['blocks'])
    norm = lambda name, x, w=w: rms_norm(x, w[name]['scale'], config.norm_epsilon)  # noqa: E731
    read = norm('attention_in', x)
    project = {name: jnp.einsum('QD,DNH->QNH', read, w['attention'][name]['w'])
               for name in ('query', 'key', 'value')}
    keys, values = rotate(project['key'], turn), project['value']
    kept.append((keys, values))
    if cached is not None:
      keys = jnp.concatenate([cached[layer][0], keys])
      values = jnp.concatenate([cached[layer][1], values])
    queries = rotate(project['query'], turn) * config.query_scale
    mixed = attention(queries, keys, values, mask, config.attention_softcap)
    x = x + norm('attention_out', jnp.einsum('QNH,NHD->QD', mixed, w['attention']['out']['w']))
    read = norm('feed_forward_in', x)
    gate, up = (read @ w['feed_forward'][name]['w'] for name in ('gate', 'up'))
    gelu = 0.5 * gate * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate ** 3)))
    x = x + norm('feed_forward_out', (gelu * up) @ w['feed_forward']['down']['w'])
  return rms_norm(x, weights['final_norm']['scale'], config.norm_epsilon), kept


def attention(queries: Array, keys: Array, values: Array, mask: Array, cap: float) -> Array:
  """One softmax over every key of the sequence; each key head is repeated for its query heads."""
  keys, values = (jnp.repeat(x, queries.shape[1] // x.shape[1], axis=1) for x in (keys, values))
  scores = cap * jnp.tanh(jnp.einsum('QNH,KNH->NQK', queries, keys) / cap)
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1) * mask
  return jnp.einsum('NQK,KNH->QNH', weights, values)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
  return x / jnp.sqrt(jnp.mean(x ** 2, axis=-1, keepdims=True) + epsilon) * (1 + scale)


def rotate(x: Array, turn: Array) -> Array:
  """x [Q, N, H] with (x_i, x_{i + H/2}) taken as complex numbers and rotated."""
  half = x.shape[-1] // 2
  rotated = (x[..., :half] + 1j * x[..., half:]) * turn
  return jnp.concatenate([rotated.real, rotated.imag], axis=-1)


def merged(weights: Params, lora: Params, factor: float) -> Params:
  """Weights W + factor x A B: what low-rank adapters amount to."""
  if 'w' in weights:
    return {'w': weights['w'] + factor * jax.vmap(
        lambda a, b: jnp.tensordot(a, b, axes=1))(lora['a'], lora['b'])}
  return {name: merged(branch, lora[name], factor) if name in lora else branch
          for name, branch in weights.items()}
