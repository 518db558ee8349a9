"""Our decoder and transformers agree on new random models, both ways.

Needs torch and transformers: pip install -e '.[parity]'. Skipped if they are not installed.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from latent_deliberation.model import weights  # noqa: E402
from tests.parity import golden, make_goldens, tiny_models  # noqa: E402

SEED = 100  # no golden has it


@pytest.fixture(scope='module', params=golden.NAMES)
def written(request, tmp_path_factory) -> Path:
  """A directory that transformers wrote."""
  directory = tmp_path_factory.mktemp('written') / request.param
  tiny_models.build(request.param, SEED).save_pretrained(directory)
  return directory


@pytest.fixture
def reference(written) -> tiny_models.PreTrainedModel:
  return tiny_models.load(written, torch.float32)


@pytest.fixture
def tokens() -> np.ndarray:
  return tiny_models.draw_tokens(SEED, golden.LENGTH)


def test_logits_equal_transformers(written, reference, tokens):
  """Logits equal those of transformers."""
  config, params = weights.load(written)
  np.testing.assert_allclose(golden.logits_of(config, params, tokens),
                             tiny_models.logits_of(reference, tokens),
                             rtol=0, atol=golden.TOLERANCE)


def test_greedy_equals_generate(written, reference, tokens):
  """Continuations equal those that transformers generates with its cache."""
  prompts = tokens[:, :golden.PROMPT]
  generated = reference.generate(
      torch.from_numpy(prompts).long(), attention_mask=torch.ones(prompts.shape), do_sample=False,
      max_new_tokens=golden.CONTINUATION, eos_token_id=None)
  chosen = golden.continue_greedily(*weights.load(written), prompts)
  np.testing.assert_array_equal(chosen, generated.numpy()[:, golden.PROMPT:])


def test_transformers_reads_legacy_configs(written, reference, tokens, tmp_path):
  """transformers reads the legacy configs as the same models."""
  # Without this, we would test our reader only against our own idea of these configs.
  if written.name == make_goldens.SHARDED:
    with pytest.raises(ValueError, match='layer_types'):
      make_goldens.legacy_config(json.loads((written / 'config.json').read_text()))
    return
  directory = tmp_path / 'legacy'
  shutil.copytree(written, directory)
  config = json.loads((directory / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(make_goldens.legacy_config(config)))
  other = tiny_models.load(directory, torch.float32)
  np.testing.assert_array_equal(tiny_models.logits_of(other, tokens),
                                tiny_models.logits_of(reference, tokens))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_transformers_reads_exports(written, tokens, dtype, tmp_path):
  """transformers reads our exports, bit by bit."""
  stored, target = tmp_path / 'stored', tmp_path / 'target'
  tiny_models.load(written, getattr(torch, dtype)).save_pretrained(stored)
  config, params = weights.load(stored)
  weights.save(target, config, params, format='huggingface')

  original = tiny_models.load(stored, getattr(torch, dtype))
  loaded, report = tiny_models.AutoModelForCausalLM.from_pretrained(
      target, attn_implementation='eager', dtype='auto', output_loading_info=True)
  assert not any(report.values()), report
  assert loaded.dtype == getattr(torch, dtype)
  expected, actual = text_state(original), text_state(loaded)
  assert actual.keys() == expected.keys()
  for name, tensor in expected.items():
    assert torch.equal(actual[name], tensor), name
  np.testing.assert_array_equal(tiny_models.logits_of(loaded.eval(), tokens),
                                tiny_models.logits_of(original, tokens))


def text_state(model: tiny_models.PreTrainedModel) -> dict[str, torch.Tensor]:
  """The tensors of the decoder, by their names in a model without a vision tower."""
  return {name.replace('model.language_model.', 'model.'): tensor
          for name, tensor in model.state_dict().items()
          if not name.startswith(('model.vision_tower.', 'model.multi_modal_projector.'))}


@pytest.mark.parametrize('name', golden.NAMES)
def test_goldens_are_reproducible(name, tmp_path):
  """The committed goldens are those that the script makes."""
  make_goldens.write(name, tmp_path / name)
  committed = golden.DIRECTORY / name
  assert weights_of(tmp_path / name) == weights_of(committed)
  fresh = np.load(tmp_path / name / 'golden.npz')
  stored = np.load(committed / 'golden.npz')
  assert set(fresh) == set(stored)
  for key in ('tokens', 'continuation'):
    np.testing.assert_array_equal(fresh[key], stored[key])
  # Another machine sums in another order, in bfloat16 to another value.
  np.testing.assert_allclose(fresh['logits'], stored['logits'], rtol=0, atol=golden.TOLERANCE)


def weights_of(directory: Path) -> dict[str, bytes]:
  """The safetensors of a golden, byte by byte."""
  return {file.name: file.read_bytes() for file in directory.glob('*.safetensors')}
