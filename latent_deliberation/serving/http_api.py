"""The HTTP API: completions, models, health, metrics, and the page, over one batcher.

Nothing in a request names a file or a host. A request is read up to a limit of bytes and of time,
is checked whole before any work, and gives its texts up when its client has gone.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latent_deliberation.evaluation.perplexity import SHUFFLED
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.card import AUTO, GENERAL, gain_on
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.serving.batcher import (
  CANCELLED,
  ERROR,
  SHUTDOWN,
  TIME,
  Batcher,
  Closed,
  Job,
  QueueFull,
  Update,
)
from latent_deliberation.serving.protocol import (
  CompletionRequest,
  Limits,
  Reader,
  RequestError,
  Scored,
  finish_reason,
  latents_to_json,
  new_answer,
  usage,
)
from latent_deliberation.serving.service_metrics import CONTENT_TYPE, ServiceMetrics
from latent_deliberation.serving.text_stream import TextStream

BODY_SECONDS = 10.0  # time in which the body of a request must have come
_RETRY = {'retry-after': '1'}
_FAILED = 500, 'the server failed; its log says why'
_GONE = -1  # number of no text: the client has gone


@dataclasses.dataclass(frozen=True)
class Service:
  """What the API needs.

  Attributes:
    name: name of the decoder, as requests give it.
    experts: the experts, which may change while the server runs.
    tokenizer: tokenizer of the decoder.
    batcher: decodes the texts.
    limits: what one request may ask for.
    metrics: counts what happens.
    key: key that requests must have; '' for none.
    hosts: names by which clients may reach the server; ('*',) for any.
  """
  name: str
  experts: Experts
  tokenizer: Tokenizer
  batcher: Batcher
  limits: Limits
  metrics: ServiceMetrics
  key: str = ''
  hosts: tuple[str, ...] = ('127.0.0.1', 'localhost', '[::1]')


def build_app(service: Service) -> ASGIApp:
  """Returns the application of a service."""
  api = Api(service)
  routes = [
      Route('/', api.page), Route('/health', api.health), Route('/metrics', api.metrics),
      Route('/v1/models', api.models), Route('/v1/models/{model:path}', api.model),
      Route('/v1/completions', api.completions, methods=['POST'])]
  # Another site's page may reach a server on this machine by a name of its own, and then reads what
  # it answers. So only known names are served.
  middleware = [Middleware(_Counting, metrics=service.metrics),
                Middleware(TrustedHostMiddleware, allowed_hosts=list(service.hosts),
                           www_redirect=False)]
  handlers = {RequestError: _refuse, HTTPException: _refuse_path, Exception: _fail}
  return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class Api:
  """The endpoints."""

  def __init__(self, service: Service):
    self._service = service
    self._reader = Reader(service.name, service.experts, service.tokenizer, service.limits)
    self._begun = int(time.time())

  async def page(self, request: Request) -> Response:
    """The page for people."""
    html, policy = _page()
    return HTMLResponse(html, headers={'content-security-policy': policy})

  async def health(self, request: Request) -> Response:
    """Whether texts are taken, and how many are here."""
    batcher = self._service.batcher
    return JSONResponse({'status': 'ok' if batcher.is_open else 'closed',
                         'queued': batcher.queued, 'running': batcher.running},
                        200 if batcher.is_open else 503)

  async def metrics(self, request: Request) -> Response:
    """Counts and times, as Prometheus reads them."""
    self._check_key(request)
    return Response(self._service.metrics.render(), media_type=CONTENT_TYPE)

  async def models(self, request: Request) -> Response:
    """The decoder alone, with each expert, and with the router's choice."""
    self._check_key(request)
    return JSONResponse({'object': 'list', 'data': self._models()})

  async def model(self, request: Request) -> Response:
    """One of them."""
    self._check_key(request)
    name = request.path_params['model']
    for model in self._models():
      if model['id'] == name:
        return JSONResponse(model)
    raise RequestError(404, f'there is no model {name!r:.120}', 'model', 'model_not_found')

  async def completions(self, request: Request) -> Response:
    """Continues prompts."""
    self._check_key(request)
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    # A page of another site may send any other type without being asked.
    if kind != 'application/json':
      raise RequestError(415, f'content-type = {kind!r:.80}: send application/json')
    try:
      body = await _body_of(request, self._service.limits.body)
    except ClientDisconnect:
      return Response(status_code=400)
    asked = self._reader.read(body)
    answer = Answer(self._service, asked)
    answer.begin()
    watch = asyncio.ensure_future(answer.watch(request.receive))
    try:
      await answer.wait()
      if asked.streamed:
        return _EventStream(answer, watch)
      while not answer.is_complete:
        await answer.take()
      return JSONResponse(answer.whole())
    except ClientDisconnect:
      return Response(status_code=499)
    finally:
      if not asked.streamed or not answer.has_news:
        watch.cancel()
        answer.cancel()

  def _check_key(self, request: Request) -> None:
    given = request.headers.get('authorization', '').removeprefix('Bearer ')
    if self._service.key and not hmac.compare_digest(given.encode(), self._service.key.encode()):
      raise RequestError(401, 'the key is missing or wrong: send "Authorization: Bearer KEY"',
                         code='invalid_api_key')

  def _models(self) -> list[dict[str, Any]]:
    name, experts = self._service.name, self._service.experts
    names = experts.names
    found = [{'id': name}]
    for expert in names:
      found.append({'id': f'{name}+{expert}', 'expert': _describe(experts, expert)})
    if names:
      found.append({'id': f'{name}+{AUTO}'})
    shared = {'object': 'model', 'created': self._begun, 'owned_by': 'latent_deliberation'}
    return [{**model, **shared} for model in found]


