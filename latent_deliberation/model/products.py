"""Products of activations and weights, in the forms that CPUs and TPUs compute fast."""

import functools
import math

import jax
import jax.numpy as jnp

from latent_deliberation.array_types import Array


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


def input_axes(name: str) -> int:
  """Returns the number of leading axes that a projection of a block contracts, by its name."""
  return 2 if name == 'out' else 1  # N and H are contracted together
