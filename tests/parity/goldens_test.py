"""Our decoder computes what transformers computes, on every architecture. Needs no torch."""

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

# Features as they would be if nobody had thought of them.
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
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A golden, and its checkpoint as we read it."""
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


def test_logits_are_those_of_transformers(case):
  logits = golden.logits_of(case.config, case.params, case.golden.tokens)
  assert 2 < np.abs(case.golden.logits).max() < 8
  np.testing.assert_allclose(logits, case.golden.logits, rtol=0, atol=golden.TOLERANCE)


def test_reading_on_token_by_token_gives_the_logits_of_reading_at_once(case):
  whole = golden.logits_of(case.config, case.params, case.golden.tokens)
  stepwise = golden.read_on(case.config, case.params, case.golden.tokens)
  expected = whole[:, golden.PROMPT - 1:]
  np.testing.assert_allclose(stepwise, expected, rtol=0, atol=golden.TOLERANCE)


def test_greedy_continuations_are_those_of_transformers(case):
  prompts = case.golden.tokens[:, :golden.PROMPT]
  chosen = golden.continue_greedily(case.config, case.params, prompts)
  np.testing.assert_array_equal(chosen, case.golden.continuation)
  assert all(len(set(text)) > 4 for text in chosen.tolist())  # else it would show little


@pytest.mark.parametrize('name, change', CHANGES)
def test_every_feature_switched_off_is_seen(name, change):
  case = case_of(name)
  for key, value in change.items():
    assert getattr(case.config, key) != value
  other = dataclasses.replace(case.config, **change)
  logits = golden.logits_of(other, case.params, case.golden.tokens)
  assert np.abs(logits - case.golden.logits).max() > 0.05


def test_every_norm_scales_by_one_plus_its_weight(case):
  leaves, structure = jax.tree.flatten_with_path(case.params)
  norms = [path for path, _ in leaves if path[-1].key == 'scale']
  for norm in norms:
    others = [leaf - 1 if path == norm else leaf for path, leaf in leaves]
    logits = golden.logits_of(
        case.config, jax.tree.unflatten(structure, others), case.golden.tokens)
    effect = np.abs(logits - case.golden.logits).max()
    assert effect > 0.05, f'{jax.tree_util.keystr(norm)} moves logits by {effect} only'
  assert len(norms) == 3 + 2 * case.config.post_norms + 2 * case.config.qk_norm


# Those of 'gemma2_bfloat16' have layer types for which transformers 4 had no words.
@pytest.mark.parametrize('name', [name for name in golden.NAMES if name != 'gemma2_bfloat16'])
def test_the_config_that_transformers_4_wrote_is_read_alike(name, tmp_path):
  case, directory = case_of(name), tmp_path / 'legacy'
  shutil.copytree(case.golden.directory, directory)
  (directory / 'config_legacy.json').replace(directory / 'config.json')
  assert weights.open_checkpoint(directory).config == case.config


def test_a_text_decoder_inside_a_multimodal_model_may_have_either_prefix(tmp_path):
  case = case_of('gemma3_multimodal')
  tensors = load_file(case.golden.directory / 'model.safetensors')
  assert 'language_model.model.norm.weight' in tensors
  renamed = {  # as the modules of transformers 5 are called, which other writers use
      'model.' + name.replace('language_model.model.', 'language_model.'): tensor
      for name, tensor in tensors.items()}
  save_file(renamed, tmp_path / 'model.safetensors')
  shutil.copy(case.golden.directory / 'config.json', tmp_path)
  config, params = weights.load(tmp_path, dtype='float32')
  assert config == case.config
  jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_shards_and_bfloat16_are_kept_as_stored():
  directory = golden.DIRECTORY / 'gemma2_bfloat16'
  index = json.loads((directory / 'model.safetensors.index.json').read_text())
  assert len(set(index['weight_map'].values())) == 3
  _, params = weights.load(directory)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('bfloat16')}
  wide = case_of('gemma2_bfloat16').params
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype('float32'), b), params, wide)


@pytest.mark.parametrize('name', ['gemma1', 'gemma2', 'gemma3'])
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(name):
  case = case_of(name)
  ours, theirs = measure(case.golden, case.config, case.params)
  assert 1e-3 < ours.mean < 1.2 * theirs.mean
  assert ours.divergence < 1.5 * theirs.divergence
  assert ours.first_choices > 0.95


def test_no_golden_is_larger_than_a_megabyte():
  for name in golden.NAMES:
    assert sum(file.stat().st_size for file in (golden.DIRECTORY / name).iterdir()) < 1e6