def _describe(experts: Experts, name: str) -> dict[str, Any]:
  """Returns what the card of an expert says, for people who choose one."""
  card = experts.card(name)
  if card is None:
    return {'name': name, 'description': 'A coprocessor without a card.'}
  return {
      'name': name, 'address': card.address, 'description': card.description,
      'licence': card.licence, 'gains': card.gains, 'gain': card.gain,
      'shuffled': gain_on(card.scores.get(card.name), SHUFFLED),
      'general': gain_on(card.scores.get(GENERAL)), 'keywords': list(card.keywords[:20]),
      'latents': dict(card.latents)}


class Answer:
  """The texts of one request, as they come.

  Attributes:
    has_news: whether a text has begun or ended, so that the answer can begin.
  """

  def __init__(self, service: Service, asked: CompletionRequest):
    self._service, self._asked, self.has_news = service, asked, False
    self._news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    self._head = new_answer(asked.model)
    self._jobs: list[Job] = []
    self._choices = [_Choice(number, service.tokenizer, asked)
                     for number in range(len(asked.texts))]
    self._waiting: list[tuple[int, Update]] = []

  def begin(self) -> None:
    """Hands the texts to the batcher. Raises RequestError where it takes none."""
    loop = asyncio.get_running_loop()

    def emit(number: int, update: Update) -> None:
      with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(self._news.put_nowait, (number, update))

    try:
      self._jobs = self._service.batcher.submit(
          self._asked.texts,
          [functools.partial(emit, number) for number in range(len(self._asked.texts))])
    except QueueFull:
      raise RequestError(429, 'the queue of this server is full: ask again later',
                         code='queue_full') from None
    except Closed:
      raise RequestError(503, 'this server ends: ask another one', code='closed') from None

  @property
  def is_complete(self) -> bool:
    """Whether all texts have ended."""
    return all(choice.ended_by for choice in self._choices)

  def cancel(self) -> None:
    """Gives up the texts that have not ended."""
    for job in self._jobs:
      job.cancel()

  async def watch(self, receive: Receive) -> None:
    """Waits until the client has gone, and says so to whoever takes the news."""
    while (await receive())['type'] != 'http.disconnect':
      pass
    self._news.put_nowait((_GONE, Update()))

  async def wait(self) -> None:
    """Waits for the first news, so that an answer that fails at once gets a status of its own."""
    number, update = await self._news.get()
    if number == _GONE:
      raise ClientDisconnect
    if update.ended_by in (TIME, ERROR, SHUTDOWN, CANCELLED) and not update.tokens:
      raise RequestError(*{
          TIME: (503, 'the time of this request was over before its text began'),
          ERROR: _FAILED}.get(update.ended_by, (503, 'this server ends: ask another one')))
    self.has_news = True
    self._waiting.append((number, update))

  async def take(self) -> dict[str, Any]:
    """Returns the next news as a part of a stream. Raises ClientDisconnect if nobody reads."""
    number, update = self._waiting.pop() if self._waiting else await self._news.get()
    if number == _GONE:
      raise ClientDisconnect
    if update.ended_by == ERROR:  # a cut text must not look like a whole one
      raise RequestError(*_FAILED)
    return {**self._head, 'choices': [self._choices[number].take(update)]}

  def usage(self) -> dict[str, int]:
    """Returns the numbers of tokens so far."""
    return usage(self._asked.texts, sum(len(choice.scored.tokens) for choice in self._choices))

  def whole(self) -> dict[str, Any]:
    """Returns all texts, once they have ended."""
    return {**self._head, 'choices': [choice.whole() for choice in self._choices],
            'usage': self.usage()}

  async def events(self) -> AsyncIterator[bytes]:
    """Yields the parts of a stream as server-sent events."""
    while not self.is_complete:
      try:
        yield _event(await self.take())
      except ClientDisconnect:
        return
      except RequestError as error:
        yield _event(error.to_json())
        return
    if self._asked.includes_usage:
      yield _event({**self._head, 'choices': [], 'usage': self.usage()})
    yield b'data: [DONE]\n\n'


