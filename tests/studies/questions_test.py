"""Answers are scored by the forward pass of training, on the answer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.errors import UserError
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from latent_deliberation.studies.scoring import (
  batch_questions,
  make_question_scorer,
  score_questions,
)
from tests import tiny

RANDOM = np.random.default_rng(0)
PARTS = [tuple(RANDOM.integers(1, tiny.CONFIG.vocab_size, size).tolist() for size in sizes)
         for sizes in ((6, 2, 1), (4, 3, 2), (7, 1, 3), (5, 2, 2), (6, 3, 1))]


def scored(deliberator, params, decoder_params, arms, offline=False, parts=PARTS, batch_size=2):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  scorer = make_question_scorer(deliberator, arms, loss_chunk=3, mesh=mesh, rules=DEFAULT_RULES)
  batches = batch_questions(parts, batch_size, offline)
  return score_questions(scorer, params, decoder_params, batches, len(parts))


def chosen(logits, tokens):
  """Nats of tokens [A] behind states with logits [A, V], and whether all are the likeliest."""
  log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  return -log_p[np.arange(len(tokens)), tokens].sum(), (log_p.argmax(axis=-1) == tokens).all()


def test_the_frozen_decoder_is_scored_as_it_reads(decoder_params):
  outcomes = scored(tiny.deliberator(), {}, decoder_params, ('frozen',))['frozen']
  for number, (context, question, answer) in enumerate(PARTS):
    _, logits, _ = tiny.read(decoder_params, jnp.asarray([context + question + answer]))
    start = len(context) + len(question)
    nll, correct = chosen(logits[0, start - 1:start + len(answer) - 1], answer)
    assert outcomes.nll[number] == pytest.approx(nll, rel=1e-4)
    assert outcomes.correct[number] == correct


@pytest.mark.parametrize('latents, offline', [
    ('refining', False), ('refining', True),
    pytest.param('paper', False, marks=pytest.mark.slow),
    pytest.param('paper', True, marks=pytest.mark.slow)])
def test_latents_come_behind_the_question_or_offline_behind_the_context(decoder_params, latents,
                                                                        offline):
  deliberator = tiny.deliberator(latents=latents, positions='shift')
  params = tiny.coprocessor_params(deliberator, decoder_params)
  outcomes = scored(deliberator, params, decoder_params, ('own',), offline)['own']
  for number, (context, question, answer) in enumerate(PARTS):
    text = jnp.asarray([context + question + answer])
    batch = Batch(text, jnp.ones_like(text), jnp.arange(text.shape[1])[None])
    anchor = len(context if offline else context + question) - 1
    span = text.shape[1] - 1 - anchor
    traces = gather_traces(batch, jnp.array([[anchor]]), jnp.array([[True]]), span)
    hidden = tiny.forward(deliberator, params, decoder_params, batch, traces)[0, 0]
    logits = deliberator.decoder.apply({'params': decoder_params}, hidden, method='logits')
    nll, correct = chosen(logits[-len(answer):], answer)
    assert outcomes.nll[number] == pytest.approx(nll, rel=1e-4)
    assert outcomes.correct[number] == correct


def test_an_answer_that_greedy_decoding_writes_counts_as_given(decoder_params):
  context, question, _ = PARTS[0]
  answer = []
  for _ in range(3):
    _, logits, _ = tiny.read(decoder_params, jnp.asarray([context + question + answer]))
    answer.append(int(logits[0, -1].argmax()))
  wrong = [*answer[:-1], answer[-1] % 30 + 1]
  parts = [(context, question, answer), (context, question, wrong)]
  outcomes = scored(tiny.deliberator(), {}, decoder_params, ('frozen',), parts=parts)['frozen']
  assert outcomes.correct.tolist() == [True, False]


def test_controls_have_other_content(decoder_params):
  deliberator = tiny.deliberator(num_latents=2)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  outcomes = scored(deliberator, params, decoder_params, ('frozen', 'own', 'shuffled', 'zero',
                                                          'mean'), parts=PARTS[:4])
  np.testing.assert_allclose(outcomes['zero'].nll, outcomes['frozen'].nll, rtol=1e-4)
  for arm in ('shuffled', 'mean', 'zero'):
    assert np.abs(outcomes[arm].nll - outcomes['own'].nll).min() > 1e-4


def test_the_last_batch_is_filled_from_the_start():
  last = batch_questions(PARTS[:3], 2)[-1]
  first, third = ([*context, *question, *answer] for context, question, answer in
                  (PARTS[0], PARTS[2]))
  for row, ids in zip(last.text.tokens, (third, first), strict=True):
    assert row[row > 0].tolist() == ids


def test_questions_that_cannot_be_asked_are_refused():
  with pytest.raises(UserError, match='no questions'):
    batch_questions([], 2)
  with pytest.raises(UserError, match=r'question 1 has \[0, 1, 1\]'):
    batch_questions([PARTS[0], ([], [3], [4])], 2, offline=True)
  with pytest.raises(UserError, match=r'question 0 has \[1, 1, 0\]'):
    batch_questions([([2], [3], [])], 2)
