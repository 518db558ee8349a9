"""What deliberation costs: floating-point operations of an answer, and of a training step."""

from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
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


def answer_flops(model: TransformerConfig, prompt: float, answer: float) -> float:
  """Of reading a prompt and writing an answer of that many tokens, without latents."""
  return forward_flops(model, prompt + answer - 1) + answer * head_flops(model)


def latents_flops(model: TransformerConfig, config: DeliberationConfig, prompt: float) -> float:
  """Of one augmentation behind that many tokens: the coprocessor's pass, and the decoder's."""
  first = prompt - config.num_latents if config.latents == 'refining' else prompt
  second = forward_flops(model, config.num_latents, first + 1)
  if config.trainable == 'constant':
    return second
  layers = Coprocessor(model, config).layers
  thinking = forward_flops(layers, config.num_latents, prompt + 1)
  if config.trainable == 'lora':
    thinking += config.num_latents * adapters_flops(layers, config.lora_rank)
  if config.reads == 'states':
    thinking += prompt * keys_values_flops(layers)
  return thinking + second


def text_flops(model: TransformerConfig, length: int, rank: int = 0) -> float:
  """Of a training step on one text by next-token loss: a forward and twice that backward.

  Args:
    rank: of adapters that learn in the place of the weights, through which gradients then flow to
      activations alone; 0 where the weights learn.
  """
  forward = forward_flops(model, length) + length * head_flops(model)
  return 2 * forward + 3 * length * adapters_flops(model, rank) if rank else 3 * forward


def traces_flops(model: TransformerConfig, config: DeliberationConfig, length: int,
                 tuned: bool = False) -> float:
  """Of a training step on one text with its traces, whose anchors lie in its middle on average.

  The trunk is read forward only. Through the coprocessor, gradients flow to activations and to
  weights, which is twice the forward pass; through frozen weights, the decoder's and those below
  adapters, to activations alone.

  Args:
    tuned: the decoder learns as well, so that both of its passes have a whole backward pass.
  """
  reads = config.num_latents + config.num_ahead - 1
  trunk = forward_flops(model, length)
  second = forward_flops(model, reads, length / 2) + config.num_ahead * head_flops(model)
  thinking = 0.0
  if config.trainable != 'constant':
    layers = Coprocessor(model, config).layers
    thinking = forward_flops(layers, config.num_latents, length / 2)
    if config.trainable == 'lora':
      adapters = config.num_latents * adapters_flops(layers, config.lora_rank)
      thinking = 2 * thinking + 3 * adapters
    else:
      thinking *= 3
    if config.reads == 'states':  # which learn nothing themselves
      trunk += 2 * length * keys_values_flops(layers)
  if tuned:
    return 3 * (trunk + config.num_traces * second)
  return trunk + config.num_traces * (thinking + 2 * second)
