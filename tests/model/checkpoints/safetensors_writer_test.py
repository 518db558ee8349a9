"""Arrays come back from safetensors to the bit, however many files they are written to."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from latent_deliberation.model.checkpoints.safetensors_io import (
  SafetensorsSource,
  gather,
  write_tensors,
)
from latent_deliberation.model.decoder import boxed_shapes
from tests.model.checkpoints import foreign

ARRAYS = {'a': np.arange(24, dtype=np.float32).reshape(4, 6).T,  # 96 bytes, not in C order
          'b': np.arange(8).astype('bfloat16'), 'c': np.arange(4, dtype=np.float16),  # 16, 8 bytes
          'd': np.ones(1, np.float32), 'e': np.arange(10, dtype=np.float32)}  # 4, 40 bytes


def write(directory, limit):
  write_tensors(directory, 'model', {name: array.nbytes for name, array in ARRAYS.items()},
                iter(ARRAYS.items()), limit)


def read_back(directory):
  source = SafetensorsSource(directory, lambda name: name)
  return foreign.read_all(source, source.tensors)


@pytest.mark.parametrize('limit, files', [
    (1, ['a', 'b', 'c', 'd', 'e']), (24, ['a', 'bc', 'd', 'e']), (40, ['a', 'bcd', 'e']),
    (68, ['a', 'bcde']), (112, ['ab', 'cde']), (163, ['abcd', 'e'])])
def test_files_are_cut_where_they_would_grow_too_large(tmp_path, limit, files):
  write(tmp_path, limit)
  names = [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
  assert sorted(path.name for path in tmp_path.glob('*.safetensors')) == names
  assert [''.join(sorted(load_file(tmp_path / name))) for name in names] == files
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index == {'metadata': {'total_size': 164}, 'weight_map': {
      tensor: name for tensors, name in zip(files, names, strict=True) for tensor in tensors}}
  foreign.assert_same(read_back(tmp_path), ARRAYS)


def test_what_fits_one_file_has_no_index(tmp_path):
  write(tmp_path, 164)
  assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
  foreign.assert_same(read_back(tmp_path), ARRAYS)


def test_a_single_number_keeps_its_shape(tmp_path):
  write_tensors(tmp_path, 'model', {'n': 4}, [('n', np.array(7, np.float32))])
  foreign.assert_same(read_back(tmp_path), {'n': np.array(7, np.float32)})


def test_files_name_the_format_without_which_transformers_reads_none(tmp_path):
  write(tmp_path, 40)
  for path in tmp_path.glob('*.safetensors'):
    with safe_open(path, 'numpy') as file:
      assert file.metadata() == {'format': 'pt'}


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write(tmp_path, 40)
  assert not list(tmp_path.iterdir())


def test_one_file_of_tensors_is_held_at_a_time(tmp_path):
  written = []

  def tensors():
    for name, array in ARRAYS.items():
      written.append(len(list(tmp_path.glob('*.safetensors'))))
      yield name, array

  write_tensors(tmp_path, 'model', {name: array.nbytes for name, array in ARRAYS.items()},
                tensors(), 40)
  assert written == [0, 1, 1, 1, 2]


def test_an_array_of_a_mesh_is_gathered_whole():
  config = foreign.FAMILIES['gemma2']
  table = foreign.params_of('gemma2')['embedder']['table']
  sharding = foreign.mesh_shardings(boxed_shapes(config))['embedder']['table']
  foreign.assert_same(gather(jax.device_put(table, sharding)), table)
