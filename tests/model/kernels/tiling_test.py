"""Blocks of the kernels are large, have little padding, and skip only keys that no query sees."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_deliberation.model.attention import (
  AttentionMaskSpec,
  KVCache,
  cached_mask,
  fresh_mask,
)
from latent_deliberation.model.kernels.fused_attention import GPU, TPU
from latent_deliberation.model.kernels.tiling import Blocks, Inputs, Layout, lay_out


@pytest.mark.parametrize('shape, kv_heads, traces, rows, chunk', [
    ((4, 128, 32, 8, 256), 4, 128, 512, 128),  # 16 latents of Gemma-2 2B: no padding
    ((4, 128, 79, 8, 256), 4, 128, 320, 80),  # 64 latents: 4 traces, because 6 do not divide 128
    ((4, 128, 16, 8, 256), 1, 128, 128, 128),  # 8 heads to a kv head
    ((4, 5, 16, 8, 256), 4, 5, 80, 80)])
def test_tpu_blocks(shape, kv_heads, traces, rows, chunk):
  """Blocks of a TPU are large, and their padding is small."""
  layout = Layout.aligned(TPU.blocks, None, shape, kv_heads, 2048)
  assert (layout.traces, layout.tiles.rows, layout.tiles.chunk) == (traces, rows, chunk)
  assert layout.tiles.keys == 512


@pytest.mark.parametrize('shape, traces, rows', [
    ((4, 128, 32, 8, 256), 128, 128),  # 16 latents of Gemma-2 2B: no padding
    ((4, 128, 79, 8, 256), 128, 128),  # 64 latents: traces of 80 cross the borders of blocks
    ((4, 5, 16, 8, 256), 8, 128), ((1, 1, 1, 8, 256), 4, 64)])
def test_gpu_blocks(shape, traces, rows):
  """Blocks of a GPU are powers of two, and their padding is small."""
  layout = Layout.across(GPU.blocks, None, shape, 4, 2048)
  assert (layout.traces, layout.tiles.rows, layout.tiles.keys) == (traces, rows, 64)


SMALL = Blocks(rows=32, keys=16, own=32)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@settings(PROPERTY, max_examples=10)  # each of which is compiled
@given(st.sampled_from([Layout.aligned, Layout.across]), st.integers(1, 5), st.integers(1, 40),
       st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.none() | st.integers(0, 70))
def test_unflatten_undoes_flatten(make, traces, length, heads, cached):
  """Rows fill whole blocks, and come back in their own shape."""
  traces = 1 if cached is None else traces
  x = np.arange(2 * traces * length * heads[0] * 3).reshape(2, traces, length, heads[0], 3)
  layout = make(SMALL, None, x.shape, heads[1], cached)
  rows = jax.jit(layout.flatten)(x)
  assert rows.shape[2] % layout.tiles.rows == 0 and np.asarray(rows).sum() == x.sum()
  np.testing.assert_array_equal(
      jax.jit(layout.unflatten, static_argnums=1)(rows, x.shape), x)


# Each of these is compiled once: a layout, M, Q, and S (None for a row over itself).
@PROPERTY
@given(st.sampled_from([(Layout.aligned, 3, 5, 40), (Layout.aligned, 1, 50, None),
                        (Layout.across, 4, 17, 70), (Layout.across, 1, 50, None)]),
       st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(0, 3))
def test_skipped_blocks_hold_no_visible_key(shape, seed, window, documents):
  """No query sees a key outside the range of blocks that its own block visits."""
  make, traces, length, cached = shape
  random = np.random.default_rng(seed)
  integers = lambda high, *sizes: random.integers(0, high + 1, (200, *sizes), np.int32)  # noqa: E731
  packed = lambda *sizes: np.sort(integers(documents, *sizes), axis=-1)  # noqa: E731
  rows = traces, length
  mask_spec = AttentionMaskSpec(packed(traces, 1) + np.zeros(rows, np.int32),
                                integers(cached or 0, traces))
  keys, cache = np.ones((200, *rows, 1, 1), np.float32), None
  if cached is None:
    mask_spec = mask_spec.replace(segments=packed(*rows))
  else:
    shared = np.ones((200, cached, 1, 1), np.float32)
    cache = KVCache(shared, shared, integers(70, cached), packed(cached))
  inputs = Inputs(keys, keys, keys, integers(70, 1, 1) + integers(9, *rows), mask_spec,
                  np.int32(window), cache)
  layout = make(SMALL, None, keys.shape, 1, cached)
  begin, end, visible = map(np.asarray, ranges_and_mask(layout, inputs))
  text, row, key = np.nonzero(visible)
  block, key_block = row // layout.tiles.rows, key // layout.tiles.keys
  assert (begin[text, block] <= key_block).all() and (key_block < end[text, block]).all()


@functools.partial(jax.jit, static_argnums=0)
def ranges_and_mask(layout, inputs):
  """Begin and end of the ranges of key blocks [B, I], and the dense mask [B, I * R, S]."""
  rows = lay_out(layout, inputs).rows
  positions, mask_spec, window, cache = inputs[3:]
  if cache is None:
    visible = fresh_mask(positions, mask_spec, window)
  else:
    visible = cached_mask(positions, mask_spec, cache.positions, cache.segments, window)
  return rows.begin, rows.end, layout.flatten(visible[:, :, :, None])[:, 0]
