"""The HTTP API as clients see it: answers, streams, refusals, faults, and a clean end."""

import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest

from latent_deliberation.experts.attach import Experts
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.serving import http_api
from tests.serving import small_server
from tests.serving.faults import FaultyExperts, Fixed
from tests.serving.small_server import complete, refused, send, stream

PROMPT = 'Once upon a'


@pytest.fixture(scope='module')
def experts():
  return small_server.experts(router=Fixed(['stars', 'law'], -1.0, 0.5))


@pytest.fixture(scope='module')
def server(experts):
  with small_server.serving(experts, most_texts=3, most_bytes=4000) as running:
    yield running


def alone(experts, choice=None, max_tokens=8):
  """The completion of the prompt by `session.generate`."""
  tokenizer = small_server.decoder().tokenizer
  options = DecodingOptions(max_tokens, eos=(tokenizer.eos,), num_ids=tokenizer.size,
                            policy=ONCE if choice else NEVER)
  source = experts.source([choice]) if choice else None
  completion, = generate(experts.engine, [tokenizer.encode(PROMPT)], options, source=source)
  return completion, tokenizer.decode(completion.tokens)


@pytest.mark.parametrize('model, choice, mix', [
    ('tiny', None, {}), ('tiny+stars:0', None, {}), ('tiny+stars', 'stars', {'stars': 1.0}),
    ('tiny+stars:0.5,law:-2', {'stars': 0.5, 'law': -2.0}, {'stars': 0.5, 'law': -2.0}),
    ('tiny+auto', 'law', {'law': 1.0})])
def test_completion(server, experts, model, choice, mix):
  """Text, log-probabilities and numbers of tokens are those of the decoder with these experts."""
  completion, text = alone(experts, choice)
  found = complete(server, model=model, logprobs=2)
  answer, = found['choices']
  assert answer['text'] == text and answer['finish_reason'] == 'length'
  assert answer['latents']['experts'] == mix and answer['latents']['fault'] is None
  assert answer['latents']['scores'] == (
      {'stars': -1.0, 'law': 0.5} if model.endswith('auto') else None)
  logprobs = answer['logprobs']
  np.testing.assert_allclose(logprobs['token_logprobs'], completion.logprobs, atol=5e-5)
  assert ''.join(logprobs['tokens']) == text
  # Ids that the tokenizer lacks may be likelier than the one that was taken.
  assert all(1 <= len(top) <= 3 and max(top.values()) > own - 1e-5 for top, own in
             zip(logprobs['top_logprobs'], logprobs['token_logprobs'], strict=True))
  assert (found['object'], found['model']) == ('text_completion', model)
  assert found['usage'] == {'prompt_tokens': 12, 'completion_tokens': 8, 'total_tokens': 20}


@pytest.mark.parametrize('values', [
    {}, {'model': 'tiny+law', 'score_with': 'tiny'}, {'temperature': 1.5, 'seed': 3},
    {'prompt': ['Once upon a', 'The end of'], 'temperature': 1.0, 'seed': 1}])
def test_stream_is_the_whole(server, values):
  """The parts of a stream add up to the answer in one piece."""
  whole = complete(server, logprobs=0, **values)
  parts = stream(server, logprobs=0, stream_options={'include_usage': True}, **values)
  assert parts[-1]['choices'] == [] and parts[-1]['usage'] == whole['usage']
  for choice in whole['choices']:
    own = [part['choices'][0] for part in parts[:-1]
           if part['choices'][0]['index'] == choice['index']]
    assert len(own) > 2  # in pieces
    assert ''.join(part['text'] for part in own) == choice['text']
    assert [part['finish_reason'] for part in own if part['finish_reason']] == [
        choice['finish_reason']]
    assert own[0]['latents'] == choice['latents']
    for key in choice['logprobs'].keys() - {'top_logprobs'}:
      assert sum((part['logprobs'][key] for part in own), []) == pytest.approx(
          choice['logprobs'][key], abs=5e-5)
  assert len({part['id'] for part in parts}) == 1


