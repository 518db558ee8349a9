"""Blocks fill what a machine multiplies at a time, and little of them is padding."""

import pytest

from latent_deliberation.model.kernels.fused_attention import GPU, TPU
from latent_deliberation.model.kernels.tiling import Layout


@pytest.mark.parametrize('shape, kv_heads, traces, rows, chunk', [
    ((4, 128, 32, 8, 256), 4, 128, 512, 128),  # 16 latents of Gemma-2 2B: all is filled
    ((4, 128, 79, 8, 256), 4, 128, 320, 80),  # 64 latents: 4 traces, for 6 do not divide 128
    ((4, 128, 16, 8, 256), 1, 128, 128, 128),  # 8 heads to a kv head
    ((4, 5, 16, 8, 256), 4, 5, 80, 80)])
def test_blocks_are_large_and_padding_is_small(shape, kv_heads, traces, rows, chunk):
  layout = Layout.aligned(TPU.blocks, None, shape, kv_heads, 2048)
  assert (layout.traces, layout.tiles.rows, layout.tiles.chunk) == (traces, rows, chunk)
  assert layout.tiles.keys == 512


@pytest.mark.parametrize('shape, traces, rows', [
    ((4, 128, 32, 8, 256), 128, 128),  # 16 latents of Gemma-2 2B: all is filled
    ((4, 128, 79, 8, 256), 128, 128),  # 64 latents: traces of 80 lie across blocks
    ((4, 5, 16, 8, 256), 8, 128), ((1, 1, 1, 8, 256), 4, 64)])
def test_blocks_of_a_gpu_are_a_power_of_two_and_padding_is_small(shape, traces, rows):
  layout = Layout.across(GPU.blocks, None, shape, 4, 2048)
  assert (layout.traces, layout.tiles.rows, layout.tiles.keys) == (traces, rows, 64)
