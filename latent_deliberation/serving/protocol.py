"""Requests of OpenAI's completions API as JSON, checked before any work, and their answers.

Three keys are ours: `top_k`, `min_p`, and `score_with`, which names a second model whose
log-probabilities of the same tokens are returned as well. A model is NAME for the plain decoder,
NAME+EXPERT, NAME+a:0.5,b:0.5 or NAME+auto.
"""

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latent_deliberation.errors import UserError, check_integer, check_number
from latent_deliberation.experts.attach import Choice, Experts
from latent_deliberation.experts.card import AUTO
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.tokenizer import Tokenizer, stop_at
from latent_deliberation.serving.batcher import TextRequest, Token
from latent_deliberation.serving.decode_batch import MOST_TOP
from latent_deliberation.serving.expert_guard import Report

MOST_STOPS, MOST_STOP_CHARACTERS = 8, 200
MOST_EXPERTS = 8  # in one mix
# Keys that other servers know, and the values of them that change nothing here.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    'best_of': (None, 1), 'echo': (None, False), 'suffix': (None, ''), 'logit_bias': (None, {}),
    'presence_penalty': (None, 0), 'frequency_penalty': (None, 0)}
_IGNORED = ('user',)


class RequestError(Exception):
  """A request that is refused.

  Attributes:
    status: status of HTTP.
    param: key that is wrong; None where it is none.
    code: short name of the error, as OpenAI has them.
  """

  def __init__(self, status: int, message: str, param: str | None = None, code: str = ''):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code

  def to_json(self) -> dict[str, Any]:
    """Returns the body of the answer."""
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    return {'error': {'message': str(self), 'type': kind, 'param': self.param,
                      'code': self.code or None}}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request may ask for.

  Attributes:
    length: tokens of a text, prompt included.
    texts: texts of one request.
    body: bytes of a request.
    rows: rows of the batch. A text takes one, and another one for `score_with`.
  """
  length: int
  texts: int
  body: int
  rows: int


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
  """A checked request.

  Attributes:
    model: the model as it was written.
    texts: texts to decode, those of one prompt next to each other.
    stop: strings that end a text.
    streamed: whether tokens are sent as they come.
    wants_logprobs: number of likely tokens to report beside each token; None for no logprobs.
    includes_usage: whether a stream ends with the numbers of tokens.
  """
  model: str
  texts: tuple[TextRequest, ...]
  stop: tuple[str, ...]
  streamed: bool
  wants_logprobs: int | None
  includes_usage: bool


class Reader:
  """Turns bodies of requests into checked requests."""

  def __init__(self, name: str, experts: Experts, tokenizer: Tokenizer, limits: Limits):
    """Reads requests for the decoder `name` with these experts."""
    self.name, self.experts, self.tokenizer, self.limits = name, experts, tokenizer, limits

  def read(self, body: bytes) -> CompletionRequest:
    """Returns the request in a body. Raises RequestError where it is bad."""
    values = _parse(body)
    self._check_keys(values)
    model = _get(values, 'model', str, None)
    if model is None:
      raise RequestError(400, 'model is missing: GET /v1/models lists the models', 'model')
    choices = [self.choice(model, 'model')]
    other = _get(values, 'score_with', str, None)
    if other is not None:
      choices.append(self.choice(other, 'score_with'))
      if len(choices) > self.limits.rows:
        raise RequestError(400, 'score_with needs a second row of the batch, and this server has '
                           'one: leave it out, or start the server with --rows=2', 'score_with')
    count, logprobs = _integer(values, 'n', 1, 1, self.limits.texts), values.get('logprobs')
    if logprobs is not None:
      logprobs = _integer(values, 'logprobs', 0, 0, MOST_TOP)
    stop = self._stop(values.get('stop'))
    try:
      ends = stop_at(self.tokenizer, stop)
      sampling = Sampling(
          _number(values, 'temperature', 1.0), _integer(values, 'top_k', 0, 0, 2**31 - 1) or None,
          _number(values, 'top_p', 1.0), _number(values, 'min_p', 0.0))
    except UserError as error:
      raise RequestError(400, str(error)) from error
    seed = values.get('seed')
    seed = secrets.randbits(32) if seed is None else _integer(values, 'seed', 0, 0, 2**32 - 1)
    max_tokens = _integer(values, 'max_tokens', 16, 1, self.limits.length)
    texts = [
        TextRequest(ids, text, tuple(choices), sampling, (seed + number) % 2**32, max_tokens, ends,
                    bool(logprobs))
        for ids, text in self._prompts(values) for number in range(count)]
    self._check_texts(texts)
    usage = (_get(values, 'stream_options', dict, None) or {}).get('include_usage') is True
    return CompletionRequest(model, tuple(texts), stop, bool(_get(values, 'stream', bool, False)),
                             logprobs, usage)

  def choice(self, model: str, key: str) -> Choice:
    """Returns what a model's name asks for: the part after NAME+.

    Raises:
      RequestError: the model or an expert of it is unknown, or it is malformed.
    """
    name, plus, spec = model.partition('+')
    if name != self.name:
      raise RequestError(404, f'{key} = {model!r:.120}: this server has {self.name!r}, and '
                         'GET /v1/models lists it with its experts', key, 'model_not_found')
    if not plus or spec == AUTO:
      return AUTO if plus else None
    mix = {}
    for part in spec.split(','):
      expert, colon, weight = part.partition(':')
      if expert not in self.experts.names:
        raise RequestError(404, f'{key} = {model!r:.120}: there is no expert {expert!r:.80}. '
                           'GET /v1/models lists those that are attached', key, 'model_not_found')
      if expert in mix or len(mix) == MOST_EXPERTS:
        raise RequestError(400, f'{key} = {model!r:.120}: name an expert once, and at most '
                           f'{MOST_EXPERTS} of them', key)
      mix[expert] = _weight(weight, model, key) if colon else 1.0
    try:
      return self.experts.mix(mix) or None  # without weights of zero, which are no expert
    except UserError as error:
      raise RequestError(400, str(error), key) from error

  def _check_keys(self, values: Mapping[str, Any]) -> None:
    known = {'model', 'prompt', 'max_tokens', 'n', 'temperature', 'top_p', 'top_k', 'min_p', 'seed',
             'stop', 'stream', 'stream_options', 'logprobs', 'score_with', *_NEUTRAL, *_IGNORED}
    unknown = sorted(values.keys() - known)
    if unknown:
      raise RequestError(400, f'{unknown[0]!r:.80} is no key of a request; known are '
                         f'{sorted(known)}', ascii(unknown[0][:80])[1:-1])
    for key, neutral in _NEUTRAL.items():
      # True equals 1, and is no number.
      if key in values and not any(values[key] == each and type(values[key]) in (type(each), float)
                                   for each in neutral):
        raise RequestError(400, f'{key} = {values[key]!r:.80}: this server has no {key}; leave it '
                           'out', key)

  def _prompts(self, values: Mapping[str, Any]) -> list[tuple[list[int], str]]:
    """Returns ids and text of each prompt: a text, ids, or a list of either."""
    prompt = values.get('prompt')
    if isinstance(prompt, str) or _are_ids(prompt):
      prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > self.limits.texts:
      raise RequestError(400, f'prompt = {prompt!r:.80}: give a text, a list of 1 to '
                         f'{self.limits.texts} texts, or ids in the place of a text', 'prompt')
    return [self._prompt(each) for each in prompt]

  def _prompt(self, prompt: Any) -> tuple[list[int], str]:
    if _are_ids(prompt):
      bad = [each for each in prompt if not 0 <= each < self.tokenizer.size]
      if bad:
        raise RequestError(400, f'prompt has the id {_shown(bad[0])}: the tokenizer has 0 to '
                           f'{self.tokenizer.size - 1}', 'prompt')
      self._check_room(len(prompt))
      return list(prompt), self.tokenizer.decode(prompt)
    if not isinstance(prompt, str):
      raise RequestError(400, f'prompt = {prompt!r:.80}: give a text, or a list of ids', 'prompt')
    # No token is longer than 256 characters or so; a text that cannot fit is not tokenised at all.
    self._check_room(len(prompt) // 256)
    try:
      prompt.encode()
    except UnicodeEncodeError:
      raise RequestError(400, f'prompt = {prompt!r:.80} is no Unicode text', 'prompt') from None
    return self.tokenizer.encode(prompt), prompt

  def _check_texts(self, texts: Sequence[TextRequest]) -> None:
    """Raises RequestError where there are too many texts, or one is too long or too short."""
    if len(texts) > self.limits.texts:
      raise RequestError(400, f'{len(texts)} texts of prompt and n: this server gives at most '
                         f'{self.limits.texts} in one answer', 'n')
    for text in texts:
      self._check_room(len(text.ids) + text.max_tokens)
      needed = max((self.experts.first_anchor + 1 for choice in text.choices
                    if choice and choice != AUTO), default=1)
      if len(text.ids) < needed:
        raise RequestError(400, f'a prompt has {len(text.ids)} tokens, but latents of an expert '
                           f'replace its last {needed}: give a longer prompt, or no expert',
                           'prompt')

  def _check_room(self, tokens: int) -> None:
    if tokens > self.limits.length:
      raise RequestError(400, f'a prompt and its max_tokens take {tokens} tokens, and a text has '
                         f'room for {self.limits.length}: shorten the prompt, or ask for fewer '
                         'tokens', 'prompt', 'context_length_exceeded')

  def _stop(self, stop: Any) -> tuple[str, ...]:
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(
        isinstance(each, str) and 0 < len(each) <= MOST_STOP_CHARACTERS for each in stop):
      raise RequestError(400, f'stop = {stop!r:.80}: give up to {MOST_STOPS} texts of 1 to '
                         f'{MOST_STOP_CHARACTERS} characters', 'stop')
    return tuple(stop)


def _parse(body: bytes) -> dict[str, Any]:
  try:
    values = json.loads(body, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    raise RequestError(400, f'the body is no JSON ({type(error).__name__})') from None
  if not isinstance(values, dict):
    raise RequestError(400, 'the body is no JSON object')
  return values


def _refuse(constant: str) -> None:
  raise ValueError(f'{constant} is no number of JSON')


def _are_ids(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(
      isinstance(each, int) and not isinstance(each, bool) for each in value)


def _get(values: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
  value = values.get(key)
  if value is None:
    return default
  if not isinstance(value, kind):
    raise RequestError(400, f'{key} = {value!r:.80}: give a {kind.__name__}', key)
  return value


def _shown(number: int) -> str:
  """Returns a number for a message, which a client may have made very long."""
  return str(number) if number.bit_length() <= 64 else f'a number of {number.bit_length()} bits'


def _integer(values: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
  return _checked(values, key, default, lambda value: check_integer(key, value, least, most))


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
  return _checked(values, key, default, lambda value: check_number(key, value, 0))


def _checked(values: Mapping[str, Any], key: str, default: Any,
             check: Callable[[Any], None]) -> Any:
  value = default if values.get(key) is None else values[key]
  if isinstance(value, int) and value.bit_length() > 64:
    raise RequestError(400, f'{key} = {_shown(value)}: give a number of at most 64 bits', key)
  try:
    check(value)
  except UserError as error:
    raise RequestError(400, f'{str(error):.200}', key) from None
  return value


def _weight(written: str, model: str, key: str) -> float:
  try:
    weight = float(written)
  except ValueError:
    weight = math.nan
  if not -10 <= weight <= 10:
    raise RequestError(400, f'{key} = {model!r:.120}: a weight is a number from -10 to 10', key)
  return weight


# --- Answers ---


@dataclasses.dataclass
class Scored:
  """What a choice of an answer says of its tokens: a piece of text and log-probabilities each."""
  pieces: list[str] = dataclasses.field(default_factory=list)
  tokens: list[Token] = dataclasses.field(default_factory=list)

  def to_json(self, tokenizer: Tokenizer, most: int, offset: int, scored_with: bool,
              ) -> dict[str, Any]:
    """Returns the value of 'logprobs'.

    Args:
      most: number of likely tokens to report.
      offset: characters of the text before these tokens.
      scored_with: whether there are log-probabilities by a second model.
    """
    offsets = []
    for piece in self.pieces:
      offsets.append(offset)
      offset += len(piece)
    content = {
        'tokens': self.pieces, 'token_logprobs': [token.logprob for token in self.tokens],
        'top_logprobs': [_likely(tokenizer, token, most) for token in self.tokens]
        if most else None,
        'text_offset': offsets}
    if scored_with:
      content['score_with'] = [token.other_logprob for token in self.tokens]
    return content


def _likely(tokenizer: Tokenizer, token: Token, most: int) -> dict[str, float]:
  """Returns log-probabilities by text, of the likeliest tokens and of the one that was taken."""
  found: dict[str, float] = {}
  before = tokenizer.encode('a')
  # Several tokens may have one text, such as parts of a character. The likeliest of them stays.
  for number, logprob in (*token.top[:most], (token.id, token.logprob)):
    # A text comes before, so that a first space counts.
    found.setdefault(tokenizer.decode([number], before), logprob)
  return found


def latents_to_json(report: Report) -> dict[str, Any]:
  """Returns what became of latents: the experts, the router's scores, and a fault or None."""
  return {'experts': dict(report.experts), 'scores': report.scores, 'fault': report.fault or None}


def new_answer(model: str) -> dict[str, Any]:
  """Returns the beginning of an answer, which all parts of a stream repeat."""
  return {'id': f'cmpl-{secrets.token_hex(12)}', 'object': 'text_completion',
          'created': int(time.time()), 'model': model}


def usage(texts: Sequence[TextRequest], decoded: int) -> dict[str, int]:
  """Returns the numbers of tokens; a prompt is counted once for each of its texts."""
  read = sum(len(text.ids) for text in texts)
  return {'prompt_tokens': read, 'completion_tokens': decoded, 'total_tokens': read + decoded}


def finish_reason(ended_by: str) -> str:
  """Returns OpenAI's name of an end; 'ended_by' beside it has our own."""
  return 'stop' if ended_by in ('eos', 'stop') else 'length'
