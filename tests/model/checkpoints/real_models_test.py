"""The real Gemma 3 270M and SmolLM2-135M give the logits and the greedy tokens of transformers.

transformers read the same GGUF files in float32; its figures are in real_models.json.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_deliberation as ld
from latent_deliberation.model.checkpoints import named
from latent_deliberation.model.decoder import Decoder

GOLDEN = json.loads(Path(__file__).with_name('real_models.json').read_text())


@pytest.fixture(scope='module', params=GOLDEN)
def name(request):
  if not named.is_installed(request.param):
    pytest.skip(f'needs {named.MODELS[request.param].command()}')
  return request.param


@pytest.fixture(scope='module')
def decoder(name):
  """The model in float32, loaded once."""
  return ld.load_decoder(name)


@pytest.mark.gemma
def test_logits(name, decoder):
  """The five largest logits after each prompt are within 1e-3."""
  apply = jax.jit(Decoder(decoder.config).apply)
  for case in GOLDEN[name]:
    # One length, so that one program serves all prompts. What follows changes nothing before it.
    padded = jnp.asarray([case['ids'] + [0] * (16 - len(case['ids']))], jnp.int32)
    logits = apply({'params': decoder.params}, padded)[0][0, len(case['ids']) - 1]
    assert jnp.argsort(-logits)[:5].tolist() == case['top']
    np.testing.assert_allclose(logits[jnp.asarray(case['top'])], case['logits'], atol=1e-3)


@pytest.mark.gemma
def test_greedy_tokens(name, decoder):
  """Forty greedy tokens after each prompt are equal; none of them ends a text."""
  golden = GOLDEN[name]
  assert [decoder.tokenizer.encode(case['prompt']) for case in golden] == [
      case['ids'] for case in golden]
  generator = ld.Generator(decoder, length=64)
  completions = generator.generate([case['prompt'] for case in golden], max_tokens=40)
  for completion, case in zip(completions, golden, strict=True):
    assert completion.tokens == case['greedy']