class _Choice:
  """One text of an answer."""

  def __init__(self, number: int, tokenizer: Tokenizer, asked: CompletionRequest):
    self.scored, self.ended_by = Scored(), ''
    self._number, self._tokenizer, self._asked = number, tokenizer, asked
    text = asked.texts[number]
    self._two = len(text.choices) > 1
    self._stream = TextStream(tokenizer, text.ids, asked.stop)
    self._latents: dict[str, Any] = {}

  def take(self, update: Update) -> dict[str, Any]:
    """Takes news in, and returns them as a choice of a stream."""
    if update.reports:
      own, *other = map(latents_to_json, update.reports)
      self._latents = {'latents': own, **({'score_with_latents': other[0]} if other else {})}
    self.ended_by, offset = update.ended_by, len(self._stream.text)
    pieces = []
    for number, token in enumerate(update.tokens, 1):
      is_end = update.ended_by == 'eos' and number == len(update.tokens)
      pieces.append('' if is_end else self._stream.add(token.id))
    before = len(self._stream.text)
    text = self._stream.end(update.ended_by) if update.ended_by else self._stream.give()
    if pieces:  # a character that was never completed belongs to the last token
      pieces[-1] += self._stream.text[before:]
    self.scored.pieces += pieces
    self.scored.tokens += update.tokens
    part = self._content(text, Scored(pieces, list(update.tokens)), offset)
    return {**part, **self._latents} if update.reports else part

  def whole(self) -> dict[str, Any]:
    """Returns the whole choice."""
    return {**self._content(self._stream.text, self.scored, 0), **self._latents}

  def _content(self, text: str, scored: Scored, offset: int) -> dict[str, Any]:
    most = self._asked.wants_logprobs
    logprobs = None
    if most is not None or self._two:
      logprobs = scored.to_json(self._tokenizer, most or 0, offset, self._two)
    reason = finish_reason(self.ended_by) if self.ended_by else None
    return {'index': self._number, 'text': text, 'logprobs': logprobs, 'finish_reason': reason,
            'ended_by': self.ended_by or None}


class _EventStream(StreamingResponse):
  """A stream that gives its texts up however it ends."""

  def __init__(self, answer: Answer, watch: asyncio.Future):
    super().__init__(answer.events(), media_type='text/event-stream',
                     headers={'x-accel-buffering': 'no'})
    self._answer, self._watch = answer, watch

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    except ClientDisconnect:
      pass
    finally:
      self._watch.cancel()
      self._answer.cancel()


def _event(value: Any) -> bytes:
  return b'data: ' + json.dumps(value, ensure_ascii=False).encode() + b'\n\n'


async def _body_of(request: Request, most: int) -> bytes:
  """Returns the body of a request. Raises RequestError if it is too large or too slow."""
  too_large = RequestError(413, f'the request has more than {most:,} bytes: send a smaller one')
  declared = request.headers.get('content-length', '0')
  if declared.isdecimal() and int(declared[:18]) > most:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for chunk in request.stream():
        body += chunk
        if len(body) > most:
          raise too_large
  except TimeoutError:
    raise RequestError(408, f'the request took longer than {BODY_SECONDS:g} s to come') from None
  return bytes(body)


@functools.cache
def _page() -> tuple[str, str]:
  """Returns the page, and the policy that lets its own script and style run and nothing else."""
  html = Path(__file__).with_name('page.html').read_text(encoding='utf-8')

  def hashes(tag: str) -> str:
    found = re.findall(f'<{tag}>(.*?)</{tag}>', html, re.DOTALL)
    return ' '.join(f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
                    for each in found)

  return html, (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'")


# --- Errors and counts ---


async def _refuse(request: Request, error: RequestError) -> Response:
  headers = _RETRY if error.status in (429, 503) else None
  return JSONResponse(error.to_json(), error.status, headers=headers)


async def _refuse_path(request: Request, error: HTTPException) -> Response:
  message = {404: 'there is nothing at this path', 405: 'this path has no such method'}.get(
      error.status_code, error.detail)
  return JSONResponse(RequestError(error.status_code, message).to_json(), error.status_code,
                      headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
  logging.error('A request failed.', exc_info=error)
  return JSONResponse(RequestError(*_FAILED).to_json(), 500)


class _Counting:
  """Counts requests by path and status, and adds headers that every answer has."""

  _PATHS: Sequence[str] = ('/', '/health', '/metrics', '/v1/models', '/v1/completions')
  _HEADERS: Mapping[bytes, bytes] = {
      b'x-content-type-options': b'nosniff', b'cache-control': b'no-store',
      b'referrer-policy': b'no-referrer'}

  def __init__(self, app: ASGIApp, metrics: ServiceMetrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return

    async def counted(message: Message) -> None:
      if message['type'] == 'http.response.start':
        path = scope['path'] if scope['path'] in self._PATHS else 'other'
        self._metrics.requests.labels(path, str(message['status'])).inc()
        message['headers'] = [*message.get('headers', ()), *self._HEADERS.items()]
      await send(message)

    await self._app(scope, receive, counted)


