"""Products of activations and the weights of a block, in the forms that CPUs and TPUs compute fast.

A weight is a matrix of floats, or `Quantised`: int8 with a scale for each of its channels. A
product converts such a weight to the dtype of the computation, or rounds the activations to int8,
too (W8A8).
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from latent_deliberation.array_types import Array, Float, Int, Params, typed

FEW_ROWS = 64  # up to which the time of a product is that of reading the weight
DTYPES = ('float32', 'bfloat16')  # of the computation
INT8_DTYPES = ('int8', 'w8a8')  # of frozen weights; 'w8a8' rounds activations as well
LARGEST = 127  # of an int8
LARGEST_INPUTS = 'largest_inputs'  # collection of the largest inputs of projections, by channel
INT8_PRODUCT = 'int8_product'  # name of a W8A8 product, by which a remat policy may keep it


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
  # XLA on a CPU multiplies one row three times as slowly as two.
  rows = x.shape[-2]
  padded = x if rows > 1 else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])
  return _contract(padded, y, -1, -1 if kind[2] else -2)[..., :rows, :], (x, y)


def _matmul_backward(kind: tuple[str, str, bool], factors: tuple[Array, Array],
                     cotangent: Array) -> tuple[Array, Array]:
  x_dtype, y_dtype, transposed = kind
  (x, y), cotangent = factors, cotangent.astype(jnp.bfloat16)
  of_x = _contract(cotangent, y, -1, -2 if transposed else -1)
  of_y = _contract(cotangent, x, -2, -2) if transposed else _contract(x, cotangent, -2, -2)
  return of_x.astype(x_dtype), of_y.astype(y_dtype)


_matmul_bfloat16.defvjp(_matmul_forward, _matmul_backward)


def to_bits(array: Array) -> Array:
  """Returns the bits of an array of bfloat16, uint16; other arrays as they are."""
  return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array: Array) -> Array:
  """Undoes `to_bits`."""
  return jax.lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def on_bits(move: Callable[..., Array], *arrays: Array) -> Array:
  """Returns move(*arrays), for a function that puts elements elsewhere and computes nothing.

  XLA on a CPU has no such operations for bfloat16. It converts whole arrays to float32 and back: an
  embedding table for a few of its rows, a cache for one token. Their bits move as they are.

  Where `move` holds a traced array, jit the gradient: the gradient of the jitted function fails.
  """
  if arrays[0].dtype != jnp.bfloat16:
    return move(*arrays)
  return _on_bits(move, *arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_bits(move: Callable[..., Array], *arrays: Array) -> Array:
  return from_bits(move(*map(to_bits, arrays)))


@_on_bits.defjvp
def _on_bits_jvp(move: Callable[..., Array], arrays: Sequence[Array],
                 tangents: Sequence[Array]) -> tuple[Array, Array]:
  return _on_bits(move, *arrays), move(*tangents)  # a move is linear


def contract(x: Array, weight: Array, inputs: int = 1) -> Array:
  """Contracts the last `inputs` axes of x with those of a weight, whose other axes come first.

  The result is float32. XLA on a CPU reads the left operand of a float32 product up to twice as
  fast as the right one. With few rows, the weight is therefore the left operand. With many,
  transposing the result costs more, and in bfloat16 nothing is gained.
  """
  width = math.prod(weight.shape[weight.ndim - inputs:])
  rows, columns = x.reshape(-1, width), weight.reshape(-1, width)
  if len(rows) > FEW_ROWS or jnp.bfloat16 in (x.dtype, weight.dtype):
    y = matmul(rows, columns, transposed=True)
  else:
    y = matmul(columns, rows, transposed=True).T
  return y.reshape(*x.shape[:-inputs], *weight.shape[:weight.ndim - inputs])


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
    return jnp.tensordot(x.astype(weight.dtype), weight, axes=inputs,
                         preferred_element_type=x.dtype)
  width = math.prod(weight.shape[:inputs])
  product = jnp.matmul if x.dtype == weight.dtype else matmul
  y = product(x.reshape(-1, width), weight.reshape(width, -1)).astype(x.dtype)
  return y.reshape(*x.shape[:-inputs], *weight.shape[inputs:])


def input_axes(name: str) -> int:
  """Returns the number of leading axes that a projection of a block contracts, by its name."""
  return 2 if name == 'out' else 1  # N and H are contracted together


# --- int8 weights ---


@struct.dataclass
class Quantised:
  """The matrix values * scale * input_scale. It replaces the matrix in a tree of parameters.

  Attributes:
    values: int8, in the shape of the matrix.
    scale: float32, in that shape without the axes that a product contracts.
    contracted: those axes, counted from the last one, which makes them the same in a stack of
      layers and in one of its layers.
    rounds_inputs: whether a product rounds what it multiplies the matrix with to int8.
    input_scale: float32, for each entry of the axis that a product contracts; None for 1. A product
      applies it to what it rounds.
  """
  values: Int[Array, '...']
  scale: Float[Array, '...']
  contracted: tuple[int, ...] = struct.field(pytree_node=False)
  rounds_inputs: bool = struct.field(pytree_node=False, default=False)
  input_scale: Float[Array, '...'] | None = None

  @property
  def size(self) -> int:
    """Number of entries of the matrix."""
    return self.values.size

  def astype(self, dtype: DTypeLike) -> Array:
    """Returns the matrix itself, rounded once."""
    wide = self.values.astype(jnp.float32) * jnp.expand_dims(self.scale, self.contracted)
    if self.input_scale is not None:
      wide = wide * _along_inputs(self.input_scale, self.contracted)
    return wide.astype(dtype)


def quantise(params: Params, rounds_inputs: bool = False, largest: Params | None = None) -> Params:
  """Returns a decoder's parameters with Quantised matrices and tables.

  Norms and biases stay as they are.

  A scale is the largest absolute value of its channel, over 127. The error of an entry is half a
  scale at most.

  Some channels of the activations are much larger than the others, which would leave the others few
  of the 255 values. Therefore W8A8 divides a channel of the activations by a factor, and multiplies
  the weights that read it by the same (SmoothQuant, arXiv 2211.10438, equation 4 with alpha 0.5).

  Args:
    params: parameters of a decoder, boxed with logical axes or not.
    rounds_inputs: whether products with the matrices of blocks are W8A8. The tables' never are.
    largest: largest absolute value of each channel of the activations, as `Projection` sows it in
      the collection LARGEST_INPUTS; None for channels that are alike.
  """
  return _quantise_tree(params, 1, rounds_inputs, largest or {})


def _quantise_tree(params: Params, inputs: int, rounds_inputs: bool, largest: Params) -> Params:
  quantised = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      quantised[name] = _quantise_tree(child, input_axes(name), rounds_inputs,
                                       largest.get(name, {}))
    elif name in ('table', 'head'):
      quantised[name] = _quantise_matrix(child, (-1,))
    elif name == 'w':
      # Count from the last axis, because a stack of layers has one axis more.
      first = 1 - nn.unbox(child).ndim  # after the axis of layers
      quantised[name] = _quantise_matrix(child, tuple(range(first, first + inputs)), rounds_inputs,
                                         *largest.get('x', ()))
    else:
      quantised[name] = child
  return quantised


def _quantise_matrix(matrix: Array | nn.Partitioned, contracted: tuple[int, ...],
                     rounds_inputs: bool = False, largest: Array | None = None) -> Quantised:
  # All parts keep their logical axes. The scale lacks those that are contracted.
  if isinstance(matrix, nn.Partitioned):
    bare = _quantise_matrix(matrix.value, contracted, rounds_inputs, largest)
    axes = len(matrix.names)
    names = tuple(name for axis, name in enumerate(matrix.names) if axis - axes not in contracted)
    input_scale = bare.input_scale
    if input_scale is not None:
      input_scale = matrix.replace(value=input_scale, names=matrix.names[:axes + contracted[0] + 1])
    return bare.replace(values=matrix.replace(value=bare.values),
                        scale=matrix.replace(value=bare.scale, names=names),
                        input_scale=input_scale)
  wide, input_scale = matrix.astype(jnp.float32), None
  if rounds_inputs and len(contracted) == 1:
    input_scale = _input_scale(wide, contracted, largest)
    wide = wide / _along_inputs(input_scale, contracted)
  # One scale for each channel. A channel of zeros gets 1, to avoid 0 / 0.
  scale = step_of(jnp.max(jnp.abs(wide), axis=contracted))
  values = jnp.round(wide / jnp.expand_dims(scale, contracted)).astype(jnp.int8)
  return Quantised(values, scale, contracted, rounds_inputs, input_scale)


def _input_scale(matrix: Array, contracted: tuple[int, ...], largest: Array | None) -> Array:
  """Returns sqrt(largest weight that reads a channel / largest value of the channel)."""
  of_weights = jnp.max(jnp.abs(matrix), axis=tuple(range(contracted[0] + 1, 0)))
  if largest is None:
    return jnp.ones_like(of_weights)
  # What is always zero needs no scale.
  scale = jnp.sqrt(of_weights / jnp.where(largest > 0, largest, 1))
  return jnp.where((of_weights > 0) & (largest > 0), scale, 1)


def _along_inputs(input_scale: Array, contracted: tuple[int, ...]) -> Array:
  """Returns a scale of inputs with axes for the outputs of a matrix."""
  return jnp.expand_dims(input_scale, tuple(range(contracted[0] + 1, 0)))


def step_of(largest: Array) -> Array:
  """Returns the distance of two int8 values, given the largest absolute value; 1 for zeros."""
  return jnp.where(largest > 0, largest / LARGEST, 1)


def multiply_quantised(x: Array, weight: Quantised, inputs: int, axes: Sequence[str],
                       dtype: DTypeLike) -> Array:
  """Contracts the last `inputs` axes of x with the first ones of an int8 weight.

  Args:
    axes: logical names of the weight's axes.
    dtype: dtype that the weight is converted to. The result has the dtype of x.
  """
  if weight.rounds_inputs:
    return _multiply_rounded((tuple(axes), inputs, jnp.dtype(dtype).name), x, weight)

  # The backward pass converts the int8 again; otherwise it would keep all layers as floats. A scan
  # keeps the two conversions apart. The guard of prevent_cse would take half as long again on TPUs.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def product(x: Array, weight: Quantised) -> Array:
    return _multiply_converted(x, _gather(weight, axes), inputs, dtype)

  return product(x, weight)


def _multiply_converted(x: Array, weight: Quantised, inputs: int, dtype: DTypeLike) -> Array:
  return multiply(x, weight.astype(dtype), inputs, flatten_batch=x.dtype != dtype)


def _gather(weight: Quantised, axes: Sequence[str]) -> Quantised:
  """Gathers the shards along 'embed' as int8. XLA would convert them to floats before."""
  return weight.replace(values=nn.with_logical_constraint(weight.values, _whole(axes)))


def _whole(axes: Sequence[str]) -> tuple[str, ...]:
  """Returns the logical names of a weight's axes, once it is gathered."""
  return tuple('activation' if axis == 'embed' else axis for axis in axes)