def test_score_with_a_second_model(server, experts):
  """The same tokens are scored with and without latents; both ways agree."""
  plain = complete(server, score_with='tiny+stars')['choices'][0]
  assert plain['text'] == alone(experts)[1]
  assert plain['latents']['experts'] == {}
  assert plain['score_with_latents']['experts'] == {'stars': 1.0}
  gains = np.subtract(plain['logprobs']['score_with'], plain['logprobs']['token_logprobs'])
  assert np.abs(gains).max() > 1e-3
  same = complete(server, score_with='tiny')['choices'][0]['logprobs']
  np.testing.assert_allclose(same['score_with'], same['token_logprobs'], atol=5e-5)


def test_score_with_needs_two_rows(experts):
  """A server of one row refuses it, and goes on with other texts."""
  with small_server.serving(experts, rows=1) as server:
    status, body, _ = send(server, 'POST', '/v1/completions',
                           {'model': 'tiny', 'prompt': 'Once', 'score_with': 'tiny+stars'})
    assert status == 400 and b'--rows=2' in body
    assert complete(server)['choices'][0]['text']


def test_several_texts(server):
  """Prompts and `n` give a choice each, in order, each with its own seed."""
  found = complete(server, n=3, temperature=1.0, seed=5)['choices']
  assert [choice['index'] for choice in found] == [0, 1, 2]
  assert len({choice['text'] for choice in found}) == 3
  assert found[1]['text'] == complete(server, temperature=1.0, seed=6)['choices'][0]['text']
  ids = small_server.decoder().tokenizer.encode(PROMPT)
  both = complete(server, prompt=[PROMPT, 'The end of'])['choices']
  assert complete(server, prompt=ids)['choices'][0]['text'] == both[0]['text']


def test_stop_string(server, experts):
  """A text ends before its stop string, in one piece and streamed."""
  text = alone(experts, max_tokens=20)[1]
  stop = text[5:7]
  values = dict(max_tokens=20, stop=[stop, 'never'])
  answer = complete(server, **values)['choices'][0]
  assert answer['text'] == text[:text.index(stop)]
  assert (answer['finish_reason'], answer['ended_by']) == ('stop', 'stop')
  parts = stream(server, **values)
  assert ''.join(part['choices'][0]['text'] for part in parts) == answer['text']


def test_models_health_and_metrics(server):
  status, body, _ = send(server, 'GET', '/v1/models')
  models = json.loads(body)['data']
  assert status == 200
  assert [model['id'] for model in models] == ['tiny', 'tiny+stars', 'tiny+law', 'tiny+auto']
  assert models[1]['expert']['description'] == 'Stars and planets'
  assert models[1]['expert']['gain'] == [0.2, 0.1, 0.3]
  assert json.loads(send(server, 'GET', '/v1/models/tiny+law')[1]) == models[2]
  assert send(server, 'GET', '/v1/models/other')[0] == 404
  complete(server, model='tiny+law')
  status, body, _ = send(server, 'GET', '/health')
  assert (status, json.loads(body)) == (200, {'status': 'ok', 'queued': 0, 'running': 0})
  status, body, headers = send(server, 'GET', '/metrics')
  values = dict(line.rsplit(' ', 1) for line in body.decode().splitlines() if line[0] != '#')
  assert status == 200 and headers['content-type'].startswith('text/plain; version=0.0.4')
  assert float(values['latent_texts_total{ended_by="length"}']) > 0
  assert float(values['latent_latents_total{outcome="joined"}']) > 0
  assert float(values['latent_rows']) == 2 and float(values['latent_first_token_seconds_count']) > 0


def test_page_runs_only_its_own_code(server):
  """The page has a policy by which no other script, style or host is used."""
  status, body, headers = send(server, 'GET', '/')
  policy = headers['content-security-policy']
  assert status == 200 and b'<textarea id="prompt"' in body
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  assert 'unsafe' not in policy and policy.count("'sha256-") == 2
  assert b'http://' not in body and b'https://' not in body and b'src=' not in body


