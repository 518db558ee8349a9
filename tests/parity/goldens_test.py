"""Our decoder computes the same as transformers, on every architecture. Needs no torch."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_deliberation.array_types import Params
from latent_deliberation.model import weights
from latent_deliberation.model.transformer_config import TransformerConfig
from tests.parity import golden
from tests.parity.agreement import measure

# One feature of an architecture, switched off or changed.
CHANGES = (
    ('gemma1', {'rope_base': 10_000.0}),
    ('gemma1_multihead', {'norm_epsilon': 1e-6}),
    ('gemma2', {'attention_softcap': None}),
    ('gemma2', {'final_softcap': None}),
    ('gemma2', {'window': 1000}),
    ('gemma2', {'query_scale': None}),
    ('gemma2', {'post_norms': False}),
    ('gemma2', {'layer_pattern': ('global', 'local')}),
    ('gemma2_bfloat16', {'layer_pattern': ('local', 'global')}),
    ('gemma3', {'qk_norm': False}),
    ('gemma3', {'query_scale': None}),
    ('gemma3', {'window': 5}),
    ('gemma3', {'rope_local_base': None}),
    ('gemma3', {'rope_base': 50.0}),
    ('gemma3', {'rope_scaling': 1.0}),
    ('gemma3_multimodal', {'rope_scaling': 1.0}),
    ('llama3', {'rope_llama3': ()}),
    ('llama3', {'activation': 'gelu'}),
    ('llama3', {'norm_offset': True}),
    ('llama3', {'scale_embeddings': True}),
    ('mistral', {'window': 1000}),
    ('qwen3', {'rope_base': 10_000.0}),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A golden, with its checkpoint as we read it."""
  golden: golden.Golden
  config: TransformerConfig
  params: Params


@functools.cache
def case_of(name: str) -> Case:
  stored = golden.read_golden(name)
  return Case(stored, *weights.load(stored.directory, dtype='float32'))


@pytest.fixture(scope='module', params=golden.NAMES)
def case(request) -> Case:
  return case_of(request.param)


def test_logits_equal_transformers(case):
  """Logits equal those of transformers."""
  logits = golden.logits_of(case.config, case.params, case.golden.tokens)
  assert 2 < np.abs(case.golden.logits).max() < 8
  np.testing.assert_allclose(logits, case.golden.logits, rtol=0, atol=golden.TOLERANCE)


def test_stepwise_equals_whole(case):
  """Reading token by token gives the logits of reading at once."""
  whole = golden.logits_of(case.config, case.params, case.golden.tokens)
  stepwise = golden.read_on(case.config, case.params, case.golden.tokens)
  expected = whole[:, golden.PROMPT - 1:]
  np.testing.assert_allclose(stepwise, expected, rtol=0, atol=golden.TOLERANCE)


def test_greedy_equals_transformers(case):
  """Greedy continuations equal those of transformers."""
  prompts = case.golden.tokens[:, :golden.PROMPT]
  chosen = golden.continue_greedily(case.config, case.params, prompts)
  np.testing.assert_array_equal(chosen, case.golden.continuation)
  assert all(len(set(text)) > 4 for text in chosen.tolist())  # else they would show little


@pytest.mark.slow
@pytest.mark.parametrize('name, change', CHANGES)
def test_every_feature_matters(name, change):
  """Each feature, switched off, moves the logits."""
  case = case_of(name)
  for key, value in change.items():
    assert getattr(case.config, key) != value
  other = dataclasses.replace(case.config, **change)
  logits = golden.logits_of(other, case.params, case.golden.tokens)
  assert np.abs(logits - case.golden.logits).max() > 0.05


@pytest.mark.slow
def test_every_norm_matters(case):
  """Each norm scales by one plus its weight, or by its weight: a change by 1 shows."""
  leaves, structure = jax.tree.flatten_with_path(case.params)
  norms = [path for path, _ in leaves if path[-1].key == 'scale']
  for norm in norms:
    others = [leaf - 1 if path == norm else leaf for path, leaf in leaves]
    logits = golden.logits_of(
        case.config, jax.tree.unflatten(structure, others), case.golden.tokens)
    effect = np.abs(logits - case.golden.logits).max()
    assert effect > 0.05, f'{jax.tree_util.keystr(norm)} moves logits by only {effect}'
  assert len(norms) == 3 + 2 * case.config.post_norms + 2 * case.config.qk_norm


# transformers 4 could not express the layer types of 'gemma2_bfloat16'.
@pytest.mark.parametrize('name', [name for name in golden.NAMES if name != 'gemma2_bfloat16'])
def test_legacy_config(name, tmp_path):
  """The config.json of transformers 4 is read as the same config."""
  case, directory = case_of(name), tmp_path / 'legacy'
  shutil.copytree(case.golden.directory, directory)
  (directory / 'config_legacy.json').replace(directory / 'config.json')
  assert weights.open_checkpoint(directory).config == case.config


def test_multimodal_prefixes(tmp_path):
  """The decoder of a multimodal model may have either prefix."""
  case = case_of('gemma3_multimodal')
  tensors = load_file(case.golden.directory / 'model.safetensors')
  assert 'language_model.model.norm.weight' in tensors
  renamed = {  # the names of modules in transformers 5, which other writers use
      'model.' + name.replace('language_model.model.', 'language_model.'): tensor
      for name, tensor in tensors.items()}
  save_file(renamed, tmp_path / 'model.safetensors')
  shutil.copy(case.golden.directory / 'config.json', tmp_path)
  config, params = weights.load(tmp_path, dtype='float32')
  assert config == case.config
  jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_sharded_bfloat16():
  """Several files in bfloat16 are loaded as stored."""
  directory = golden.DIRECTORY / 'gemma2_bfloat16'
  index = json.loads((directory / 'model.safetensors.index.json').read_text())
  assert len(set(index['weight_map'].values())) == 3
  _, params = weights.load(directory)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('bfloat16')}
  wide = case_of('gemma2_bfloat16').params
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype('float32'), b), params, wide)


@pytest.mark.parametrize('name', ['gemma1', 'gemma2', 'gemma3'])
def test_bfloat16_agreement(name):
  """Our bfloat16 is as near to float32 as that of transformers."""
  case = case_of(name)
  ours, theirs = measure(case.golden, case.config, case.params)
  assert 1e-3 < ours.mean < 1.2 * theirs.mean
  assert ours.divergence < 1.5 * theirs.divergence
  assert ours.first_choices > 0.95


def test_goldens_are_small():
  """No golden is larger than a megabyte."""
  for name in golden.NAMES:
    assert sum(file.stat().st_size for file in (golden.DIRECTORY / name).iterdir()) < 1e6
