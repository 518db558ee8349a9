"""The layers besides attention: norms, projections, feed-forward and embeddings.

The weight W of a projection can have an adapter A B: one of the module's own by `LowRank`, or one
that `adapt` puts into the tree of parameters.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latent_deliberation.array_types import Array, Float, Params, Rows, RowTokens, typed
from latent_deliberation.errors import UserError
from latent_deliberation.model.products import (
  LARGEST_INPUTS,
  Quantised,
  contract,
  multiply,
  multiply_quantised,
  on_bits,
)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """LoRA (arXiv 2106.09685): y = x W + (alpha / rank) x A B, with B zero at the start.

  A and B live in the variable collection 'lora', apart from the frozen W in 'params'. Without an
  alpha the factor is 1.
  """
  rank: int
  alpha: float | None = None

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f'lora rank = {self.rank}: set at least 1')

  @property
  def scale(self) -> float:
    """The factor on the product of A and B."""
    return 1.0 if self.alpha is None else self.alpha / self.rank


@struct.dataclass
class Adapted:
  """A matrix W with an adapter. It replaces W in a tree of parameters; see `adapt`.

  W and the adapter are not summed. In bfloat16 a sum would lose each entry of scale A B that is
  less than half a step of W's entry.

  Attributes:
    weight: W.
    down: A, [inputs.., rank].
    up: B, [rank, outputs..].
    scale: factor on the product of A and B.
  """
  weight: Array | Quantised
  down: Array
  up: Array
  scale: float = struct.field(pytree_node=False)


class RMSNorm(nn.Module):
  """x / rms(x) * (1 + scale), computed in float32, as in Gemma; times scale without `offset`."""
  epsilon: float
  offset: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, '... C']) -> Float[Array, '... C']:
    init = nn.initializers.zeros if self.offset else nn.initializers.ones
    scale = self.param('scale', nn.with_logical_partitioning(init, ('norm',)), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide ** 2, axis=-1, keepdims=True) + self.epsilon)
    return (normed * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


class Projection(nn.Module):
  """A linear map from the last `inputs` axes of x to the axes `shape[inputs:]`.

  Its weight 'w' has the input axes first, as in checkpoints. Inference may give 'transposed'
  instead, with the output axes first, which a CPU reads faster; see `contract`.

  Attributes:
    shape: sizes of the weight, input axes first.
    axes: logical names of the same axes.
    inputs: number of leading axes of the weight that are contracted.
    lora: low-rank adapter that is added to the weight; None for no adapter.
    flatten_batch: see `multiply`.
    bias: whether a bias 'b' is added to the product.
    dtype: dtype of the products, if it is not that of x; see `Transformer`.
  """
  shape: Sequence[int]
  axes: Sequence[str]
  inputs: int = 1
  lora: LowRank | None = None
  flatten_batch: bool = True
  bias: bool = False
  dtype: str | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape, axes, inputs = tuple(self.shape), tuple(self.axes), self.inputs
    dtype = self.dtype or x.dtype
    contracted = tuple(range(inputs))
    # The spread of a new weight depends on its inputs alone.
    init = nn.initializers.variance_scaling(
        1.0, 'fan_in', 'truncated_normal', in_axis=contracted,
        out_axis=tuple(range(inputs, len(shape))))
    if self.is_mutable_collection(LARGEST_INPUTS) and not self.is_initializing():
      self.sow(LARGEST_INPUTS, 'x', jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - inputs))))
    adapter = None
    # The product with W, in the form in which the weight is stored.
    if self.has_variable('params', 'transposed'):
      transposed = self.get_variable('params', 'transposed')
      y = contract(x.astype(dtype), transposed.astype(dtype), inputs).astype(x.dtype)
    else:
      weight = self.param('w', nn.with_logical_partitioning(init, axes), shape)
      if isinstance(weight, Adapted):
        adapter, weight = (weight.down, weight.up, weight.scale), weight.weight
      if isinstance(weight, Quantised):
        y = multiply_quantised(x, weight, inputs, axes, dtype)
      else:
        y = multiply(x, weight.astype(dtype), inputs, self.flatten_batch)
    if self.bias:
      bias = self.param('b', nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:]),
                        shape[inputs:])
      y = y + bias.astype(x.dtype)
    if self.lora is not None:
      # B is zero at first, so nothing changes yet.
      rank = self.lora.rank
      down = self.variable('lora', 'a', lambda: nn.with_logical_partitioning(
          nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', in_axis=contracted,
                                           out_axis=-1),
          axes[:inputs] + ('rank',))(self.make_rng('params'), shape[:inputs] + (rank,)))
      up = self.variable('lora', 'b', lambda: nn.with_logical_partitioning(
          nn.initializers.zeros, ('rank',) + axes[inputs:])(
              self.make_rng('params'), (rank,) + shape[inputs:]))
      adapter = down.value, up.value, self.lora.scale
    if adapter is None:
      return y
    # The adapter: down to the rank and up again.
    down_weight, up_weight, scale = adapter
    low = multiply(x, down_weight.astype(dtype), inputs, self.flatten_batch)
    low = multiply(low, up_weight.astype(dtype), flatten_batch=self.flatten_batch)
    return y + low * scale


class FeedForward(nn.Module):
  """Gated feed-forward: (act(x W_gate) * x W_up) W_down, where act is gelu (tanh form) or silu."""
  hidden_dim: int
  lora: LowRank | None = None
  flatten_batch: bool = True
  activation: str = 'gelu'
  dtype: str | None = None

  @nn.compact
  @typed
  def __call__(self, x: Rows) -> Rows:
    width = x.shape[-1]
    into = dict(shape=(width, self.hidden_dim), axes=('embed', 'mlp'), lora=self.lora,
                flatten_batch=self.flatten_batch, dtype=self.dtype)
    gate = Projection(**into, name='gate')(x)
    up = Projection(**into, name='up')(x)
    activated = nn.gelu(gate, approximate=True) if self.activation == 'gelu' else nn.silu(gate)
    hidden = activated * up
    hidden = nn.with_logical_constraint(hidden, ('batch', 'trace', 'length', 'mlp'))
    return Projection((self.hidden_dim, width), ('mlp', 'embed'), lora=self.lora,
                      flatten_batch=self.flatten_batch, dtype=self.dtype, name='down')(hidden)


class Embedder(nn.Module):
  """The [V, D] table of the input embeddings, and that of the output head.

  Attributes:
    vocab_size: V.
    embed_dim: D.
    scaled: whether embeddings are multiplied by sqrt(D).
    tied: whether the table is also the output head; otherwise the head has a table of its own.
  """
  vocab_size: int
  embed_dim: int
  scaled: bool = True
  tied: bool = True

  def setup(self):
    init = nn.with_logical_partitioning(
        nn.initializers.normal(self.embed_dim ** -0.5), ('vocab', 'embed'))
    shape = (self.vocab_size, self.embed_dim)
    self.table = self.param('table', init, shape)
    if not self.tied:
      self.head = self.param('head', init, shape)

  @property
  def output_head(self) -> Array:
    """The [V, D] table that logits are products with."""
    return self.table if self.tied else self.head

  @typed
  def encode(self, tokens: RowTokens, dtype: str) -> Rows:
    """Returns the input embeddings of tokens in `dtype`."""
    rows = jax.tree.map(
        lambda leaf: on_bits(lambda table: table[tokens], leaf), self.table).astype(dtype)
    if not self.scaled:
      return rows
    # Gemma rounds the factor to the dtype of the computation.
    return rows * jnp.asarray(self.embed_dim ** 0.5, dtype)


def output_head(decoder_params: Params) -> Array | Quantised:
  """Returns the [V, D] output head of a decoder: its own table, or that of the embeddings."""
  embedder = decoder_params['embedder']
  return embedder.get('head', embedder['table'])


def adapt(params: Params, adapters: Params, low_rank: LowRank) -> Params:
  """Returns the parameters of a transformer with an Adapted matrix in the place of every W.

  They compute what `Transformer(lora=low_rank)` computes with both collections, to the bit.

  Args:
    params: parameters of a Transformer, without boxes.
    adapters: its collection 'lora'; A is [L, inputs.., rank], B is [L, rank, outputs..].
    low_rank: rank and alpha of the adapters.
  """
  # At a projection, put the adapter beside W. Elsewhere go down the tree.
  if set(adapters) == {'a', 'b'}:
    return {**params,
            'w': Adapted(params['w'], adapters['a'], adapters['b'], low_rank.scale)}
  return {**params, **{name: adapt(params[name], child, low_rank)
                       for name, child in adapters.items()}}
