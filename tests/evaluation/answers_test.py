"""Answers packed over shared contexts score as those that the engine reads one by one."""

import dataclasses

import jax
import numpy as np
import pytest

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.traces import Traces, place
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import answer_contexts, answer_packing
from latent_deliberation.evaluation.answer_contexts import Request, find_partners, group
from latent_deliberation.evaluation.answers import AnswerScorer, Source
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import tiny
from tests.inference import small

RANDOM = np.random.default_rng(0)
COMMON = tuple(RANDOM.integers(1, tiny.CONFIG.vocab_size, 12).tolist())


def ids(size):
  return tuple(RANDOM.integers(1, tiny.CONFIG.vocab_size, size).tolist())


def questions(count=7, prefix=()):
  """Several continuations of each context: some begin alike, one begins another one."""
  requests = []
  for item in range(count):
    context, shared = (*prefix, *ids(5 + 3 * item % 11)), ids(2)
    continuations = [ids(1), (*shared, *ids(3)), (*shared, *ids(1 + item % 5)), shared]
    requests += [Request(context, continuation, item=item) for continuation in continuations]
  return requests


REQUESTS = questions()
CHOICES = {'refining': {}, 'anchored': {'latents': 'anchored'},
           'paper': {'latents': 'paper', 'positions': 'shift'},
           'lora': {'trainable': 'lora'}}


def make_scorer(decoder_params, arms, mesh=None, constant=None, own=True, **choices):
  deliberator = tiny.deliberator(**choices)
  source = Source(deliberator.coprocessor, tiny.coprocessor_params(deliberator, decoder_params))
  if constant:
    module = Coprocessor(tiny.CONFIG, dataclasses.replace(tiny.CHOICES, trainable='constant'))
    constant = Source(module, tiny.coprocessor_params(
        tiny.deliberator(trainable='constant'), decoder_params, seed=5))
  return AnswerScorer(
      Decoder(tiny.CONFIG), decoder_params, arms, mesh=mesh or make_mesh(
          MeshConfig(), jax.devices()[:1]),
      rules=DEFAULT_RULES, own=source if own else None, constant=constant or None)


def scores(scorer, requests, **options):
  """Returns nats and greedy [requests, arms]; those without a score are NaN."""
  nats = np.full((len(requests), len(scorer.arms)), np.nan)
  greedy = np.zeros(nats.shape, bool)
  for scored, _ in scorer.score(requests, **options):
    nats[scored.numbers], greedy[scored.numbers] = scored.nats, scored.greedy
  return nats, greedy


def engine_nats(engine, requests, augment):
  """The same by the engine, one request at a time."""
  nats = []
  for request in requests:
    anchor = len(request.context) - 1 if request.anchor is None else request.anchor
    state = engine.read([request.context[:anchor + 1]])
    if augment:
      state = engine.attach(state, engine.augment(state))
    rest = request.context[anchor + 1:]
    logprobs, = engine.score_on(state, [(*rest, *request.continuation)])
    nats.append(-logprobs[len(rest):].sum())
  return np.array(nats)


@pytest.mark.parametrize('kind', CHOICES)
def test_equals_engine(decoder_params, kind):
  """With and without latents, whatever their kind, nats are the engine's."""
  scorer = make_scorer(decoder_params, ('frozen', 'own'), **CHOICES[kind])
  engine, _, _ = small.augmented(decoder_params, **CHOICES[kind])
  nats, _ = scores(scorer, REQUESTS)
  for arm, augment in enumerate((False, True)):
    np.testing.assert_allclose(nats[:, arm], engine_nats(engine, REQUESTS, augment), atol=1e-4)
  assert np.abs(nats[:, 0] - nats[:, 1]).max() > 0.1