# --- W8A8: products of int8 activations and int8 weights ---
#
# x is rounded token by token: x * input_scale = step * values, with one step a token. The channels
# of the weight have a scale each, so y = step * (values of x times values of W) * scale, where the
# integers are multiplied in int8 and summed in int32. The gradient of x is a product with the same
# integers: cotangent * scale is rounded token by token, and multiplied with the values of W.
#
# Rounding needs one axis that holds all that a product sums over. Where that is two (heads and
# their width), the weight is converted instead.


def _compute_rounded(options: tuple[tuple[str, ...], int, str], x: Array,
                     weight: Quantised) -> Array:
  axes, inputs, dtype = options
  weight = _gather(weight, axes)
  if inputs > 1:
    y = _multiply_converted(x, weight, inputs, dtype)
  else:
    values, step = round_tokens(x, weight.input_scale, _whole(axes)[0])
    y = _multiply_integers(values, weight.values, ((x.ndim - 1,), (0,)))
    step = step.reshape(step.shape[:-1] + (1,) * weight.scale.ndim)
    y = (y * step * weight.scale).astype(x.dtype)
  return checkpoint_name(y, INT8_PRODUCT)


_multiply_rounded = jax.custom_vjp(_compute_rounded, nondiff_argnums=(0,))


def _multiply_rounded_forward(options: tuple[tuple[str, ...], int, str], x: Array,
                              weight: Quantised) -> tuple[Array, Quantised]:
  # The shards are kept, and gathered again by the backward pass.
  return _compute_rounded(options, x, weight), weight


