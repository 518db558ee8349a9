"""Prompts are continued, by what the launch scripts left on disk."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

from latent_deliberation.cli.generate import (
  Request,
  Writer,
  answer,
  check_coprocessor,
  read_prompts,
  read_stop,
)
from latent_deliberation.data.vocabularies import ByteVocabulary
from latent_deliberation.errors import UserError
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.engine import open_engine
from latent_deliberation.inference.policy import NEVER, ONCE, FittedGate
from latent_deliberation.inference.session import DecodingOptions
from latent_deliberation.model import weights

PROMPTS = ['Document 3: the', 'the 7th of the forty. the']
AUGMENTED = Request(DecodingOptions(24, policy=ONCE))


@pytest.fixture(scope='module')
def opened(quickstart):
  return open_engine(quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor'),
                     length=200)


def test_int8_training_warns(quickstart, tmp_path, caplog):
  trained = shutil.copytree(quickstart / 'coprocessor/coprocessor', tmp_path / 'trained')
  path = trained / 'coprocessor.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'frozen_dtype': 'int8'}))
  open_engine(quickstart / 'pretraining/decoder', str(trained), length=200)
  assert any('int8' in text and 'float32' in text for text in caplog.messages)


@pytest.fixture
def writer(opened):
  return Writer(*opened, AUGMENTED)


def asked(opened, **more):
  return Writer(*opened, dataclasses.replace(AUGMENTED, **more))


def test_json_has_text_and_tokens(opened, capsys):
  answer(asked(opened, as_json=True), PROMPTS)
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  for prompt, line in zip(PROMPTS, lines, strict=True):
    assert line['prompt'] == prompt and line['latents_at'] == [0]
    assert line['text'] == ByteVocabulary().decode(line['tokens'])
    assert len(line['logprobs']) == len(line['tokens']) <= 24
    assert line['finish_reason'] in ('eos', 'length')


def test_stream_is_same_text_in_pieces(opened, writer, capsys):
  whole, = writer.write(PROMPTS[:1])
  pieces = list(writer.write_slowly(PROMPTS[0]))
  assert ''.join(pieces) == whole['text'] and len(pieces) > 1
  answer(asked(opened, streamed=True), PROMPTS[:1])
  assert capsys.readouterr().out == PROMPTS[0] + whole['text'] + '\n'


def test_stop_string_ends_the_text(opened):
  """The text ends before it, streamed or not."""
  whole, = Writer(*opened, Request(DecodingOptions(24))).write(PROMPTS[:1])
  # The second one is longer than what a stream has seen when it first looks for it.
  for string in (whole['text'][6:9], whole['text'][:21]):
    writer = Writer(*opened, Request(DecodingOptions(24), stop=(string, 'never there')))
    found, = writer.write(PROMPTS[:1])
    assert found['finish_reason'] == 'stop'
    assert found['text'] == whole['text'][:whole['text'].index(string)]
    assert ''.join(writer.write_slowly(PROMPTS[0])) == found['text']


def test_compare_shows_both_with_logprobs(opened, capsys):
  writer = asked(opened, compared=True)
  result = writer.compare(PROMPTS)[1]
  assert result['plain']['latents_at'] == [] and result['augmented']['latents_at'] == [0]
  assert result['plain']['logprobs'] != result['augmented']['logprobs']
  answer(writer, PROMPTS)
  shown = capsys.readouterr().out
  total = sum(result['plain']['logprobs'])
  assert f'plain: {total:.2f} nats' in shown and '| with latents: -' in shown


def test_asks_for_prompts(writer, capsys, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO(
      f'{PROMPTS[0]}\n\n{"long " * 300}\ncaf\udce9\n{PROMPTS[1]}'))
  answer(writer, [])
  expected = ''.join(each['prompt'] + each['text'] + '\n' for each in (
      writer.write([prompt])[0] for prompt in PROMPTS))
  found = capsys.readouterr()
  assert found.out == expected
  # Errors go to stderr, since the output may be piped on.
  assert 'text 0 has 1501 tokens' in found.err and "'caf\\udce9'" in found.err


def test_prompts_come_from_flags_and_files(tmp_path):
  (tmp_path / 'lines.txt').write_bytes('one\r\ntwo\u2028and\x85more\r\n'.encode())
  (tmp_path / 'lines.jsonl').write_text('{"prompt": "a\\nb"}\n{"prompt": "\u2028"}', 'utf-8')
  assert read_prompts(['zero'], str(tmp_path / 'lines.txt')) == [
      'zero', 'one', 'two\u2028and\x85more']
  assert read_prompts([], str(tmp_path / 'lines.jsonl')) == ['a\nb', '\u2028']


@pytest.mark.parametrize('name', ['a.JSONL', 'a.ndjson', 'a.json'])
def test_prompts_in_other_json_lines(tmp_path, name):
  (tmp_path / name).write_text('{"prompt": "a"}\r\n{"prompt": "b"}\r\n', 'utf-8-sig', newline='')
  assert read_prompts([], str(tmp_path / name)) == ['a', 'b']


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_prompts_with_a_byte_order_mark(tmp_path, encoding):
  (tmp_path / 'a.txt').write_text('one\rmore\r\nzwölf\n', encoding, newline='')
  assert read_prompts([], str(tmp_path / 'a.txt')) == ['one\rmore', 'zwölf']


@pytest.mark.parametrize('written, meant', [
    (r'\n', '\n'), (r'\n\nQ:', '\n\nQ:'), (r'\t', '\t'), (r'\\n', r'\n'), (r'\\\n', '\\\n'),
    (r'\w', r'\w'), ('\n', '\n'), ('größe', 'größe')])
def test_stop_strings_as_shells_pass_them(written, meant):
  assert read_stop(written) == meant


@pytest.mark.parametrize('name, content, message', [
    ('a.jsonl', b'[' * 10**5, 'line 1: .*"prompt"'),
    ('a.jsonl', b'{"prompt": "a"}\n{"text": "a"}\n', 'a.jsonl, line 2: .*"prompt"'),
    ('a.jsonl', b'{"prompt": 5}\n', 'line 1: .*"prompt" .*: it is 5'),
    ('a.jsonl', b'{"prompt": "\\ud800"}\n', r"prompt 0 is '\\ud800', .*Unicode"),
    ('a.txt', b'a\n\nb\n', 'prompt 1 is empty'), ('a.txt', b'', 'a.txt is empty'),
    ('a.txt', b'caf\xe9', 'a.txt is not UTF-8')])
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_prompts([], str(tmp_path / name))
  with pytest.raises(UserError, match='no file'):
    read_prompts([], 'nothing.txt')


def test_background_compiles_first(opened, monkeypatch, capsys):
  """The coprocessor is compiled before the first prompt."""
  order = []
  monkeypatch.setattr(opened[0], 'warm_up', order.append)
  monkeypatch.setattr(Writer, 'write', lambda self, prompts: order.append(prompts) or [])
  monkeypatch.setattr(Writer, 'write_slowly', lambda self, prompt: iter([prompt]))
  options = DecodingOptions(4, policy=ONCE, timing=LatentTiming(None))
  answer(asked(opened, options=options), PROMPTS)
  answer(asked(opened, options=options, streamed=True), PROMPTS)
  assert order == [2, PROMPTS, 1]


@pytest.mark.parametrize('more, message', [
    (dict(as_json=True, streamed=True), '--stream .*--json'),
    (dict(compared=True, streamed=True), '--stream .*--compare'),
    (dict(compared=True, options=DecodingOptions(4, policy=NEVER)), '--compare .*--coprocessor'),
    (dict(cache='there', options=DecodingOptions(4, timing=LatentTiming(None))),
     '--cache=there .*--background'),
    (dict(seed=-1), 'seed = -1'),
    (dict(stop=('a', '')), r"\['a', ''\]")])
def test_bad_requests_are_refused(more, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(AUGMENTED, **more)


def test_mismatches_are_refused(quickstart, tmp_path):
  decoder, coprocessor = quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor')
  config, params = weights.load(decoder)
  vocabulary = weights.open_checkpoint(decoder).vocabulary_hash
  gate = FittedGate(tmp_path, 'abc', ONCE)
  with pytest.raises(UserError, match='gate in .* fingerprint abc, '):
    open_engine(decoder, coprocessor, gate=gate)
  weights.save(tmp_path / 'negative', config, jax.tree.map(np.negative, params), vocabulary)
  weights.save(tmp_path / 'foreign', config, params, 'abc')
  weights.save(tmp_path / 'unknown', config, params)
  with pytest.raises(UserError, match='coprocessor .*fingerprint'):
    open_engine(tmp_path / 'negative', coprocessor)
  with pytest.raises(UserError, match='no trained coprocessor'):
    open_engine(decoder, str(tmp_path))
  with pytest.raises(UserError, match='foreign .*vocabulary abc, .*byte is '):
    open_engine(tmp_path / 'foreign', vocabulary='byte')
  with pytest.raises(UserError, match='no vocabulary .*unknown'):
    open_engine(tmp_path / 'unknown')
  (tmp_path / 'vocabulary.model').write_bytes(b'damaged')
  with pytest.raises(UserError, match='vocabulary.model .*SentencePiece'):
    open_engine(tmp_path / 'unknown')
  with pytest.raises(UserError, match='no vocabulary at .*nothing'):
    open_engine(decoder, vocabulary=str(tmp_path / 'nothing'))


def test_latents_need_a_coprocessor():
  with pytest.raises(UserError, match='--every, --gate .*--coprocessor'):
    check_coprocessor('', at=[], every=8, gate='runs/gate')
  assert check_coprocessor('runs/coprocessor', every=8)
  assert not check_coprocessor('none', every=8) and not check_coprocessor('', every=0, gate='')
