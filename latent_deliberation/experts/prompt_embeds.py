"""A prompt with latents as input embeddings, for engines that know nothing of experts.

vLLM takes them as `prompt_embeds`, transformers as `inputs_embeds`. The engine reads them as it
would read tokens, at positions 0, 1, 2, ... So refining latents, which have the places of the last
tokens, fit as they are. Latents after the prompt fit if they move the tokens after them on
(positions 'shift'); those that share the position of the last token do not.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from latent_deliberation.errors import UserError
from latent_deliberation.experts.attach import Choice, Experts, Mix
from latent_deliberation.files import write_json, write_whole
from latent_deliberation.inference import passes
from latent_deliberation.inference.prompt_arrays import check_room
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.inference.tokenizer import Tokenizer

EMBEDS = 'prompt_embeds'  # name of the tensor, and of vLLM's argument
CHECKED = 16  # greedy tokens that an export says an engine should give


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
  """Input embeddings of a prompt.

  Attributes:
    values: float32 [T, D], as the first layer takes them: scaled, where the model scales them.
    ids: tokens of the prompt.
    experts: weight by name of the experts of the latents; empty for the prompt's own embeddings.
    latents: number and form of the latents; empty without.
    greedy: the likeliest tokens after the prompt, as this decoder gives them.
  """
  values: np.ndarray
  ids: tuple[int, ...]
  experts: Mix
  latents: Mapping[str, Any]
  greedy: tuple[int, ...]


def embed_prompt(experts: Experts, tokenizer: Tokenizer | None, prompt: str | list[int],
                 choice: Choice) -> PromptEmbeds:
  """Returns the embeddings of a prompt, with the latents of experts at its end.

  Args:
    tokenizer: turns a prompt of text into ids; None where ids are given.
    choice: which experts; None for the prompt's own embeddings, a test of the engine.

  Raises:
    UserError: the prompt is too long or too short, or the latents share a position.
  """
  ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
  engine = experts.engine
  check_room(np.array([len(ids)]), CHECKED, engine.model.plan.global_slots, ['the prompt'])
  source = experts.source([choice], [prompt if isinstance(prompt, str) else ''])
  experts.check_lengths(source.mixes, np.array([len(ids)]), ['the prompt'])
  state = engine.read([ids])
  mix = source.mixes[0] if source.wants(state)[0] else {}
  embed = lambda tokens: np.asarray(  # noqa: E731
      passes.embed(engine.model, engine.weights, jnp.asarray([tokens], jnp.int32))[0], np.float32)
  values, latents = embed(ids), {}
  if mix:
    config = experts.latents
    _check_positions(config.latents, config.positions)
    outputs = experts.outputs(state, [mix])
    augmentation = experts.read_latents(state, outputs)
    if not bool(augmentation.finite.all()):
      raise UserError(f'the latents of {list(mix)} are not finite: verify the experts')
    values = _with_latents(values, np.asarray(outputs[0], np.float32), config.latents)
    latents = {'number': config.num_latents, 'form': config.latents}
    state = engine.attach(state, augmentation)
  completion, = generate(engine, state, DecodingOptions(CHECKED))
  return PromptEmbeds(values, tuple(ids), mix, latents, tuple(completion.tokens))


def _check_positions(latents: str, positions: str) -> None:
  if latents != 'refining' and positions == 'share':
    raise UserError(f"these experts have {latents} latents with positions = 'share', which all "
                    'have the position of the last token. Other engines count positions on: '
                    "export experts with refining latents, or with positions = 'shift'")


def _with_latents(values: np.ndarray, outputs: np.ndarray, form: str) -> np.ndarray:
  """Returns embeddings [T, D] with latents in the place of the last tokens, or after them."""
  if form == 'refining':
    return np.concatenate([values[:-len(outputs)], values[-len(outputs):] + outputs])
  base = values[-1] if form == 'anchored' else 0
  return np.concatenate([values, base + outputs])


def export(directory: Path, found: PromptEmbeds, decoder_name: str, fingerprint: str) -> list[Path]:
  """Writes prompt_embeds.safetensors, and prompt_embeds.json which says what they are.

  Returns: the two paths.
  """
  paths = [directory / f'{EMBEDS}.{end}' for end in ('safetensors', 'json')]
  write_whole(paths[0], save({EMBEDS: np.ascontiguousarray(found.values)}))
  write_json(paths[1], {
      'format': EMBEDS, 'tensor': EMBEDS, 'shape': list(found.values.shape), 'dtype': 'float32',
      'decoder': {'name': decoder_name, 'fingerprint': fingerprint},
      'experts': dict(found.experts), 'latents': dict(found.latents),
      'prompt_token_ids': list(found.ids), 'scaled': True,
      'expected_greedy_token_ids': list(found.greedy)})
  return paths
