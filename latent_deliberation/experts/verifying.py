"""Verifies an expert: its files, its decoder, that it leaves no trace, and that its scores hold."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_deliberation.errors import UserError
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.measuring import measure_again
from latent_deliberation.experts.package import Expert, load_package, read_sample
from latent_deliberation.files import as_path
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.policy import ONCE
from latent_deliberation.inference.session import DecodingOptions, generate

_PROMPT, _DECODED, _TEXTS = 48, 16, 4  # tokens of a prompt and after it, and prompts
ROUNDING = 1e-3  # nats by which logits may differ where latents are the base tokens


@dataclasses.dataclass(frozen=True)
class Check:
  """One thing that was checked.

  Attributes:
    what: what should be so.
    passed: whether it is; None where it could not be checked.
    found: details.
  """
  what: str
  passed: bool | None
  found: str

  def __str__(self):
    word = {True: 'ok', False: 'FAILED', None: 'not checked'}[self.passed]
    return f'{word}: {self.what}' + (f' ({self.found})' if self.found else '')


def verify(directory: Path, decoder: LoadedDecoder | None, decoder_dir: str = '',
           scores: bool = False) -> Iterator[Check]:
  """Yields what was checked, one thing after the other.

  A package that cannot be read, or is of another decoder, ends it.

  Args:
    directory: the package.
    decoder: its decoder; None leaves out what needs it.
    decoder_dir: where that decoder is; needed for `scores`.
    scores: whether to measure the scores of the card again.

  Raises:
    UserError: `scores` without a decoder.
  """
  if scores and decoder is None:
    raise UserError('--scores measures again, and needs --decoder')
  loaded: list[Expert] = []
  yield from _try('all files are those of the card, with sane headers and finite weights',
                  lambda: loaded.append(load_package(directory)))
  if not loaded:
    return
  expert, card = loaded[0], loaded[0].card
  if decoder is None:
    yield Check('the decoder is the one that it was made for', None, 'give --decoder')
    return
  attached: list[Experts] = []
  yield from _try(f'the decoder and its vocabulary are those it was made for, {card.base["name"]}',
                  lambda: attached.append(Experts(decoder, {card.name: expert}, strict=True,
                                                  length=_prompt_size(expert) + _DECODED + 8)))
  if not attached:
    return
  sample = read_sample(directory)
  yield from _check_traces(attached[0], expert, sample)
  if scores:
    yield from _check_scores(expert, sample, decoder_dir)


def _try(what: str, check: Callable[[], Any]) -> Iterator[Check]:
  try:
    check()
  except UserError as error:
    yield Check(what, False, str(error))
  else:
    yield Check(what, True, '')


def _prompt_size(expert: Expert) -> int:
  return max(_PROMPT, expert.coprocessor.config.first_anchor + 2)  # room for its latents


def _prompts(expert: Expert, sample: Mapping[str, Any] | None) -> list[list[int]]:
  """Returns prompts of its text, its own if there is any; random tokens without a sample."""
  vocab_size = expert.coprocessor.decoder_config.vocab_size
  size = _prompt_size(expert)
  if sample:
    own = sample.get(expert.card.name, next(iter(sample.values())))
    rows = own['tokens'][:_TEXTS, :size]
    if rows.shape[1] == size and 0 <= rows.min() and rows.max() < vocab_size:
      return rows.tolist()
  return np.random.default_rng(0).integers(4, vocab_size, (_TEXTS, size)).tolist()


def _check_traces(experts: Experts, expert: Expert, sample: Mapping[str, Any] | None,
                  ) -> Iterator[Check]:
  """Checks that the decoder alone is the same to the bit, before, beside and after the expert."""
  name, prompts = expert.card.name, _prompts(expert, sample)
  state = experts.engine.read(prompts)

  def bits(choice: Any) -> list[bytes]:
    source = experts.source([choice] * len(prompts))
    options = DecodingOptions(_DECODED, policy=ONCE)
    return [np.array([*each.tokens, *each.logprobs]).tobytes()
            for each in generate(experts.engine, state, options, source=source)]

  plain, held = bits(None), jax.tree.map(np.array, state)
  augmented = bits(name)
  yield Check('its latents change what the decoder says', augmented != plain, '')
  yield Check('with a weight of zero the decoder is the same to the bit',
              bits({name: 0.0}) == plain, '')
  experts.detach(name)
  same = jax.tree.all(jax.tree.map(
      lambda one, other: np.array_equal(np.asarray(one), other), state, held))
  yield Check('detached, the decoder is the same to the bit', bits(None) == plain and same, '')
  yield _check_zero_gate(experts, expert, state)


def _check_zero_gate(experts: Experts, expert: Expert, state: State) -> Check:
  """Checks that with a gate of zero, latents are the tokens that they replace."""
  what = 'with a gate of zero the decoder predicts the same'
  if expert.coprocessor.config.latents != 'refining':
    return Check(what, None, 'only refining latents replace tokens')
  params = expert.coprocessor.params
  closed = dataclasses.replace(expert.coprocessor, params={
      **params, 'gate': np.zeros_like(params['gate'])})
  experts.attach('closed', closed)  # nothing else is attached now
  found = experts.augment(state, [{'closed': 1.0}] * len(state.position))
  difference = float(np.abs(np.asarray(found.logits) - np.asarray(state.logits)).max())
  return Check(what, difference <= ROUNDING, f'logits differ by {difference:.1e} at most')


def _check_scores(expert: Expert, sample: Mapping[str, Any] | None, decoder_dir: str,
                  ) -> Iterator[Check]:
  if not sample:
    yield Check('its scores hold', None, 'the package has no sample of its text')
    return
  results: dict[str, Any] = {}
  yield from _try('its scores can be measured again', lambda: results.update(measure_again(
      expert, sample, as_path(decoder_dir))))
  for text in expert.card.scores.keys() - sample.keys():
    yield Check(f'its scores on {text} text hold', None, 'the package has no sample of this text')
  for text, found in results.items():
    arms = ', '.join(f'{arm} {found["card"].get(arm, float("nan")):+.3f} in the card and '
                     f'{nats:+.3f} now' for arm, nats in found['now'].items())
    yield Check(f'its scores on {text} text hold', found['holds'], arms)