def test_greedy(decoder_params):
  """A continuation is greedy if each of its tokens is the likeliest."""
  scorer = make_scorer(decoder_params, ('frozen', 'own'))
  engine, _, _ = small.augmented(decoder_params)
  state = engine.read([REQUESTS[0].context])
  likeliest = []
  for _ in range(3):
    likeliest.append(int(np.argmax(state.logits[0])))
    state = engine.read_on(state, [likeliest[-1:]])
  context = REQUESTS[0].context
  other = (likeliest[-1] + 1) % tiny.CONFIG.vocab_size
  _, greedy = scores(scorer, [Request(context, tuple(likeliest)),
                              Request(context, (*likeliest[:2], other))])
  assert greedy[:, 0].tolist() == [True, False]


def test_plain_equals_engine(decoder_params):
  """Without a coprocessor the decoder alone scores."""
  scorer = make_scorer(decoder_params, ('frozen',), own=False)
  engine, _, _ = small.augmented(decoder_params)
  nats, _ = scores(scorer, REQUESTS)
  np.testing.assert_allclose(nats[:, 0], engine_nats(engine, REQUESTS, False), atol=1e-4)


def test_anchor_before_the_end(decoder_params):
  """Tokens between the latents and the answer are read after the latents, and are not scored."""
  requests = [dataclasses.replace(request, anchor=len(request.context) - 2)
              for request in REQUESTS]
  scorer = make_scorer(decoder_params, ('frozen', 'own'))
  engine, _, _ = small.augmented(decoder_params)
  nats, _ = scores(scorer, requests)
  for arm, augment in enumerate((False, True)):
    np.testing.assert_allclose(nats[:, arm], engine_nats(engine, requests, augment), atol=1e-4)


@pytest.mark.parametrize('kind', ['refining', 'anchored'])
def test_common_prefix(decoder_params, kind, monkeypatch):
  """A prefix of all contexts is read once, and changes no score."""
  arms, requests = ('frozen', 'own', 'shuffled'), questions(prefix=COMMON)
  scorer = make_scorer(decoder_params, arms, **CHOICES[kind])
  apart, _ = scores(scorer, requests)
  monkeypatch.setattr(answer_packing, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_contexts, 'SHARED', len(COMMON))
  monkeypatch.setattr(answer_packing, 'SMALLEST_CLUSTER', 2)
  contexts = group(requests)
  find_partners(contexts, range(len(contexts)))
  calls = answer_packing.plan(contexts, range(len(contexts)), num_latents=3, shards=1,
                              partners=True)
  assert {call.prefix for call in calls} == {COMMON}
  together, _ = scores(scorer, requests)
  np.testing.assert_allclose(together, apart, atol=1e-4)


def test_batches_do_not_matter(decoder_params, monkeypatch):
  """Scores of all arms are the same for any rows, any number of devices, and any rest of a task."""
  arms = ('frozen', 'own', 'shuffled', 'zero', 'mean', 'constant')
  together, greedy = scores(make_scorer(decoder_params, arms, constant=True), REQUESTS)
  monkeypatch.setattr(answer_packing, 'ROW_TOKENS', 48)
  monkeypatch.setattr(answer_packing, 'CALL_TOKENS', 96)
  scorer = make_scorer(decoder_params, arms, constant=True)
  apart, also_greedy = scores(scorer, REQUESTS)
  np.testing.assert_allclose(apart, together, atol=1e-4)
  np.testing.assert_array_equal(also_greedy, greedy)
  rest, _ = scores(scorer, REQUESTS, skip=range(10))
  assert np.isnan(rest[:8]).all() and not np.isnan(rest[10:]).any()
  np.testing.assert_allclose(rest[10:], together[10:], atol=1e-4)
  meshed, _ = scores(make_scorer(decoder_params, arms, constant=True, mesh=make_mesh(
      MeshConfig(data=2, fsdp=2), jax.devices()[:4])), REQUESTS)
  np.testing.assert_allclose(meshed, together, atol=1e-4)


def test_zero_gate(decoder_params):
  """With the gate at zero, latents of every kind score as the frozen decoder, to the bit."""
  arms = ('frozen', 'own', 'shuffled', 'zero', 'mean')
  scorer = make_scorer(decoder_params, arms)
  source = scorer._sources['own']
  scorer.set_params({**source.params, 'gate': 0 * source.params['gate']})
  nats, _ = scores(scorer, REQUESTS)
  for arm in range(1, len(arms)):
    np.testing.assert_array_equal(nats[:, arm], nats[:, 0])


