"""The frozen decoder is loaded whole and as configured, or not at all."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from latent_deliberation.build import (
  build_decoder,
  build_deliberator,
  count_parameters,
  frozen_shapes,
  load_frozen,
  open_frozen,
  with_decoder,
)
from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import boxed_shapes, fingerprint
from latent_deliberation.model.products import quantise
from latent_deliberation.sharding import MeshConfig, make_mesh
from tests import finished


@pytest.fixture
def mesh():
  return make_mesh(MeshConfig())


def test_frozen_dtype(quickstart, mesh):
  """The pretrained decoder is loaded in its frozen dtype."""
  checkpoint = open_frozen(finished.experiment().decoder, quickstart / 'pretraining/decoder')
  params, decoder_fingerprint = load_frozen(finished.experiment(), checkpoint, mesh)
  rounded, same = load_frozen(
      finished.experiment(computation__frozen_dtype='bfloat16'), checkpoint, mesh)
  assert decoder_fingerprint == same == fingerprint(params)
  for leaf, short in zip(jax.tree.leaves(params), jax.tree.leaves(rounded), strict=True):
    assert short.dtype == jnp.bfloat16
    assert jnp.array_equal(leaf.astype(jnp.bfloat16), short)


@pytest.mark.parametrize('dtype', ['int8', 'w8a8'])
@pytest.mark.parametrize('replicated', [False, True])
def test_int8(quickstart, replicated, dtype):
  """An int8 decoder has the planned shardings and the fingerprint of its stored weights."""
  experiment = finished.experiment(
      computation__frozen_dtype=dtype, computation__replicate_frozen=replicated, mesh__fsdp=2)
  mesh = make_mesh(experiment.mesh)
  checkpoint = open_frozen(experiment.decoder, quickstart / 'pretraining/decoder')
  params, decoder_fingerprint = load_frozen(experiment, checkpoint, mesh)
  assert decoder_fingerprint == checkpoint.fingerprint
  if dtype == 'int8':
    assert fingerprint(params) == fingerprint(jax.jit(quantise)(checkpoint.load()))
  else:
    scale = params['transformer']['blocks']['feed_forward']['down']['w'].input_scale
    assert scale.dtype == jnp.float32 and jnp.unique(scale).size > 10
  assert count_parameters(params) == 27_040
  assert jax.tree.map(jax.typeof, params) == jax.tree.map(
      jax.typeof, frozen_shapes(experiment, mesh))


def test_other_sizes(quickstart):
  """A decoder of other sizes is refused with both."""
  with pytest.raises(UserError, match='decoder.window.*8.*9'):
    open_frozen(finished.experiment(decoder__window=9).decoder, quickstart / 'pretraining/decoder')


# Tensorstore's threads outlive the event loop of a read that failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_truncated(tmp_path, quickstart, mesh):
  """A truncated decoder is refused."""
  decoder = shutil.copytree(quickstart / 'pretraining/decoder', tmp_path / 'decoder')
  largest = max((path for path in decoder.rglob('*') if path.is_file()), key=os.path.getsize)
  largest.write_bytes(largest.read_bytes()[:100])
  with pytest.raises(UserError, match=f'{decoder}/weights'):
    load_frozen(finished.experiment(), open_frozen(finished.experiment().decoder, decoder), mesh)


def test_with_decoder(quickstart):
  """Architecture and vocabulary are the decoder's, but for keys that the user gave."""
  decoder, expected = quickstart / 'pretraining/decoder', finished.experiment()
  other = finished.experiment(decoder__num_layers=1, decoder__window=9,
                              data__vocabulary='sentencepiece')
  adopted = with_decoder(other, str(decoder))
  assert (adopted.decoder, adopted.data) == (expected.decoder, expected.data)
  assert adopted.decoder_from == str(decoder) and with_decoder(adopted) == adopted
  assert with_decoder(other) == other
  kept = with_decoder(other, str(decoder), {'decoder.window', 'data.vocabulary'})
  assert kept.decoder == dataclasses.replace(expected.decoder, window=9)
  assert kept.data.vocabulary == 'sentencepiece'


