"""transformers continues exported embeddings as our decoder continues its latents.

Needs torch and transformers: pip install -e '.[parity]'. Skipped if they are not installed. The
real models are packages, see docs/gemma.md.
"""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from latent_deliberation import api  # noqa: E402
from latent_deliberation.deliberation.coprocessor_checkpoint import (  # noqa: E402
  CoprocessorCheckpoint,
)
from latent_deliberation.errors import UserError  # noqa: E402
from latent_deliberation.experts.attach import Experts  # noqa: E402
from latent_deliberation.experts.prompt_embeds import embed_prompt  # noqa: E402
from latent_deliberation.inference import passes  # noqa: E402
from latent_deliberation.inference.engine import LoadedDecoder  # noqa: E402
from latent_deliberation.model import weights  # noqa: E402
from latent_deliberation.model.decoder import fingerprint  # noqa: E402
from tests import tiny  # noqa: E402
from tests.parity import tiny_models  # noqa: E402


def random_expert(config, decoder_params, decoder, spread, **choices):
  """Random adapters of a decoder, whose latents differ much from the embeddings below them."""
  deliberator = tiny.deliberator(config, trainable='lora', num_latents=4, **choices)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  params = {**params, 'soft_tokens': params['soft_tokens'] * spread,
            **({'gate': params['gate'] * spread} if 'gate' in params else {})}
  return CoprocessorCheckpoint(config, deliberator.config, decoder.fingerprint,
                               decoder.tokenizer.hash, steps=1, params=params)


def continued(model, found):
  """The greedy tokens of transformers after exported embeddings."""
  values = torch.tensor(found.values)[None]
  tokens = model.generate(
      inputs_embeds=values, attention_mask=torch.ones(values.shape[:2], dtype=torch.long),
      do_sample=False, max_new_tokens=len(found.greedy), eos_token_id=None)
  return tokens[0].tolist()


def compare(experts, model, prompt, choice):
  """Asserts the same tokens, for the prompt's own embeddings and with latents."""
  plain, latents = (embed_prompt(experts, None, prompt, each) for each in (None, choice))
  assert continued(model, plain) == list(plain.greedy)
  assert continued(model, latents) == list(latents.greedy)
  assert latents.greedy != plain.greedy


@pytest.mark.parametrize('name', ['gemma3', 'llama3', 'gemma2', 'qwen3'])
@pytest.mark.parametrize('latents, positions', [('refining', 'share'), ('anchored', 'shift')])
def test_tiny_models(name, latents, positions, tmp_path):
  """Windows are shorter than the prompt, and every feature of the architecture shows."""
  tiny_models.build(name, 7).save_pretrained(tmp_path)
  config, params = weights.load(tmp_path)
  unstacked = {**params, 'transformer': passes.unstack(params['transformer'])}
  decoder = LoadedDecoder(config, unstacked, fingerprint(params), SimpleNamespace(hash='v0'))
  expert = random_expert(config, params, decoder, 1.0, latents=latents, positions=positions)
  experts = Experts(decoder, {'stars': expert}, length=64, strict=True)
  model = tiny_models.load(tmp_path, torch.float32).eval()
  prompt = tiny_models.draw_tokens(3, 24)[0].tolist()
  compare(experts, model, prompt, {'stars': 0.5} if latents == 'refining' else 'stars')


@pytest.mark.gemma
@pytest.mark.parametrize('name', ['gemma3-270m', 'smollm2-135m'])
def test_real_models(name, tmp_path):
  """The published weights, in float32 on both sides."""
  try:
    decoder = api.load_decoder(name)
  except UserError as error:
    pytest.skip(str(error))
  config, params = weights.load(weights.open_checkpoint(name).directory)
  weights.save(tmp_path / 'hf', config, params, format='huggingface')
  expert = random_expert(config, params, decoder, 0.02)
  experts = Experts(decoder, {'stars': expert}, length=128, strict=True)
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
  prompt = decoder.tokenizer.encode('The Moon is the only natural satellite of')
  plain, latents = (embed_prompt(experts, None, prompt, each) for each in (None, 'stars'))
  assert continued(model, plain) == list(plain.greedy)
  assert continued(model, latents) == list(latents.greedy)
  moved = np.abs(latents.values - plain.values).max(axis=1)
  assert (moved > 0).sum() == 4