def test_shuffled(decoder_params):
  """Another example's latents are those of the item before, and the second one's for the first."""
  scorer = make_scorer(decoder_params, ('own', 'shuffled'), latents='paper')
  contexts, answer = [ids(6), ids(9), ids(7)], ids(3)
  nats, _ = scores(scorer, [Request(context, answer, item=item)
                            for item, context in enumerate(contexts)])
  _, deliberator, params = small.augmented(decoder_params, latents='paper')
  lengths = np.array([len(context) for context in contexts])
  tokens = np.array([(*context, *(0,) * (max(lengths) - len(context))) for context in contexts])
  order = np.arange(max(lengths))
  batch = Batch(tokens, (order < lengths[:, None]).astype(int), np.tile(order, (3, 1)))
  traces = Traces(lengths[:, None] - 1, np.ones((3, 1), bool), np.tile(answer, (3, 1, 1)),
                  np.ones((3, 1, len(answer)), bool))

  @jax.jit
  def logits_with(batch, traces, partners):
    """The three passes, with the outputs of the other context before the second pass."""
    placement = place(batch, traces.anchors, deliberator.config, len(answer))
    trunk, cache = deliberator.prefill(decoder_params, batch)
    outputs = deliberator.coprocess(params, decoder_params, placement, trunk, cache)
    latents = deliberator.latents(params, decoder_params, placement, outputs[partners])
    hidden = deliberator.second_pass(decoder_params, latents, traces, placement, cache)
    return deliberator.decoder.apply({'params': decoder_params}, hidden[:, 0], method='logits')

  logits = logits_with(batch, traces, np.array([1, 0, 1]))
  expected = [-small.chosen(each, answer).sum() for each in logits]
  np.testing.assert_allclose(nats[:, 1], expected, atol=1e-4)


def test_no_other_item(decoder_params):
  """The only question of a task lends itself its latents; so do the contexts of one item."""
  scorer = make_scorer(decoder_params, ('own', 'shuffled'))
  nats, _ = scores(scorer, [Request(ids(size), ids(2), item='only') for size in (5, 6)])
  np.testing.assert_array_equal(nats[:, 0], nats[:, 1])


def test_shuffled_past_a_short_one(decoder_params):
  """A short context before another one does not give it its own latents for another example's."""
  scorer = make_scorer(decoder_params, ('own', 'shuffled'))
  requests = [Request(ids(size), ids(2), item=item) for item, size in enumerate((6, 2, 7, 2, 8))]
  nats, _ = scores(scorer, requests)
  assert (np.abs(nats[:, 0] - nats[:, 1]) > 1e-4).tolist() == [True, False, True, False, True]


def test_without_room(decoder_params):
  """A context that is shorter than the latents is scored by the frozen decoder in every arm."""
  scorer = make_scorer(decoder_params, ('frozen', 'own', 'shuffled'))
  short = Request(ids(2), ids(3), item='short')
  assert not scorer.has_room(short) and scorer.has_room(REQUESTS[0])
  nats, _ = scores(scorer, [short, *REQUESTS[:8]])
  engine, _, _ = small.augmented(decoder_params)
  np.testing.assert_allclose(nats[0], engine_nats(engine, [short], False)[[0, 0, 0]], atol=1e-4)
  assert np.abs(nats[1:, 1] - nats[1:, 0]).max() > 0.1


@pytest.mark.parametrize('arms, options, said', [
    ((), {}, 'arms'), (('own', 'own'), {}, 'each once'), (('best',), {}, "'best'"),
    (('constant',), {}, 'constant soft tokens'), (('zero',), {'own': False}, "'zero'"),
    (('constant',), {'constant': True, 'num_latents': 2}, 'num_latents')])
def test_bad_arms(decoder_params, arms, options, said):
  with pytest.raises(UserError, match=said):
    make_scorer(decoder_params, arms, **options)
