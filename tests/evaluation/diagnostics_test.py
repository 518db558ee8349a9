"""Sizes of latents are ratios that can be checked, and the rank is that of the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.evaluation.diagnostics import effective_rank, make_diagnosis
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import tiny

BATCH = tiny.packed_batch([(7, 4, 8), (9, 6), (19,)])


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_equal_directions_count_one_each(rank):
  rows = np.zeros((2 * rank, 8), np.float32)
  rows[np.arange(rank), np.arange(rank)], rows[rank + np.arange(rank), np.arange(rank)] = 2, -2
  found = effective_rank(jnp.asarray(rows + 5), jnp.ones(2 * rank, bool))
  assert float(found) == pytest.approx(rank, rel=1e-3)


def test_equal_rows_have_rank_one():
  assert float(effective_rank(jnp.full((9, 4), 3.0), jnp.ones(9, bool))) == pytest.approx(1)


def test_invalid_rows_do_not_count():
  rows = jnp.asarray([[2.0, 0], [-2, 0], [0, 50], [7, 7]])
  assert float(effective_rank(rows, jnp.array([True, True, False, False]))) == pytest.approx(1)


def diagnosed(decoder_params, **choices):
  deliberator = tiny.deliberator(**choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  diagnose = make_diagnosis(deliberator, mesh, DEFAULT_RULES)
  return lambda **changes: diagnose(params | changes, decoder_params, BATCH), params


def test_latents_move_with_their_gate(decoder_params):
  """The rank is that of the outputs, whatever the gate."""
  diagnose, params = diagnosed(decoder_params)
  shut, once, twice = (diagnose(gate=factor * params['gate']) for factor in (0, 1, 2))
  assert shut['moved'] == shut['gate'] == 0 < shut['norm']
  assert twice['moved'] == pytest.approx(2 * once['moved'], rel=1e-4)
  assert twice['gate'] == pytest.approx(2 * once['gate'], rel=1e-5)
  assert shut['effective_rank'] == pytest.approx(twice['effective_rank'])
  assert 1 < once['effective_rank'] < tiny.CONFIG.embed_dim


def test_paper_latents_have_no_gate(decoder_params):
  """They start from nothing, so all of them counts as moved."""
  figures = diagnosed(decoder_params, latents='paper')[0]()
  assert 'gate' not in figures and figures['norm'] == figures['moved'] > 0