def test_with_decoder_takes_its_tokenizer(quickstart, tmp_path):
  """A SentencePiece model beside the decoder is used, unless the config names one."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  (tmp_path / 'model').write_bytes(b'model')
  weights.save(tmp_path / 'decoder', config, params, 'a hash', tokenizer=tmp_path / 'model')
  tokenizer = tmp_path / 'decoder/tokenizer.model'
  data = with_decoder(finished.experiment(), str(tmp_path / 'decoder')).data
  assert (data.vocabulary, data.vocabulary_path) == ('sentencepiece', str(tokenizer))
  named = finished.experiment(data__vocabulary='sentencepiece', data__vocabulary_path='mine')
  assert with_decoder(named, str(tmp_path / 'decoder')).data == named.data


def test_vocabulary_path_of_another_decoder(quickstart, tmp_path):
  """A run.json keeps the path of its decoder's tokenizer, which is not that of another decoder."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  (tmp_path / 'model').write_bytes(b'model')
  for name in ('one', 'two'):
    weights.save(tmp_path / name, config, params, tokenizer=tmp_path / 'model')
  one, two = (str(tmp_path / name) for name in ('one', 'two'))
  saved = with_decoder(finished.experiment(data__vocabulary='sentencepiece'), one)
  assert with_decoder(saved) == saved
  assert with_decoder(saved, two).data.vocabulary_path == f'{two}/tokenizer.model'
  assert with_decoder(saved, two, {'data.vocabulary_path'}).data == saved.data
  # The same decoder may be written in another way.
  (tmp_path / 'own').write_bytes(b'model')
  own = dataclasses.replace(
      saved, data=dataclasses.replace(saved.data, vocabulary_path=str(tmp_path / 'own')))
  assert with_decoder(own, one + '/').data == own.data
  # Without a tokenizer of its own, a decoder leaves the path, and bytes have none.
  bare, of_bytes = str(tmp_path / 'bare'), str(quickstart / 'pretraining/decoder')
  weights.save(bare, config, params)
  assert with_decoder(saved, bare).data == saved.data
  assert with_decoder(saved, of_bytes).data == dataclasses.replace(
      saved.data, vocabulary='byte', vocabulary_path='')
  # On another machine, the path of the same decoder may be another one.
  elsewhere = dataclasses.replace(
      saved, data=dataclasses.replace(saved.data, vocabulary_path='/elsewhere/tokenizer.model'))
  assert with_decoder(elsewhere) == saved
  assert with_decoder(elsewhere, given={'data.vocabulary_path'}) == elsewhere


def test_no_decoder(tmp_path):
  """A directory without a decoder is refused."""
  with pytest.raises(UserError, match=f'{tmp_path}.*decoder.json'):
    open_frozen(finished.experiment().decoder, tmp_path)


@pytest.mark.parametrize('attention', ['plain', 'fused'])
@pytest.mark.parametrize('activations', ['auto', 'bfloat16', 'float32'])
def test_bfloat16_of_every_kind_starts(attention, activations):
  """A coprocessor can be made for every mix of dtypes and kernels."""
  experiment = finished.experiment(
      computation__dtype='bfloat16', computation__activations=activations,
      computation__attention=attention)
  coprocessor = build_deliberator(experiment).coprocessor
  decoder = nn.unbox(boxed_shapes(experiment.decoder))
  shapes = nn.unbox(jax.eval_shape(coprocessor.init, jax.random.key(0), decoder))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.float32.dtype}


def test_computation_changes_no_shape():
  """The computation does not change the parameters."""
  experiment = finished.experiment()
  computation = dataclasses.replace(
      experiment.computation, dtype='bfloat16', remat='full', scan=False, attention='fused')
  other = build_decoder(dataclasses.replace(experiment, computation=computation))
  shapes = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  expected = boxed_shapes(experiment.decoder)
  assert jax.tree.map(jax.typeof, shapes) == jax.tree.map(jax.typeof, expected)
  assert count_parameters(shapes) == count_parameters(expected) == 27_040
