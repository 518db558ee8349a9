"""A checkpoint is compared with its config before it is read; what is no checkpoint is named."""

import re

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints.source import Stored, check_tensors, refuse_pickles
from tests.model.checkpoints import foreign


def check(arrays, expected, padded=(), is_foreign=lambda name: False):
  check_tensors(foreign.MemorySource(arrays), expected, padded, is_foreign)


def test_tensors_that_fit_are_accepted():
  check({'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float16)}, {'a': (2, 3), 'b': (4,)})


def test_every_tensor_that_does_not_fit_is_named_with_both_shapes():
  arrays = {'a': np.ones((3, 2), np.float32), 'b': np.ones(4, np.float32),
            'c': np.ones((), np.float32), 'd': np.ones(4, np.int8), 'e': np.ones((2, 5), np.int8)}
  with pytest.raises(UserError, match='/memory does not hold the decoder') as error:
    check(arrays, {'a': (2, 3), 'c': (1,), 'd': (4,), 'e': (5,), 'f': (7, 8)})
  dtypes = "expected one of ('float32', 'bfloat16', 'float16')"
  assert [line.strip() for line in str(error.value).split('\n')[1:-1]] == [
      'a: has shape [3, 2], expected [2, 3]', 'c: has shape [], expected [1]',
      'e: has shape [2, 5], expected [5]', 'f: missing, expected [7, 8]',
      'b: not expected, has shape [4]',
      f'd: has dtype int8, {dtypes}', f'e: has dtype int8, {dtypes}']


def test_rows_too_many_are_accepted_where_a_tensor_is_padded_and_rows_too_few_never_are():
  check({'a': np.ones((5, 3), np.float32)}, {'a': (4, 3)}, padded=['a'])
  for shape, padded in (((5, 3), []), ((3, 3), ['a']), ((5, 4), ['a']), ((), ['a'])):
    with pytest.raises(UserError, match=re.escape(f'a: has shape {list(shape)}, expected [4, 3]')):
      check({'a': np.ones(shape, np.float32)}, {'a': (4, 3)}, padded)


def test_only_what_is_known_to_be_no_part_of_a_decoder_is_left():
  arrays = {'a': np.ones(2, np.float32), 'vision': np.ones(3, np.float64)}
  check(arrays, {'a': (2,)}, is_foreign=lambda name: name == 'vision')
  with pytest.raises(UserError, match='vision: not expected'):
    check(arrays, {'a': (2,)})


@pytest.mark.parametrize('dtype, nbytes', [('float32', 24), ('bfloat16', 12), ('float16', 12)])
def test_the_size_of_a_tensor_is_that_of_its_values(dtype, nbytes):
  assert Stored((2, 3), dtype).nbytes == nbytes


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'model.pt', 'model.pth', 'model.ckpt', 'params.pkl',
    'pytorch_model-00001-of-00002.bin'])
@pytest.mark.parametrize('with_config', [True, False])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name, with_config):
  (tmp_path / name).write_bytes(b'\x80\x04.')
  if with_config:
    (tmp_path / 'config.json').write_text('{"model_type": "gemma2"}')
  with pytest.raises(UserError, match=f'{tmp_path} holds pickled weights .*{name}.*save_pretrained'
                     '.*safetensors'):
    weights.open_checkpoint(tmp_path)


def test_pickles_beside_safetensors_are_no_hindrance(tmp_path):
  tensors = foreign.hf_tensors(foreign.params_of('gemma1'))
  foreign.write_hf(tmp_path, foreign.HF_CONFIGS['gemma1'], tensors)
  (tmp_path / 'optimizer.pt').write_bytes(b'')
  weights.open_checkpoint(tmp_path).check()


def test_a_directory_without_pickles_is_not_accused(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(b'')
  refuse_pickles(tmp_path)


def test_what_is_no_directory_of_a_decoder_is_named(tmp_path):
  with pytest.raises(UserError, match=f'{tmp_path} holds no decoder'):
    weights.open_checkpoint(tmp_path)
  with pytest.raises(UserError, match=f'{tmp_path}/gone is not there'):
    weights.open_checkpoint(tmp_path / 'gone')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  with pytest.raises(UserError, match='model.safetensors is a file: give the directory'):
    weights.open_checkpoint(tmp_path / 'model.safetensors')