LONG = 'x' * 300
REFUSED = {
    'no JSON': (b'{"model":', 400, 'no JSON'),
    'deep JSON': (b'[' * 3000, 400, 'no JSON'),
    'no number of JSON': (b'{"model": "tiny", "temperature": NaN}', 400, 'no JSON'),
    'no UTF-8': (b'{"model": "\xff"}', 400, 'no JSON'),
    'no object': (b'[1, 2]', 400, 'no JSON object'),
    'too large': (b' ' * 4001, 413, '4,000 bytes'),
    'no model': ({'model': None}, 400, 'model is missing'),
    'unknown model': ({'model': 'gpt'}, 404, "'gpt'.*'tiny'"),
    'unknown expert': ({'model': 'tiny+moon'}, 404, "'moon'"),
    'a path as expert': ({'model': 'tiny+../../etc/passwd'}, 404, 'no expert'),
    'an expert twice': ({'model': 'tiny+law:1,law:2'}, 400, 'once'),
    'a weight that is no number': ({'model': 'tiny+law:nan'}, 400, 'weight'),
    'unknown second model': ({'score_with': 'tiny+moon'}, 404, 'score_with.*moon'),
    'no prompt': ({'prompt': None}, 400, 'prompt = None'),
    'prompt of another type': ({'prompt': {'file': '/etc/passwd'}}, 400, 'prompt = '),
    'no Unicode': ({'prompt': '\ud800'}, 400, 'Unicode'),
    'unknown id': ({'prompt': [4, 999]}, 400, 'id 999'),
    'too many texts': ({'prompt': ['a'] * 4}, 400, '1 to 3 texts'),
    'too many choices': ({'prompt': ['a', 'b'], 'n': 2}, 400, '4 texts'),
    'too long': ({'prompt': LONG}, 400, 'room for 96'),
    'too many tokens': ({'max_tokens': 90}, 400, '102 tokens'),
    'too short for latents': ({'model': 'tiny+law', 'prompt': 'a'}, 400, '2 tokens'),
    'no tokens': ({'max_tokens': 0}, 400, 'max_tokens = 0'),
    'temperature of another type': ({'temperature': 'hot'}, 400, 'temperature'),
    'temperature below zero': ({'temperature': -1}, 400, 'temperature = -1'),
    'impossible top_p': ({'top_p': 2}, 400, 'top_p = 2'),
    'too many likely tokens': ({'logprobs': 50}, 400, 'logprobs = 50'),
    'impossible seed': ({'seed': -3}, 400, 'seed = -3'),
    'empty stop': ({'stop': ['']}, 400, 'stop'),
    'too many stops': ({'stop': ['a'] * 99}, 400, 'stop'),
    'stop of another type': ({'stop': {}}, 400, 'stop = {}'),
    'endless number': ({'temperature': 10**400}, 400, 'temperature = a number of 1329 bits'),
    'endless id': ({'prompt': [4, 10**400]}, 400, 'id a number of 1329 bits'),
    'a truth for a number': ({'best_of': True}, 400, 'best_of = True'),
    'misspelt key': ({'max_token': 3}, 400, "'max_token'"),
    'key that is no Unicode': ({'\ud800': 3}, 400, 'is no key of a request'),
    'what this server lacks': ({'echo': True}, 400, 'echo')}


@pytest.mark.parametrize('case', REFUSED)
def test_bad_requests_are_refused(server, case):
  """Each ends with the status and the words of its fault, and no text is begun."""
  values, status, message = REFUSED[case]
  found, error = refused(server, values)
  assert found == status
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(error['message'])
  assert server.service.batcher.running == 0


def test_other_refusals(server, monkeypatch):
  """Other methods, paths, kinds of content and names of the server, and slow bodies."""
  assert send(server, 'GET', '/v1/completions')[0] == 405
  assert send(server, 'GET', '/../etc/passwd')[0] == send(server, 'GET', '/page.html')[0] == 404
  assert refused(server, {}, Content_Type='text/plain')[0] == 415
  assert send(server, 'GET', '/v1/models', Host='evil.example')[0] == 400
  monkeypatch.setattr(http_api, 'BODY_SECONDS', 0.2)
  with socket.create_connection(('127.0.0.1', server.port)) as slow:
    slow.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
                 b'Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{')
    assert b'408' in slow.recv(4096).split(b'\r\n')[0]


def test_key(experts):
  """With a key, all but the page and health need it."""
  with small_server.serving(experts, key='secret-of-16-letters') as server:
    for path in ('/v1/models', '/metrics'):
      assert send(server, 'GET', path)[0] == 401
      assert send(server, 'GET', path, Authorization='Bearer wrong')[0] == 401
      assert send(server, 'GET', path, Authorization='Bearer secret-of-16-letters')[0] == 200
    assert refused(server, {})[0] == 401
    assert send(server, 'GET', '/')[0] == send(server, 'GET', '/health')[0] == 200


