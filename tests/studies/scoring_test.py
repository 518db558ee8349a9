"""Answers are scored by the forward pass of training; chains are what the decoder would write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.errors import UserError
from latent_deliberation.inference.engine import Engine
from latent_deliberation.model.decoder import Decoder
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from latent_deliberation.studies.scoring import (
  batch_questions,
  check_same_anchor_tokens,
  make_question_scorer,
  open_scorer,
  score_questions,
  write_chains,
)
from latent_deliberation.studies.study_config import ArmConfig
from tests import tiny
from tests.studies.tiny_study import study

RANDOM = np.random.default_rng(0)
PARTS = [tuple(RANDOM.integers(1, tiny.CONFIG.vocab_size, size).tolist() for size in sizes)
         for sizes in ((6, 2, 1), (4, 3, 2), (7, 1, 3), (5, 2, 2), (6, 3, 1))]


def scored(deliberator, params, decoder_params, arms, offline=False, parts=PARTS, batch_size=2):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  scorer = make_question_scorer(deliberator, arms, loss_chunk=3, mesh=mesh, rules=DEFAULT_RULES)
  batches = batch_questions(parts, batch_size, offline)
  return score_questions(scorer, params, decoder_params, batches, len(parts))


def chosen(logits, tokens):
  """Nats of tokens [A] after states with logits [A, V], and whether all are the likeliest."""
  log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  return -log_p[np.arange(len(tokens)), tokens].sum(), (log_p.argmax(axis=-1) == tokens).all()


def test_frozen_scores_match_its_logits(decoder_params):
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
def test_place_of_latents(decoder_params, latents, offline):
  """They come after the question, or offline after the context."""
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


def test_greedy_answer_is_right(decoder_params):
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


def test_last_batch_is_filled():
  last = batch_questions(PARTS[:3], 2)[-1]
  first, third = ([*context, *question, *answer] for context, question, answer in
                  (PARTS[0], PARTS[2]))
  for row, ids in zip(last.batch.tokens, (third, first), strict=True):
    assert row[row > 0].tolist() == ids


def test_no_question_is_its_own_control(decoder_params):
  """Fewer questions than rows of a batch are not repeated in it."""
  batch, = batch_questions(PARTS[:3], 4)
  assert batch.batch.tokens.shape[0] == 3
  deliberator = tiny.deliberator(num_latents=2)
  params = tiny.coprocessor_params(deliberator, decoder_params)
  outcomes = scored(deliberator, params, decoder_params, ('own', 'shuffled'), parts=PARTS[:3],
                    batch_size=4)
  assert np.abs(outcomes['shuffled'].nll - outcomes['own'].nll).min() > 1e-4


def test_bad_questions_are_refused():
  with pytest.raises(UserError, match='no questions'):
    batch_questions([], 2)
  with pytest.raises(UserError, match=r'question 1 has \[0, 1, 1\]'):
    batch_questions([PARTS[0], ([], [3], [4])], 2, offline=True)
  with pytest.raises(UserError, match=r'question 0 has \[1, 1, 0\]'):
    batch_questions([([2], [3], [])], 2)


def open_tiny_scorer(data, latents, num_latents):
  """The scorer of a study on questions of 12 tokens."""
  wide = ArmConfig(changes={'deliberation': {'latents': latents, 'num_latents': num_latents}})
  asked = study({'wide': wide})
  return open_scorer(asked, data, make_mesh(asked.experiment.mesh, jax.devices()[:1]))


@pytest.mark.parametrize('latents, count', [('anchored', 20), ('refining', 12)])
def test_latents_have_room(tmp_path, latents, count):
  """After the question, or in the place of its tokens."""
  open_tiny_scorer(tmp_path, latents, count)


def test_too_many_refining_latents(tmp_path):
  """They would replace more tokens than the shortest question has."""
  with pytest.raises(UserError, match='arms.wide .*13 refining .* 12'):
    open_tiny_scorer(tmp_path, 'refining', 13)


def test_text_arms_share_anchor_tokens():
  choices = {name: tiny.deliberator(anchor_tokens=anchor_tokens).config
             for name, anchor_tokens in (('arms.one', (3,)), ('arms.other', (3, 4)))}
  with pytest.raises(UserError, match=r'arms.other .*\(3, 4\), arms.one .*\(3,\)'):
    check_same_anchor_tokens(choices)
  check_same_anchor_tokens({'arms.one': choices['arms.one']})


CHAIN_CONFIG = TransformerConfig(
    vocab_size=7, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, hidden_dim=8)
PROMPTS = [[2, 3], [2, 4, 5, 6, 3], [2, 5], [2, 6, 6], [2, 3, 4]]
EOS, LONGEST = 1, 6


@pytest.fixture(scope='module')
def chain_decoder():
  boxed = Decoder(CHAIN_CONFIG).init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))
  params = nn.unbox(boxed)['params']
  return params, Engine(CHAIN_CONFIG, params, length=16)


def greedy(params, prompt):
  """Tokens of the plain decoder, one full pass for each, over what no earlier token sees."""
  tokens = list(prompt)
  for _ in range(LONGEST):
    padded = jnp.array([tokens + [2] * (16 - len(tokens))])
    _, logits, _ = tiny.read(params, padded, config=CHAIN_CONFIG)
    tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
  return tokens[len(prompt):]


def test_chain_is_greedy_text(chain_decoder):
  """Up to the ending, or with the ending appended."""
  params, engine = chain_decoder
  written = [greedy(params, prompt) for prompt in PROMPTS]
  ending = written[0][2:4]  # at least one chain comes to it
  chains = write_chains(engine, PROMPTS, ending, LONGEST, 2, EOS)
  came = 0
  for chain, text in zip(chains, written, strict=True):
    assert chain[-2:] == ending
    ends = [n for n in range(2, LONGEST + 1) if text[n - 2:n] == ending]
    text = text[:text.index(EOS)] if EOS in text and not ends else text
    assert chain == (text[:ends[0]] if ends else [*text, *ending])
    came += bool(ends)
  assert came


def test_chains_ignore_batching(chain_decoder):
  _, engine = chain_decoder
  together = write_chains(engine, PROMPTS, [3, 4], LONGEST, 5, EOS)
  assert [write_chains(engine, [prompt], [3, 4], LONGEST, 1, EOS)[0]
          for prompt in PROMPTS] == together
  assert np.all([chain[-2:] == [3, 4] for chain in together])
