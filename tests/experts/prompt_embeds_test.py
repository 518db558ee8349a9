"""Exported embeddings are what the decoder reads, with latents and without."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_deliberation.errors import UserError
from latent_deliberation.experts.prompt_embeds import embed_prompt, export
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import tiny
from tests.experts import small
from tests.inference.small import PROMPTS


def read_greedily(values, count):
  """The likeliest tokens after embeddings [T, D], by the decoder of training, without a cache."""
  params, tokens = tiny.decoder_params(), []
  x = jnp.asarray(values)[None]
  _, _, empty = tiny.read(params, jnp.ones((1, 1), jnp.int32))
  for _ in range(count):
    _, logits, _ = tiny.read_on(params, x, jnp.arange(x.shape[1]), tiny.truncate(empty, 0))
    tokens.append(int(logits[0, -1].argmax()))
    x = jnp.concatenate([x, tiny.embed(params, jnp.asarray([tokens[-1:]]))], axis=1)
  return tokens


@pytest.mark.parametrize('latents, positions, choice', [
    ('refining', 'share', {'stars': 0.5, 'law': 1.0}), ('anchored', 'shift', 'stars'),
    ('paper', 'shift', 'stars'), ('refining', 'share', None)])
def test_embeddings_are_what_the_decoder_reads(latents, positions, choice):
  """Read as tokens at positions 0, 1, 2, ... they give the engine's own greedy text."""
  made = {name: small.lora(seed, latents=latents, positions=positions)
          for name, seed in (('stars', 1), ('law', 2))}
  experts = small.experts(**made)
  found = embed_prompt(experts, None, PROMPTS[1], choice)
  assert len(found.values) == len(PROMPTS[1]) + (3 if latents != 'refining' else 0)
  options = DecodingOptions(16, policy=ONCE if choice else NEVER)
  completion, = generate(experts.engine, [PROMPTS[1]], options, None,
                         experts.source([choice]) if choice else None)
  assert list(found.greedy) == completion.tokens
  assert read_greedily(found.values, 3) == completion.tokens[:3]
  plain = embed_prompt(experts, None, PROMPTS[1], None)
  assert bool(choice) == bool(found.experts)
  assert (np.abs(found.values[-3:] - plain.values[-3:]).max() > 0.05) == bool(choice)


def test_files(tmp_path):
  """The files hold the tensor, and say what it is and what an engine should answer."""
  found = embed_prompt(small.experts(stars=small.lora(1)), None, PROMPTS[0], 'stars')
  paths = export(tmp_path / 'out', found, 'tiny', 'f0')
  tensors = load_file(paths[0])
  assert list(tensors) == ['prompt_embeds']
  np.testing.assert_array_equal(tensors['prompt_embeds'], found.values)
  said = json.loads(paths[1].read_text())
  assert said['shape'] == [5, tiny.CONFIG.embed_dim] and said['experts'] == {'stars': 1.0}
  assert said['prompt_token_ids'] == PROMPTS[0]
  assert said['expected_greedy_token_ids'] == list(found.greedy)


def test_what_does_not_fit():
  """Latents that share a position, and prompts that are too short or too long, are refused."""
  shared = small.experts(stars=small.lora(1, latents='anchored', positions='share'))
  own = small.experts(stars=small.lora(1), bad=small.broken(small.lora(2)))
  for experts, prompt, choice, message in (
      (shared, PROMPTS[1], 'stars', "positions = 'share'"),
      (own, PROMPTS[1][:2], 'stars', 'the prompt has 2 tokens'),
      (own, [1] * 40, None, 'the prompt has 40 tokens'),
      (own, PROMPTS[1], 'bad', 'not finite'), (own, PROMPTS[1], 'moon', "no expert 'moon'")):
    with pytest.raises(UserError, match=message):
      embed_prompt(experts, None, prompt, choice)


@pytest.mark.parametrize('length', [1, 2])
def test_auto_leaves_a_short_prompt_plain(length, monkeypatch):
  """A prompt without room for latents keeps its own embeddings, whatever the router says."""
  experts = small.experts(stars=small.lora(1))
  monkeypatch.setattr(experts, 'route', lambda query: [{'stars': 1.0}])
  found = embed_prompt(experts, None, PROMPTS[1][:length], 'auto')
  plain = embed_prompt(experts, None, PROMPTS[1][:length], None)
  assert found.experts == {} and found.latents == {}
  np.testing.assert_array_equal(found.values, plain.values)