class FaultyServer(FaultyExperts):
  """Faulty experts of the decoder that reads bytes."""

  def __init__(self, **faults):
    self.faults, self.released, self.begun = faults, threading.Event(), 0
    Experts.__init__(self, small_server.decoder(), {
        'stars': small_server.expert('stars', 1), 'law': small_server.expert('law', 2)},
        length=small_server.LENGTH)


@pytest.mark.parametrize('fault, message', [
    ('fails', r'failed \(RuntimeError\)$'), ('nan', 'not finite'), ('hangs', 'longer than')])
def test_faults_are_said(fault, message):
  """The plain text goes on, in one piece and streamed, and the answer says what happened."""
  experts = FaultyServer(stars=fault)
  experts.augment(experts.engine.read([[1] * 5]), [{'law': 1.0}])  # compiled
  expected = alone(experts)[1]
  with small_server.serving(experts, latent_seconds=0.5) as server:
    answer = complete(server, model='tiny+stars')['choices'][0]
    first, *_ = parts = stream(server, model='tiny+stars')
    experts.released.set()
  assert answer['text'] == expected == ''.join(part['choices'][0]['text'] for part in parts)
  assert answer['latents']['experts'] == {}
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(answer['latents']['fault'])
  assert "'stars'" in first['choices'][0]['latents']['fault']


def test_full_queue(experts):
  """What does not fit the queue is refused with 429, whole."""
  slow = FaultyServer(stars='hangs')
  with small_server.serving(slow, most_queued=2) as server:
    assert refused(server, {'prompt': ['a', 'b', 'c']})[0] == 429
    status, _, headers = send(server, 'POST', '/v1/completions', {
        'model': 'tiny', 'prompt': ['a', 'b', 'c']})
    assert status == 429 and headers['retry-after'] == '1'
    assert len(complete(server, prompt=['a', 'b'])['choices']) == 2


@pytest.mark.parametrize('streamed', [False, True])
def test_client_that_leaves(streamed):
  """Its text is given up, and its row is free again."""
  experts = FaultyServer(stars='hangs')  # so that the text does not end before
  with small_server.serving(experts) as server:
    body = json.dumps({'model': 'tiny+stars', 'prompt': 'a b c', 'max_tokens': 80, 'temperature': 3,
                       'stream': streamed, 'n': 2}).encode()
    connection = http.client.HTTPConnection('127.0.0.1', server.port)
    connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
    until(lambda: server.service.batcher.running)
    connection.close()
    until(lambda: not server.service.batcher.running)
    metrics = send(server, 'GET', '/metrics')[1].decode()
    assert 'ended_by="cancelled"' in metrics
    complete(server)
    experts.released.set()


def test_time_is_limited():
  """A text that cannot begin in time gets a status that says so."""
  with small_server.serving(FaultyServer(), request_seconds=1e-6, latent_seconds=1e-7) as server:
    status, error = refused(server, {'model': 'tiny'})
    assert status == 503 and 'time' in error['message']


def test_clean_end():
  """Running texts end as they would, and new ones are refused."""
  experts = FaultyServer(stars='hangs')
  found = {}

  def ask():
    found['answer'] = complete(server, model='tiny+stars')['choices'][0]

  with small_server.serving(experts) as server:
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.service.batcher.running)
    server.stop()
    until(lambda: not server.service.batcher.is_open)
    with pytest.raises(OSError):
      send(server, 'GET', '/health')
    experts.released.set()
    thread.join(60)
  assert found['answer']['latents']['experts'] == {'stars': 1.0}
  assert found['answer']['text'] == alone(experts, 'stars')[1]


def test_removed_expert(experts):
  """An expert that is detached is unknown from then on, and the models say so."""
  own = small_server.experts()
  with small_server.serving(own) as server:
    assert complete(server, model='tiny+stars')['choices'][0]['latents']['experts']
    own.detach('stars')
    assert refused(server, {'model': 'tiny+stars'})[0] == 404
    assert len(json.loads(send(server, 'GET', '/v1/models')[1])['data']) == 3


def until(condition):
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError('it never came true')
