"""The parts of a coprocessor, and its outputs before any training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.deliberation.deliberation_config import GATES, LATENTS
from latent_deliberation.deliberation.traces import place
from latent_deliberation.errors import UserError
from tests import tiny


def started(decoder_params, seed=0, **choices):
  """A new deliberator and the parameters that its coprocessor starts with."""
  deliberator = tiny.deliberator(**choices)
  return deliberator, tiny.start(deliberator, jax.random.key(seed), decoder_params)


def outputs_and_latents(deliberator, params, decoder_params, batch):
  """Outputs, latents and base embeddings at some anchors."""
  @jax.jit
  def compute(params):
    trunk, cache = deliberator.prefill(decoder_params, batch)
    placement = place(batch, jnp.array([[2, 5, 9], [3, 7, 13]]), deliberator.config, 1)
    outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
    return outputs, deliberator.latents(params, decoder_params, placement, outputs), (
        tiny.embed(decoder_params, placement.base_tokens.reshape(2, -1)).reshape(outputs.shape))

  return compute(params)


@pytest.mark.parametrize('latents', LATENTS)
@pytest.mark.parametrize('trainable, part', [
    ('full', {'transformer'}), ('lora', {'lora'}), ('constant', set())])
def test_parts_of_the_parameters(decoder_params, latents, trainable, part):
  """The parameters hold the trainable parts and no others."""
  _, boxed = started(decoder_params, latents=latents, trainable=trainable)
  gate = set() if latents == 'paper' else {'gate'}
  assert set(boxed) == {'soft_tokens'} | gate | part


def test_parameters_name_axes(decoder_params):
  """Every parameter is boxed with the name of each of its axes."""
  for trainable in ('full', 'lora'):
    _, boxed = started(decoder_params, trainable=trainable)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for leaf in leaves:
      assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim


def test_full_start(decoder_params):
  """A full transformer starts from the decoder's weights or from scratch."""
  _, boxed = started(decoder_params)
  jax.tree.map(np.testing.assert_array_equal, nn.unbox(boxed)['transformer'],
               decoder_params['transformer'])
  _, boxed = started(decoder_params, initialisation='scratch')
  same = jax.tree.map(lambda a, b: bool(np.all(a == b)), nn.unbox(boxed)['transformer'],
                      decoder_params['transformer'])
  assert not any(jax.tree.leaves(same))


def test_start_of_last_layers(decoder_params):
  """A smaller coprocessor starts from the decoder's last layers."""
  for trainable, part in (('full', 'transformer'), ('lora', 'lora')):
    _, boxed = started(decoder_params, num_layers=1, trainable=trainable)
    assert {len(leaf) for leaf in jax.tree.leaves(nn.unbox(boxed)[part]['blocks'])} == {1}
  _, boxed = started(decoder_params, num_layers=1)
  jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs[-1:]),
               nn.unbox(boxed)['transformer']['blocks'], decoder_params['transformer']['blocks'])


def test_too_many_layers():
  """A coprocessor deeper than the decoder is refused."""
  with pytest.raises(UserError, match='num_layers.*4.*3'):
    tiny.deliberator(num_layers=4)


@pytest.mark.parametrize('choices, layers', [
    (dict(), {0, 1, 2}), (dict(num_layers=1), {2}), (dict(reads='states'), set())])
def test_reads_cache_or_states(batch, decoder_params, choices, layers):
  """It reads the cache of its own layers, or the final states alone."""
  deliberator, boxed = started(decoder_params, **choices)
  trunk, cache = deliberator.prefill(decoder_params, batch)
  placement = place(batch, jnp.array([[2, 5, 9], [3, 7, 13]]), deliberator.config, 1)
  read_cache = lambda trunk, cache: deliberator.coprocess(  # noqa: E731
      nn.unbox(boxed), decoder_params, placement, trunk, cache)
  outputs = read_cache(trunk, cache)
  for layer in range(3):
    other = cache.replace(values=cache.values.at[layer].mul(2))
    assert np.allclose(read_cache(trunk, other), outputs) == (layer not in layers)
  assert np.allclose(read_cache(2 + trunk, cache), outputs) == bool(layers)


def test_adapters_start_as_decoder(batch, decoder_params):
  """Adapters change nothing at the start, so outputs equal those of a full transformer."""
  params, outputs = {}, {}
  for trainable in ('full', 'lora'):
    deliberator, boxed = started(decoder_params, trainable=trainable)
    params[trainable] = nn.unbox(boxed)
    outputs[trainable], _, _ = outputs_and_latents(
        deliberator, params[trainable], decoder_params, batch)
  np.testing.assert_array_equal(params['full']['soft_tokens'], params['lora']['soft_tokens'])
  np.testing.assert_allclose(outputs['lora'], outputs['full'], atol=2e-5)


@pytest.mark.parametrize('soft_tokens, share', [('free', 1.0), ('additive', 0.1)])
def test_spread_of_soft_tokens(decoder_params, soft_tokens, share):
  """Soft tokens start with the spread of embeddings, additive ones with a tenth of it."""
  _, boxed = started(decoder_params, num_latents=200, soft_tokens=soft_tokens)
  embeddings = tiny.embed(decoder_params, jnp.arange(38)[None])
  assert np.std(nn.unbox(boxed)['soft_tokens']) == pytest.approx(
      share * np.sqrt(np.mean(embeddings ** 2)), rel=0.05)


@pytest.mark.parametrize('latents', [each for each in LATENTS if each != 'paper'])
@pytest.mark.parametrize('gate', GATES)
def test_latents_start_as_base(batch, decoder_params, latents, gate):
  """With the gate at zero, latents are the embeddings of their base tokens."""
  deliberator, boxed = started(decoder_params, latents=latents, gate=gate)
  outputs, latents, base = outputs_and_latents(
      deliberator, nn.unbox(boxed), decoder_params, batch)
  assert np.abs(outputs).max() > 0.1
  np.testing.assert_array_equal(latents, base)


def test_paper_latents_are_outputs(batch, decoder_params):
  """The latents of the paper are the outputs themselves."""
  deliberator, boxed = started(decoder_params, latents='paper')
  outputs, latents, _ = outputs_and_latents(
      deliberator, nn.unbox(boxed), decoder_params, batch)
  np.testing.assert_array_equal(latents, outputs)


def test_constant_outputs_are_soft_tokens(batch, decoder_params):
  """Constant outputs are the soft tokens at every anchor."""
  deliberator, boxed = started(decoder_params, trainable='constant')
  params = nn.unbox(boxed)
  outputs, _, _ = outputs_and_latents(deliberator, params, decoder_params, batch)
  np.testing.assert_array_equal(
      outputs, np.broadcast_to(params['soft_tokens'], outputs.shape))
