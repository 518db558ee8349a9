"""Texts of a busy server are those that are decoded alone, and nothing takes another one down."""

import contextlib
import queue
import threading
import time

import numpy as np
import pytest

from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, generate, score
from latent_deliberation.serving.batcher import Batcher, Closed, QueueFull, TextRequest
from latent_deliberation.serving.expert_guard import ExpertGuard
from latent_deliberation.serving.service_metrics import ServiceMetrics
from tests import tiny
from tests.experts import small
from tests.serving.faults import FaultyExperts

RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(1, tiny.CONFIG.vocab_size, size).tolist()
           for size in (5, 19, 3, 11, 24, 8)]
EOS = (7,)


@contextlib.contextmanager
def serving(experts, rows=2, timeout=200, most_queued=100, seconds=100):
  batcher = Batcher(ExpertGuard(experts, timeout), rows, EOS, 30,
                    most_queued=most_queued, seconds=seconds, metrics=ServiceMetrics())
  try:
    yield batcher
  finally:
    batcher.close(0)


def request(number, *choices, **changes):
  """Options that differ by number, so that neighbours in a batch never agree by chance."""
  values = dict(ids=PROMPTS[number % 6], text='a', choices=choices or (None,), seed=number,
                sampling=Sampling(1.5, top_k=20) if number % 2 else Sampling(),
                max_tokens=4 + number % 9)
  return TextRequest(**{**values, **changes})


class Reader:
  """Keeps all news of a text."""

  def __init__(self):
    self.updates, self.ended = [], threading.Event()

  def __call__(self, update):
    self.updates.append(update)
    if update.ended_by:
      self.ended.set()

  def result(self):
    assert self.ended.wait(60)
    tokens = [token for update in self.updates for token in update.tokens]
    reports = [report for update in self.updates for report in update.reports]
    return tokens, reports, self.updates[-1].ended_by


class Held(Reader):
  """Holds the batch when its first news comes, until it is released."""

  def __init__(self):
    super().__init__()
    self.released = threading.Event()

  def __call__(self, update):
    super().__call__(update)
    assert self.released.wait(60)


def submit(batcher, *requests):
  readers = [Reader() for _ in requests]
  batcher.submit(requests, readers)
  return readers


def alone(experts, asked):
  choice, options = asked.choices[0], DecodingOptions(
      asked.max_tokens, asked.sampling, EOS, 30, asked.stop,
      policy=ONCE if asked.choices[0] else NEVER)
  completion, = generate(experts.engine, [asked.ids], options, [asked.seed],
                         experts.source([choice]) if choice else None)
  return completion


@pytest.fixture(scope='module')
def experts():
  return small.experts(stars=small.lora(1), law=small.lora(2))


def test_texts_are_those_decoded_alone(experts):
  """Many texts, some with latents, share few rows; each is as `session.generate` gives it."""
  mixes = (None, 'stars', {'stars': 0.5, 'law': 0.5}, None, 'law')
  requests = [request(number, mixes[number % 5]) for number in range(24)]
  with serving(experts) as batcher:
    readers = []
    for asked in requests:  # some come while others run
      readers += submit(batcher, asked)
      time.sleep(0.002)
    found = [reader.result() for reader in readers]
  for asked, (tokens, reports, ended_by) in zip(requests, found, strict=True):
    expected = alone(experts, asked)
    assert [token.id for token in tokens] == expected.tokens
    assert ended_by == expected.finish_reason
    np.testing.assert_allclose([token.logprob for token in tokens], expected.logprobs, atol=5e-5)
    assert [report.experts for report in reports] == [experts.mix(asked.choices[0])]
  assert {ended_by for *_, ended_by in found} == {'eos', 'length'}


def test_second_choice_scores_the_same_tokens(experts):
  """Plain text is scored with latents as it streams, and text with latents by the plain decoder."""
  for own, other in ((None, 'stars'), ('stars', None), ('stars', 'law')):
    with serving(experts) as batcher:
      asked = request(1, own, other)
      (tokens, reports, _), = (reader.result() for reader in submit(batcher, asked))
    assert [token.id for token in tokens] == alone(experts, asked).tokens
    source = experts.source([other]) if other else None
    expected, = score(experts.engine, [asked.ids], [[token.id for token in tokens]],
                      DecodingOptions(1, policy=ONCE if other else NEVER), source)
    np.testing.assert_allclose([token.other_logprob for token in tokens], expected.logprobs,
                               atol=5e-5)
    assert [report.asked for report in reports] == [own, other]


