"""Chains are what the decoder would write by itself, and all of them end in the same sign."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.inference.generator import Generator
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.studies.scoring import write_chains
from tests import tiny

CONFIG = TransformerConfig(vocab_size=7, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1,
                           head_dim=8, hidden_dim=8)
PROMPTS = [[2, 3], [2, 4, 5, 6, 3], [2, 5], [2, 6, 6], [2, 3, 4]]
EOS, LONGEST = 1, 6


@pytest.fixture(scope='module')
def decoder():
  params = nn.unbox(Decoder(CONFIG).init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32)))['params']
  return params, Generator(CONFIG, params, length=16)


def greedy(params, prompt):
  """Tokens of the plain decoder, one full pass for each, over what no earlier token sees."""
  tokens = list(prompt)
  for _ in range(LONGEST):
    padded = jnp.array([tokens + [2] * (16 - len(tokens))])
    _, logits, _ = tiny.read(params, padded, config=CONFIG)
    tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
  return tokens[len(prompt):]


def test_a_chain_is_the_greedy_text_up_to_the_sign_or_with_it_put_behind(decoder):
  params, generator = decoder
  written = [greedy(params, prompt) for prompt in PROMPTS]
  sign = written[0][2:4]  # so that one chain at least comes to it
  chains = write_chains(generator, PROMPTS, sign, LONGEST, 2, EOS)
  came = 0
  for chain, text in zip(chains, written, strict=True):
    assert chain[-2:] == sign
    ends = [n for n in range(2, LONGEST + 1) if text[n - 2:n] == sign]
    text = text[:text.index(EOS)] if EOS in text and not ends else text
    assert chain == (text[:ends[0]] if ends else [*text, *sign])
    came += bool(ends)
  assert came


def test_the_batch_that_a_prompt_is_in_changes_nothing(decoder):
  _, generator = decoder
  together = write_chains(generator, PROMPTS, [3, 4], LONGEST, 5, EOS)
  assert [write_chains(generator, [prompt], [3, 4], LONGEST, 1, EOS)[0]
          for prompt in PROMPTS] == together
  assert np.all([chain[-2:] == [3, 4] for chain in together])