def _multiply_rounded_backward(options: tuple[tuple[str, ...], int, str], weight: Quantised,
                               cotangent: Array) -> tuple[Array, None]:
  axes, inputs, dtype = options
  weight, outputs = _gather(weight, axes), weight.values.ndim - inputs
  if outputs > 1:
    like = jnp.zeros(cotangent.shape[:-outputs] + weight.values.shape[:inputs], cotangent.dtype)
    _, pull = jax.vjp(lambda x: _multiply_converted(x, weight, inputs, dtype), like)
    of_x, = pull(cotangent)
  else:
    values, step = round_tokens(cotangent, weight.scale, _whole(axes)[-1])
    of_x = _multiply_integers(values, weight.values, ((cotangent.ndim - 1,), (inputs,)))
    of_x = of_x * step.reshape(step.shape[:-1] + (1,) * inputs)
    if weight.input_scale is not None:
      of_x = of_x * weight.input_scale
  return of_x.astype(cotangent.dtype), None  # the weight is frozen


_multiply_rounded.defvjp(_multiply_rounded_forward, _multiply_rounded_backward)


def _multiply_integers(x: Array, weight: Array, axes: tuple[tuple[int, ...], tuple[int, ...]],
                       ) -> Array:
  """Returns the sums of products of two int8 arrays over `axes`, as float32.

  A CPU has no fast product of int8 in XLA, so it multiplies the same numbers as floats.
  """
  def of_floats(x: Array, weight: Array) -> Array:
    return jnp.tensordot(x.astype(jnp.float32), weight.astype(jnp.float32), axes)

  def of_integers(x: Array, weight: Array) -> Array:
    sums = jax.lax.dot_general(x, weight, (axes, ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32)

  return jax.lax.platform_dependent(x, weight, cpu=of_floats, default=of_integers)


@typed
def round_tokens(x: Float[Array, '... W'], factor: Float[Array, ' W'], axis: str,
                 ) -> tuple[Int[Array, '... W'], Float[Array, '... 1']]:
  """Rounds x * factor to int8 values with one step a token, so that it is about values * step.

  Args:
    x: activations, or a cotangent.
    factor: factor of each channel.
    axis: logical name of the last axis.
  """
  kernels = importlib.import_module('latent_deliberation.model.kernels.fused_rounding')
  return jax.lax.platform_dependent(
      x, factor, tpu=functools.partial(kernels.round_tokens, axis=axis), default=round_plainly)


def round_plainly(x: Array, factor: Array) -> tuple[Array, Array]:
  """The function of `round_tokens`, as ordinary operations."""
  wide = x.astype(jnp.float32) * factor
  step = step_of(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
  return jnp.round(wide / step).astype(jnp.int8), step