def test_stop_and_likeliest(experts):
  """A text ends where its own function says, and gets the likeliest tokens if it asks."""
  whole = alone(experts, request(0))
  asked = request(0, stop=lambda tokens: len(tokens) == 2, wants_top=True)
  with serving(experts) as batcher:
    reader, other = submit(batcher, asked, request(3))
    tokens, _, ended_by = reader.result()
    assert other.result()[0][0].top == ()
  assert ended_by == 'stop' and [token.id for token in tokens] == whole.tokens[:2]
  assert all(token.top[0] == pytest.approx((token.id, token.logprob)) for token in tokens)
  assert all(len(token.top) == 5 for token in tokens)


@pytest.mark.parametrize('fault, kind', [
    ('fails', 'failed'), ('nan', 'not_finite'), ('hangs', 'hangs')])
def test_faults_leave_the_plain_text(fault, kind):
  """The text of a faulty expert is the plain one, and says so; others notice nothing."""
  experts = FaultyExperts(stars=fault)
  requests = [request(number, (None, 'stars', 'law')[number % 3]) for number in range(9)]
  with serving(experts, timeout=5) as batcher:
    # Compiled first, or healthy experts would run out of this short time.
    experts.augment(experts.engine.read([PROMPTS[0]]), [{'law': 1.0}])
    found = [reader.result() for reader in submit(batcher, *requests)]
    experts.released.set()
  kinds = []
  for asked, (tokens, (report,), _) in zip(requests, found, strict=True):
    spared = request(asked.seed, None if asked.choices[0] == 'stars' else asked.choices[0])
    assert [token.id for token in tokens] == alone(experts, spared).tokens
    if asked.choices[0] == 'stars':
      kinds.append(report.kind)
      assert "'stars'" in report.fault and not report.experts
    else:
      assert not report.fault
  assert kinds[0] == kind and set(kinds) <= {kind, 'busy'}


def test_plain_texts_overtake_a_hanging_expert():
  """A text that waits for latents holds no row."""
  experts = FaultyExperts(stars='hangs')
  with serving(experts, timeout=100) as batcher:
    waiting = submit(batcher, request(1, 'stars'), request(2, 'stars'))
    for plain in submit(batcher, request(3), request(2)):
      plain.result()
    assert not any(reader.updates for reader in waiting)
    experts.released.set()
    for reader in waiting:
      assert reader.result()[1][0].experts == {'stars': 1.0}


def test_a_cancelled_text_leaves_its_expert_noticed():
  """The thread of a text that has ended counts until it ends, and an expert that hangs is known."""
  experts = FaultyExperts(stars='hangs')
  with serving(experts, rows=1, timeout=0.5) as batcher:
    reader = Reader()
    job, = batcher.submit([request(1, 'stars')], [reader])
    until(lambda: experts.begun)
    job.cancel()
    assert reader.result()[2] == 'cancelled'
    until(lambda: not batcher._left_alone)
    assert batcher.guard.hanging({'stars': 1.0}) == 'stars'
    (_, (report,), _), = (each.result() for each in submit(batcher, request(2, 'stars')))
    assert report.kind == 'busy' and experts.begun == 1
    experts.released.set()


def test_an_expert_is_noticed_whose_time_ended_while_nothing_moved():
  """A text may end after the time of its expert is over, and before it is looked at again."""
  experts = FaultyExperts(stars='hangs')
  with serving(experts, timeout=3) as batcher:
    submit(batcher, request(0))[0].result()  # compiles
    held, reader = Held(), Reader()
    job, = batcher.submit([request(1, 'stars')], [reader])
    batcher.submit([request(0)], [held])
    until(lambda: held.updates)  # it holds the batch
    until(lambda: all(each.is_ready for each in job.deliberations))
    job.cancel()
    held.released.set()
    assert reader.result()[2] == 'cancelled'
    assert batcher.guard.hanging({'stars': 1.0}) == 'stars'
    experts.released.set()


