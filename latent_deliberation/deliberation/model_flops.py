"""Floating-point operations of the architecture: two for each multiplication of a matrix product.

Norms, activations and the softmax are left out, as is usual; so is whatever an implementation
computes and throws away.
"""

from latent_deliberation.model.transformer_config import TransformerConfig


def parameter_flops(config: TransformerConfig) -> int:
  """Of the projections of all layers, for one token."""
  c = config
  attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  return 2 * c.num_layers * (attention + 3 * c.embed_dim * c.hidden_dim)


def adapters_flops(config: TransformerConfig, rank: int) -> int:
  """Of low-rank adapters beside the projections of all layers, for one token."""
  c = config
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  widths = 2 * (c.embed_dim + heads) + 2 * (c.embed_dim + kv_heads) + 3 * (
      c.embed_dim + c.hidden_dim)
  return 2 * c.num_layers * rank * widths


def keys_values_flops(config: TransformerConfig) -> int:
  """Of the projections of all layers to keys and values, for one token."""
  return 4 * config.num_layers * config.embed_dim * config.num_kv_heads * config.head_dim


def attention_flops(config: TransformerConfig, queries: int, first: float) -> float:
  """Of scores and their mixtures, for consecutive queries of one text.

  Args:
    first: keys that the first query sees, itself included; each further one sees one more, and
      local layers no more than their window.
  """
  per_key = 4 * config.num_heads * config.head_dim
  last = first + queries - 1
  keys = {'global': queries * (first + last) / 2,
          'local': _windowed(first, last, config.window)}
  return per_key * sum(keys[kind] for kind in config.layer_kinds)


def _windowed(first: float, last: float, window: int) -> float:
  """Sum of min(keys, window) over keys = first, first + 1, ..., last."""
  below = max(0.0, min(last, window) - first + 1)  # queries that do not fill the window
  beyond = last - first + 1 - below
  return below * (first + first + below - 1) / 2 + beyond * window


def forward_flops(config: TransformerConfig, queries: int, first: float = 1) -> float:
  """Of a forward pass over consecutive tokens of one text, without the output head."""
  return queries * parameter_flops(config) + attention_flops(config, queries, first)


def head_flops(config: TransformerConfig) -> int:
  """Of the logits of one token."""
  return 2 * config.embed_dim * config.vocab_size
