"""Texts become requests as in lm-evaluation-harness, with the first token always first."""

from types import SimpleNamespace

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_contexts import Request
from latent_deliberation.evaluation.answer_texts import AnswerEncoder, rolling_windows
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.inference.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def ids(text):
  return tuple(BYTES.encode(text))


class MergingTokenizer(ByteTokenizer):
  """Bytes, but 'ab' is one token: 300."""

  def encode(self, text):
    out, before = [], super().encode(text)
    for token in before:
      if out and [out[-1], token] == list(ids('ab')[1:]):
        out[-1] = 300
      else:
        out.append(token)
    return out


def test_pair():
  """The context keeps the token that begins a text; the latents come after its last token."""
  encoder = AnswerEncoder(BYTES, 100)
  assert encoder.encode('Q: 1', ' 2', 'item') == Request(ids('Q: 1'), ids(' 2')[1:], 4, 'item')


def test_spaces():
  """Spaces at the end of the context belong to the answer."""
  assert AnswerEncoder(BYTES, 100).encode('Q: ', '2').continuation == ids(' 2')[1:]


def test_empty_context():
  assert AnswerEncoder(BYTES, 100).encode('', 'yes') == Request(ids(''), ids('yes')[1:], 0)


def test_merged():
  """An answer that merges with its context is scored with the merged token, and counted."""
  encoder = AnswerEncoder(MergingTokenizer(), 100)
  assert encoder.encode('xa', 'bc') == Request(ids('x'), (300, *ids('c')[1:]), 1)
  encoder.encode('xa', 'c')
  assert (encoder.counts.requests, encoder.counts.merged) == (2, 1)


@pytest.mark.parametrize('place, at', [('end', 14), ('before:Answer:', 6), ('before: Answer: ', 6)])
def test_place(place, at):
  """Latents come after the last token before the last such text."""
  encoder = AnswerEncoder(BYTES, 100, place)
  assert encoder.encode('Q: why\nAnswer:', ' so').anchor == at
  assert encoder.encode_prompt('Q: why\nAnswer:', 4).anchor == at


def test_truncation():
  """Tokens after the first one go, as many as needed; a prompt leaves room for its text."""
  encoder = AnswerEncoder(BYTES, 8)
  request = encoder.encode('abcdefghij', 'xyz')
  assert request == Request((ids('')[0], *ids('fghij')[1:]), ids('xyz')[1:], 5)
  assert len(request.context) + len(request.continuation) - 1 == 8
  assert encoder.encode('abcde', 'xyz').context == ids('abcde')
  assert encoder.counts.truncated == 1
  assert encoder.encode_prompt('abcdefghij', 4) == Request(
      (ids('')[0], *ids('hij')[1:]), (), 3)
  assert encoder.counts.truncated == 2


def test_anchor_is_cut():
  """An anchor that is cut off leaves no room for latents."""
  assert AnswerEncoder(BYTES, 8, 'before:d').encode('abcdefghij', 'xyz').anchor == 0


@pytest.mark.parametrize('context, continuation, options, said', [
    ('Q', '', {}, 'empty'), ('Q:', ' ', {}, 'empty'), ('Q: ', '', {}, 'empty'),
    ('Q', 'x' * 9, {'max_length': 8}, 'max_length = 8'),
    ('Q', 'x', {'place': 'before:Answer:'}, 'Answer:'), ('Q', 'x', {'place': 'middle'}, "'middle'"),
    ('Q', 'x', {'place': 'before: '}, 'before')])
def test_refused(context, continuation, options, said):
  with pytest.raises(UserError, match=said):
    AnswerEncoder(BYTES, **{'max_length': 100, **options}).encode(context, continuation, 'item 7')


def test_no_room_for_a_text():
  """A text needs the token that begins it and an answer; no decoder is opened without both."""
  with pytest.raises(UserError, match='max_length = 1'):
    open_arm_model('nowhere', max_length=1)


@pytest.mark.parametrize('context', ['Q: why', 'Q: why ', 'Q:\n\n', ' Q'])
@pytest.mark.parametrize('continuation', ['so', ' so', 'x' * 9, ' \nx'])
def test_equals_harness(context, continuation):
  """Pairs, and what is left of long ones, are lm-evaluation-harness's but for the first token."""
  lm_eval_model = pytest.importorskip('lm_eval.api.model')
  theirs = lm_eval_model.TemplateLM._encode_pair(SimpleNamespace(
      backend='causal', tok_encode=lambda text: BYTES.encode(text)), context, continuation)
  ours = AnswerEncoder(BYTES, 100).encode(context, continuation)
  assert (list(ours.context), list(ours.continuation)) == theirs
  for length in (11, 12, 14):
    cut = AnswerEncoder(BYTES, length).encode(context, continuation)
    # Its Hugging Face model reads all of these tokens but the last one.
    kept = (theirs[0] + theirs[1])[-(length + 1):]
    assert [*cut.context, *cut.continuation] == [ids('')[0], *kept[1:]]
    assert list(cut.continuation) == theirs[1]


@pytest.mark.parametrize('size, length', [(0, 8), (3, 8), (8, 8), (9, 8), (15, 8), (40, 8), (5, 2)])
def test_rolling_windows(size, length):
  """Each token is scored once; but for the first token, windows are lm-evaluation-harness's."""
  lm_eval_utils = pytest.importorskip('lm_eval.utils')
  rest = list(range(10, 10 + size))
  windows = rolling_windows([2, *rest], length)
  assert [token for _, continuation in windows for token in continuation] == rest
  reads = [len(context) + len(continuation) - 1 for context, continuation in windows]
  assert all(context[0] == 2 for context, _ in windows)
  # All but a short text, or its last window of many, have as much before them as there is room for.
  assert reads == [length] * len(windows) if size >= length else reads in ([], [size])
  expected = [lm_eval_utils.make_disjoint_window(window) for window in
              lm_eval_utils.get_rolling_token_windows(rest, 2, length, 1)]
  if size < 2 * length:
    assert [((2, *context[1:]), tuple(continuation)) for context, continuation in expected] == [
        ((2, *context[1:]), continuation) for context, continuation in windows]


def test_no_room_for_a_prompt():
  with pytest.raises(UserError, match='max_gen_toks'):
    AnswerEncoder(BYTES, 8).encode_prompt('abc', 7)