def test_first_expert_is_attached_while_texts_run():
  """The batch gets room for latents once the texts before have ended."""
  experts = small.experts()
  with serving(experts) as batcher:
    before = submit(batcher, *(request(number) for number in range(4)))
    experts.attach('stars', small.lora(1))
    after = submit(batcher, request(1, 'stars'), request(2))
    assert all(reader.result()[0] for reader in before)
    tokens, (report,), _ = after[0].result()
  assert report.experts == {'stars': 1.0}
  assert [token.id for token in tokens] == alone(experts, request(1, 'stars')).tokens


def test_full_queue_and_cancelled_texts(experts):
  """A queue takes all texts of a request or none, and cancelled ones leave it and the batch."""
  with serving(experts, most_queued=2) as batcher:
    first, long = [Reader(), Held()], request(0, max_tokens=30, ids=[1] * 9)
    running = batcher.submit([long, long], first)
    until(lambda: all(reader.updates for reader in first))  # the second now holds the batch
    queued = [Reader(), Reader()]
    jobs = batcher.submit([request(1), request(2)], queued)
    with pytest.raises(QueueFull):
      batcher.submit([request(3)], [Reader()])
    for job in (*running, jobs[0]):
      job.cancel()
    first[1].released.set()
    assert {reader.result()[2] for reader in (*first, queued[0])} == {'cancelled'}
    assert queued[1].result()[2] in ('eos', 'length')
    assert (batcher.queued, batcher.running) == (0, 0)


def test_time_is_limited(experts):
  """A text ends with what it has when its time is over, also while it waits."""
  with serving(experts, seconds=0.0) as batcher:
    reader, = submit(batcher, request(0))
    assert reader.result() == ([], [], 'time')


def test_close_finishes_running_texts(experts):
  """Texts that are here end as they would; later ones are refused."""
  with serving(experts) as batcher:
    readers = submit(batcher, request(1), request(2), request(4))
    closing = threading.Thread(target=batcher.close, args=(60,))
    closing.start()
    until(lambda: not batcher.is_open)
    with pytest.raises(Closed):
      batcher.submit([request(0)], [Reader()])
    for number, reader in zip((1, 2, 4), readers, strict=True):
      assert [token.id for token in reader.result()[0]] == alone(experts, request(number)).tokens
    closing.join(10)
    assert not closing.is_alive()


def test_close_in_a_hurry(experts):
  """With no time left, texts end with what they have."""
  slow = FaultyExperts(stars='hangs')
  with serving(slow) as batcher:
    reader, = submit(batcher, request(1, 'stars'))
    until(lambda: batcher.running)
    batcher.close(0)
    assert reader.result()[2] == 'shutdown'
    slow.released.set()


def test_latents_that_cannot_join(experts, monkeypatch):
  """A text whose latents find no memory goes on without them, and is told why."""
  asked = request(2, {'stars': 1.0})
  expected = alone(experts, request(2))
  with serving(experts) as batcher:
    def fail(*unused):
      raise RuntimeError('no memory')
    monkeypatch.setattr(type(experts.engine), 'attach', fail)
    tokens, reports, _ = submit(batcher, asked)[0].result()
  assert [token.id for token in tokens] == list(expected.tokens)
  assert reports[0].kind == 'failed' and not reports[0].experts
  assert 'could not join (RuntimeError)' in reports[0].fault


def test_failed_batch_begins_again(experts, monkeypatch):
  """If a step fails, its texts end with an error, and the next ones are right again."""
  with serving(experts) as batcher:
    decode, calls = batcher._batch.decode, queue.SimpleQueue()

    def fail(limit):
      calls.put(limit)
      raise RuntimeError('RESOURCE_EXHAUSTED')

    monkeypatch.setattr(batcher._batch, 'decode', fail)
    assert submit(batcher, request(1))[0].result()[2] == 'error'
    assert not calls.empty() and batcher._batch.decode != decode
    tokens, *_ = submit(batcher, request(1))[0].result()
  assert [token.id for token in tokens] == alone(experts, request(1)).tokens


def test_no_memory_for_another_batch(experts, monkeypatch):
  """Then all texts end with an error, and the server says that it takes no more."""
  with serving(experts) as batcher:
    def fail(*unused):
      raise RuntimeError('RESOURCE_EXHAUSTED')

    monkeypatch.setattr(batcher, '_decode', fail)
    monkeypatch.setattr(batcher, '_new_batch', fail)
    readers = submit(batcher, *(request(number) for number in range(5)))
    assert {reader.result()[2] for reader in readers} == {'error'}
    until(lambda: not batcher.is_open)


def until(condition):
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError('it never came true')
