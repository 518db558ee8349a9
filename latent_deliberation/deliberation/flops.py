"""Floating-point operations of a decoder's passes, of an answer, and of a training step.

A product of [n, a] and [a, b] counts as 2 n a b operations. Norms and activations do not count.
"""

import functools

from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.model.transformer_config import TransformerConfig


def parameter_flops(config: TransformerConfig) -> int:
  """Returns the operations of one token in the projections of all layers."""
  c = config
  attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  return 2 * c.num_layers * (attention + 3 * c.embed_dim * c.hidden_dim)


def adapters_flops(config: TransformerConfig, rank: int) -> int:
  """Returns the operations of one token in low-rank adapters on the projections of all layers."""
  c = config
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  widths = 2 * (c.embed_dim + heads) + 2 * (c.embed_dim + kv_heads) + 3 * (
      c.embed_dim + c.hidden_dim)
  return 2 * c.num_layers * rank * widths


def keys_values_flops(config: TransformerConfig) -> int:
  """Returns the operations of one token in the key and value projections of all layers."""
  return 4 * config.num_layers * config.embed_dim * config.num_kv_heads * config.head_dim


def attention_flops(config: TransformerConfig, queries: int, first: float) -> float:
  """Returns the operations of scores and mixtures, for consecutive queries of one text.

  Args:
    config: architecture of the transformer.
    queries: number of queries.
    first: number of keys that the first query sees, itself included. Each further query sees one
      more. Local layers see no more than their window.
  """
  per_key = 4 * config.num_heads * config.head_dim
  last = first + queries - 1
  keys = {'global': queries * (first + last) / 2,
          'local': _windowed(first, last, config.window)}
  return per_key * sum(keys[kind] for kind in config.layer_kinds)


def _windowed(first: float, last: float, window: int) -> float:
  """Returns the sum of min(keys, window) over keys = first, first + 1, ..., last."""
  below = max(0.0, min(last, window) - first + 1)  # queries that do not fill the window
  beyond = last - first + 1 - below
  return below * (first + first + below - 1) / 2 + beyond * window


def forward_flops(config: TransformerConfig, queries: int, first: float = 1) -> float:
  """Returns the operations of a pass over consecutive tokens of a text, without output head."""
  return queries * parameter_flops(config) + attention_flops(config, queries, first)


def head_flops(config: TransformerConfig) -> int:
  """Returns the operations of the logits of one token."""
  return 2 * config.embed_dim * config.vocab_size


def answer_flops(decoder_config: TransformerConfig, prompt: float, answer: float) -> float:
  """Returns the operations of an answer, without latents.

  Args:
    decoder_config: architecture of the decoder.
    prompt: number of tokens of the prompt.
    answer: number of tokens of the answer.
  """
  return forward_flops(decoder_config, prompt + answer - 1) + answer * head_flops(decoder_config)


def latents_flops(decoder_config: TransformerConfig, config: DeliberationConfig,
                  prompt: float) -> float:
  """Returns the operations of one augmentation after `prompt` tokens.

  These are one pass of the coprocessor, unless it is constant, and one of the decoder.
  """
  # Refining latents replace trunk tokens, so the decoder sees fewer keys.
  first = prompt - config.num_latents if config.latents == 'refining' else prompt
  second = forward_flops(decoder_config, config.num_latents, first + 1)
  if config.trainable == 'constant':
    return second
  # The coprocessor's pass, with adapters, and with keys and values if it makes its own.
  layers = Coprocessor(decoder_config, config).transformer_config
  coprocessing = forward_flops(layers, config.num_latents, prompt + 1)
  if config.trainable == 'lora':
    coprocessing += config.num_latents * adapters_flops(layers, config.lora_rank)
  if config.reads == 'states':
    coprocessing += prompt * keys_values_flops(layers)
  return coprocessing + second


def text_flops(decoder_config: TransformerConfig, length: int, rank: int = 0) -> float:
  """Returns the operations of a training step on one text by next-token loss.

  The backward pass costs twice the forward pass where weights are trained. Gradients that flow to
  activations alone cost as much as the forward pass.

  Args:
    decoder_config: architecture of the decoder.
    length: number of tokens of the text.
    rank: rank of the adapters that are trained in place of the weights; 0 for the weights.
  """
  forward = forward_flops(decoder_config, length) + length * head_flops(decoder_config)
  return 2 * forward + 3 * length * adapters_flops(decoder_config, rank) if rank else 3 * forward


def traces_flops(decoder_config: TransformerConfig, config: DeliberationConfig, length: int,
                 tuned: bool = False) -> float:
  """Returns the operations of a training step on one text with its traces.

  Anchors are assumed in the middle of the text, where they are on average. The trunk has no
  backward pass. The backward pass through the coprocessor costs twice its forward pass. Gradients
  through frozen weights, which are the decoder's and those below adapters, flow to activations
  alone.

  Args:
    decoder_config: architecture of the decoder.
    config: how latents are made.
    length: number of tokens of the text.
    tuned: whether the decoder is trained too, so both of its passes have a whole backward pass.
  """
  # The decoder: the trunk once, then latents and ahead tokens of each trace.
  reads = config.num_latents + config.num_ahead - 1
  trunk = forward_flops(decoder_config, length)
  second = (forward_flops(decoder_config, reads, length / 2)
            + config.num_ahead * head_flops(decoder_config))
  # The coprocessor: forward and backward for each trace.
  coprocessing = 0.0
  if config.trainable != 'constant':
    layers = Coprocessor(decoder_config, config).transformer_config
    coprocessing = forward_flops(layers, config.num_latents, length / 2)
    if config.trainable == 'lora':
      adapters = config.num_latents * adapters_flops(layers, config.lora_rank)
      coprocessing = 2 * coprocessing + 3 * adapters
    else:
      coprocessing *= 3
    if config.reads == 'states':  # once a text: forward, and gradients of weights
      trunk += 2 * length * keys_values_flops(layers)
  if tuned:
    return 3 * (trunk + config.num_traces * second)
  return trunk + config.num_traces * (coprocessing + 2 * second)


def training_flops(job: str, decoder_config: TransformerConfig, config: DeliberationConfig,
                   length: int) -> float:
  """Returns the operations of a training step on one text, by what is trained.

  Args:
    job: 'pretrain' or 'finetuned' for all weights of a decoder, 'lora' for its adapters, 'joint'
      for weights and latents together, 'train' or 'latents' for latents alone.
    decoder_config: architecture of the decoder.
    config: how latents are made, and the rank of adapters.
    length: number of tokens of the text.

  Raises:
    KeyError: there is no such job.
  """
  weights = functools.partial(text_flops, decoder_config, length)
  latents = functools.partial(traces_flops, decoder_config, config, length)
  return {'pretrain': weights, 'finetuned': weights,
          'lora': functools.partial(weights, config.lora_rank), 'train': latents,
          'latents': latents, 'joint': functools.partial(latents, tuned=True)}[job]()
