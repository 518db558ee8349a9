"""The layers besides attention: norms, projections, feed-forward and embeddings.

The weight W of a projection can be adapted and compressed. `LowRank` adds an adapter A B, and
`merge` folds it into W. `quantise` stores W as int8 (`Quantised`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Float, Int, Params, Rows, RowTokens, typed
from latent_deliberation.errors import UserError


@struct.dataclass
class Quantised:
  """The matrix values * scale. It replaces the matrix in a tree of parameters.

  Attributes:
    values: int8, in the shape of the matrix.
    scale: float32, in that shape without the axes that a product contracts.
    contracted: those axes, counted from the last one, which makes them the same in a stack of
      layers and in one of its layers.
  """
  values: Int[Array, '...']
  scale: Float[Array, '...']
  contracted: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """Number of entries of the matrix."""
    return self.values.size

  def astype(self, dtype: DTypeLike) -> Array:
    """Returns the matrix itself, rounded once."""
    scale = jnp.expand_dims(self.scale, self.contracted)
    return (self.values.astype(jnp.float32) * scale).astype(dtype)


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


def matmul(x: Array, y: Array, transposed: bool = False) -> Array:
  """Returns x @ y in float32, for matrices or for stacks of as many matrices.

  Where one of the two is bfloat16, the other is rounded to it. XLA on a CPU multiplies bfloat16
  fast only into float32, so the backward pass rounds the float32 cotangent as well. It must not see
  a transposed factor either, or it converts both to float32; so axes are named instead.

  Args:
    transposed: whether y holds its columns as rows.
  """
  if jnp.bfloat16 not in (x.dtype, y.dtype):
    return _contract(x, y, -1, -1 if transposed else -2)
  return _matmul_bfloat16((x.dtype.name, y.dtype.name, transposed), x, y)


def _contract(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
  """Sums products over one of the last two axes of each; the axes before are those of a stack."""
  stack = tuple(range(x.ndim - 2))
  axes = ((x.ndim + x_axis,), (y.ndim + y_axis,))
  return jax.lax.dot_general(x, y, (axes, (stack, stack)), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_bfloat16(kind: tuple[str, str, bool], x: Array, y: Array) -> Array:
  return _matmul_forward(kind, x, y)[0]


def _matmul_forward(kind: tuple[str, str, bool], x: Array,
                    y: Array) -> tuple[Array, tuple[Array, Array]]:
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return _contract(x, y, -1, -1 if kind[2] else -2), (x, y)


def _matmul_backward(kind: tuple[str, str, bool], factors: tuple[Array, Array],
                     cotangent: Array) -> tuple[Array, Array]:
  x_dtype, y_dtype, transposed = kind
  (x, y), cotangent = factors, cotangent.astype(jnp.bfloat16)
  of_x = _contract(cotangent, y, -1, -2 if transposed else -1)
  of_y = _contract(cotangent, x, -2, -2) if transposed else _contract(x, cotangent, -2, -2)
  return of_x.astype(x_dtype), of_y.astype(y_dtype)


_matmul_bfloat16.defvjp(_matmul_forward, _matmul_backward)

FEW_ROWS = 64  # up to which the time of a product is that of reading the weight


def contract(x: Array, weight: Array, inputs: int = 1,
             preferred_element_type: str | None = None) -> Array:
  """Contracts the last `inputs` axes of x with those of a weight, whose other axes come first.

  XLA on a CPU reads the left operand of a matrix product up to twice as fast as the right one. With
  few rows, the weight is therefore the left operand. With many, transposing the result costs more.
  """
  ours = tuple(range(x.ndim - inputs, x.ndim))
  theirs = tuple(range(weight.ndim - inputs, weight.ndim))
  if math.prod(x.shape[:-inputs]) > FEW_ROWS:
    return jnp.tensordot(x, weight, (ours, theirs), preferred_element_type=preferred_element_type)
  y = jnp.tensordot(weight, x, (theirs, ours), preferred_element_type=preferred_element_type)
  outputs = weight.ndim - inputs
  return jnp.moveaxis(y, range(outputs), range(-outputs, 0))


def multiply(x: Array, weight: Array, inputs: int = 1, flatten_batch: bool = True) -> Array:
  """Contracts the last `inputs` axes of x with the first ones of a weight, in the weight's dtype.

  The result has the dtype of x.

  Args:
    flatten_batch: whether the other axes of x become the rows of one matrix. On a CPU this is
      faster: with more axes, XLA transposes x and the cotangent for the gradient of a weight, and
      computes again, element by element, what they were made from. On a TPU it is slower: XLA
      fuses less and transposes more.
  """
  if not flatten_batch:
    return jnp.tensordot(x, weight, axes=inputs)
  width = math.prod(weight.shape[:inputs])
  product = jnp.matmul if x.dtype == weight.dtype else matmul
  y = product(x.reshape(-1, width), weight.reshape(width, -1)).astype(x.dtype)
  return y.reshape(*x.shape[:-inputs], *weight.shape[inputs:])


def multiply_quantised(x: Array, weight: Quantised, inputs: int, axes: Sequence[str],
                       dtype: DTypeLike) -> Array:
  """Contracts the last `inputs` axes of x with the first ones of an int8 weight.

  Args:
    axes: logical names of the weight's axes.
    dtype: dtype that the weight is converted to. The result has the dtype of x.
  """
  # Shards along 'embed' are gathered first, as int8. XLA would convert them to floats before.
  whole = tuple('activation' if axis == 'embed' else axis for axis in axes)

  # The backward pass converts the int8 again; otherwise it would keep all layers as floats. A scan
  # keeps the two conversions apart. The guard of prevent_cse would take half as long again on TPUs.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def product(x: Array, weight: Quantised) -> Array:
    weight = weight.replace(values=nn.with_logical_constraint(weight.values, whole))
    return multiply(x, weight.astype(dtype), inputs, flatten_batch=x.dtype != dtype)

  return product(x, weight)


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
    # The product with W, in the form in which the weight is stored.
    if self.has_variable('params', 'transposed'):
      transposed = self.get_variable('params', 'transposed')
      y = contract(x.astype(dtype), transposed.astype(dtype), inputs, x.dtype.name).astype(x.dtype)
    else:
      weight = self.param('w', nn.with_logical_partitioning(init, axes), shape)
      if isinstance(weight, Quantised):
        y = multiply_quantised(x, weight, inputs, axes, dtype)
      else:
        y = multiply(x, weight.astype(dtype), inputs, self.flatten_batch)
    if self.bias:
      bias = self.param('b', nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:]),
                        shape[inputs:])
      y = y + bias.astype(x.dtype)
    if self.lora is None:
      return y
    # The adapter: down to the rank and up again. B is zero at first, so nothing changes yet.
    rank = self.lora.rank
    down = self.variable('lora', 'a', lambda: nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', in_axis=contracted, out_axis=-1),
        axes[:inputs] + ('rank',))(self.make_rng('params'), shape[:inputs] + (rank,)))
    up = self.variable('lora', 'b', lambda: nn.with_logical_partitioning(
        nn.initializers.zeros, ('rank',) + axes[inputs:])(
            self.make_rng('params'), (rank,) + shape[inputs:]))
    low = multiply(x, down.value.astype(dtype), inputs, self.flatten_batch)
    low = multiply(low, up.value.astype(dtype), flatten_batch=self.flatten_batch)
    return y + low * self.lora.scale


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
    rows = jax.tree.map(lambda leaf: leaf[tokens], self.table).astype(dtype)
    if not self.scaled:
      return rows
    # Gemma rounds the factor to the dtype of the computation.
    return rows * jnp.asarray(self.embed_dim ** 0.5, dtype)


def output_head(decoder_params: Params) -> Array | Quantised:
  """Returns the [V, D] output head of a decoder: its own table, or that of the embeddings."""
  embedder = decoder_params['embedder']
  return embedder.get('head', embedder['table'])


def merge(params: Params, adapters: Params, low_rank: LowRank) -> Params:
  """Returns the parameters of a transformer with W + (alpha / rank) A B in the place of every W.

  The merged weights compute the same function as weights with adapters (see LowRank). The result is
  differentiable by the adapters.

  Args:
    params: parameters of a Transformer, without boxes.
    adapters: its collection 'lora'; A is [L, inputs.., rank], B is [L, rank, outputs..].
    low_rank: rank and alpha of the adapters.
  """
  # At a projection, multiply A and B layer by layer. Elsewhere go down the tree.
  if set(adapters) == {'a', 'b'}:
    update = jax.vmap(lambda down, up: jnp.tensordot(down, up, axes=1))(
        adapters['a'], adapters['b']) * low_rank.scale
    return {**params, 'w': params['w'] + update.astype(params['w'].dtype)}
  return {**params, **{name: merge(params[name], child, low_rank)
                       for name, child in adapters.items()}}


LARGEST = 127  # of an int8


def input_axes(name: str) -> int:
  """Returns the number of leading axes that a projection of a block contracts, by its name."""
  return 2 if name == 'out' else 1  # N and H are contracted together


def quantise(params: Params) -> Params:
  """Returns a decoder's parameters with Quantised matrices and tables.

  Norms and biases stay as they are.

  A scale is the largest absolute value of its channel, over 127. The error of an entry is half a
  scale at most.

  Args:
    params: parameters of a decoder, boxed with logical axes or not.
  """
  return _quantise_tree(params, inputs=1)


def _quantise_tree(params: Params, inputs: int) -> Params:
  quantised = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      quantised[name] = _quantise_tree(child, input_axes(name))
    elif name in ('table', 'head'):
      quantised[name] = _quantise_matrix(child, (-1,))
    elif name == 'w':
      # Count from the last axis, because a stack of layers has one axis more.
      first = 1 - nn.unbox(child).ndim  # after the axis of layers
      quantised[name] = _quantise_matrix(child, tuple(range(first, first + inputs)))
    else:
      quantised[name] = child
  return quantised


def _quantise_matrix(matrix: Array | nn.Partitioned, contracted: tuple[int, ...]) -> Quantised:
  # Both parts keep their logical axes. The scale lacks those that are contracted.
  if isinstance(matrix, nn.Partitioned):
    bare, axes = _quantise_matrix(matrix.value, contracted), len(matrix.names)
    names = tuple(name for axis, name in enumerate(matrix.names) if axis - axes not in contracted)
    return bare.replace(values=matrix.replace(value=bare.values),
                        scale=matrix.replace(value=bare.scale, names=names))
  # One scale for each channel. A channel of zeros gets 1, to avoid 0 / 0.
  wide = matrix.astype(jnp.float32)
  largest = jnp.max(jnp.abs(wide), axis=contracted)
  scale = jnp.where(largest > 0, largest / LARGEST, 1)
  values = jnp.round(wide / jnp.expand_dims(scale, contracted)).astype(jnp.int8)
  return Quantised(values, scale, contracted)
