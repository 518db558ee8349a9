"""Prompts are continued, by what the launch scripts left on disk."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest

from latent_deliberation.cli.generate import (
  Request,
  Writer,
  answer,
  check_coprocessor,
)
from latent_deliberation.cli.prompts import Prompt, read_prompts, read_stop
from latent_deliberation.data.vocabularies import ByteVocabulary
from latent_deliberation.errors import UserError
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.conventions import Conventions
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import open_engine
from latent_deliberation.inference.policy import NEVER, ONCE, FittedGate, Policy
from latent_deliberation.inference.session import DecodingOptions
from latent_deliberation.inference.tokenizer import ByteTokenizer
from latent_deliberation.model import weights

PROMPTS = ['Document 3: the', 'the 7th of the forty. the']
GIVEN = [Prompt(PROMPTS[0], 'prompt 1'), Prompt(PROMPTS[1], 'a.txt, line 4', 4)]
AUGMENTED = Request(DecodingOptions(24, policy=ONCE))


@pytest.fixture(scope='module')
def opened(quickstart):
  return open_engine(quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor'),
                     length=200)


def test_int8_training_warns(quickstart, tmp_path, caplog):
  trained = shutil.copytree(quickstart / 'coprocessor/coprocessor', tmp_path / 'trained')
  path = trained / 'coprocessor.json'
  content = json.loads(path.read_text()) | {'frozen_dtype': 'int8'}
  del content['checksum']
  path.write_text(json.dumps(content))
  open_engine(quickstart / 'pretraining/decoder', str(trained), length=200)
  assert any('int8' in text and 'float32' in text for text in caplog.messages)


@pytest.fixture
def writer(opened):
  return Writer(*opened, AUGMENTED)


def asked(opened, **more):
  return Writer(*opened, dataclasses.replace(AUGMENTED, **more))


def test_json_has_text_and_tokens(opened, capsys):
  answer(asked(opened, as_json=True), GIVEN)
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line.get('line') for line in lines] == [None, 4]
  for prompt, line in zip(PROMPTS, lines, strict=True):
    assert line['prompt'] == prompt and line['latents_at'] == [0]
    assert line['text'] == ByteVocabulary().decode(line['tokens'])
    assert len(line['logprobs']) == len(line['tokens']) <= 24
    assert line['finish_reason'] in ('eos', 'length')


def test_stream_is_same_text_in_pieces(opened, writer, capsys):
  whole, = writer.write(PROMPTS[:1])
  texts = [result['text'] for result in writer.write_slowly(PROMPTS[0])]
  assert texts[-1] == whole['text'] and len(texts) > 1
  assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
  answer(asked(opened, streamed=True), GIVEN[:1])
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
    *_, last = writer.write_slowly(PROMPTS[0])
    assert last['text'] == found['text']


def test_compare_scores_each_text_both_ways(opened, capsys):
  writer = asked(opened, compared=True)
  result = writer.compare(PROMPTS)[1]
  assert result['plain']['latents_at'] == [] and result['augmented']['latents_at'] == [0]
  # A text scores what it had when it was written, and something else the other way.
  for name, other in (('plain', 'augmented'), ('augmented', 'plain')):
    nats, total = result[name]['nats'], sum(result[name]['logprobs'])
    assert nats[name] == pytest.approx(total, abs=1e-3)
    assert abs(nats[other] - total) > 1e-3
  answer(writer, GIVEN[1:])
  shown = capsys.readouterr().out
  assert len(set(map(len, shown.rstrip().splitlines()[-3:]))) == 1  # columns are aligned
  for name, title in (('plain', 'plain text'), ('augmented', 'text with latents')):
    row, = re.findall(f'{title}, {len(result[name]["tokens"])} tokens +(.*)', shown)
    assert re.findall(r'(\S+) \(', row) == [
        f'{result[name]["nats"][way]:.2f}' for way in ('plain', 'augmented')]


@pytest.mark.parametrize('more', [{}, {'streamed': True}, {'compared': True}], ids=str)
def test_several_texts_have_headings(opened, more, capsys):
  answer(asked(opened, **more), GIVEN)
  shown = capsys.readouterr().out
  places = [shown.index(f'==> {prompt.name} <==\n{prompt.text}') for prompt in GIVEN]
  assert places == sorted(places) and places[0] == 0


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(1.0)], ids=['greedy', 'sampled'])
def test_batches_write_the_same_texts(opened, sampling, capsys):
  """A text is drawn by its number among all prompts, whatever its batch is."""
  prompts = [Prompt(PROMPTS[0], f'prompt {number}') for number in (1, 2)]
  options, found = DecodingOptions(9, sampling, policy=ONCE), []
  for more in ({}, {'batch_size': 1}, {'streamed': True}):
    answer(asked(opened, options=options, seed=2**32 - 1, **more), prompts)
    found.append(capsys.readouterr().out)
  assert found[1:] == found[:1] * 2
  _, first, second = re.split('==> prompt . <==\n', found[0])
  assert (first == second) == (sampling == Sampling())


def test_prompts_are_checked_before_the_first_is_decoded(opened, monkeypatch):
  """The error names the line of the file."""
  monkeypatch.setattr(Writer, 'write', lambda *unused, **more: pytest.fail('decoding began'))
  with pytest.raises(UserError, match='b.txt, line 7 has 1501 tokens.*--length'):
    answer(asked(opened, batch_size=1), [*GIVEN, Prompt('long ' * 300, 'b.txt, line 7', 7)])


@pytest.mark.parametrize('more', [{}, {'streamed': True}, {'as_json': True}, {'compared': True}],
                         ids=str)
def test_latents_are_logged_in_words(opened, more, caplog):
  caplog.set_level(logging.INFO)
  options = DecodingOptions(12, policy=Policy(at=(0, 8)))
  answer(asked(opened, options=options, **more), GIVEN[:1])
  answer(asked(opened, options=options, batch_size=1, **more), GIVEN)
  said = [text for text in caplog.messages if 'latents' in text]
  assert said == ['latents were added at tokens 0, 8 of 12',
                  'latents were added 4 times in 24 tokens, to 2 of 2 texts']


@pytest.mark.parametrize('more', [{}, {'streamed': True}, {'compared': True}], ids=str)
def test_the_first_text_is_announced(opened, more, monkeypatch):
  tasks = []

  @contextlib.contextmanager
  def announced(task):
    tasks.append(task)
    yield

  monkeypatch.setattr('latent_deliberation.cli.generate.announced', announced)
  answer(asked(opened, batch_size=1, **more), GIVEN[:1])
  assert len(tasks) == 1


def test_no_latents_are_logged_too(opened, caplog):
  caplog.set_level(logging.INFO)
  options = DecodingOptions(5, policy=Policy(threshold=100.0))
  answer(asked(opened, options=options), GIVEN[:1])
  answer(asked(opened, options=DecodingOptions(5)), GIVEN[:1])
  assert [text for text in caplog.messages if 'latents' in text] == [
      'no latents were added in 5 tokens']


class Terminal(io.StringIO):
  """Lines that someone types; '^C' is Ctrl-C."""

  def isatty(self):
    return True

  def readline(self):
    line = super().readline()
    if line == '^C\n':
      raise KeyboardInterrupt
    return line


@pytest.mark.parametrize('streamed', [False, True])
def test_interrupt_ends_the_text_and_not_the_program(opened, streamed, monkeypatch, capsys):
  """What was decoded by then is shown."""
  writer = asked(opened, streamed=streamed)
  whole, = writer.write(PROMPTS[1:])
  real = Writer.write_slowly

  def slowly(self, prompt, first=0):
    for number, result in enumerate(real(self, prompt, first)):
      yield result
      if prompt == PROMPTS[0] and not number:
        raise KeyboardInterrupt

  monkeypatch.setattr(Writer, 'write_slowly', slowly)
  monkeypatch.setattr('sys.stdin', Terminal(f'^C\n{PROMPTS[0]}\n{PROMPTS[1]}\n'))
  answer(writer, [])
  shown = capsys.readouterr()
  begun, ended = shown.out.replace('prompt> ', '').split('\n', 1)
  assert begun.startswith(PROMPTS[0]) and len(begun) < len(PROMPTS[0]) + 24
  assert ended == PROMPTS[1] + whole['text'] + '\n'
  welcome, *later = shown.err.splitlines()
  assert 'Ctrl-D' in welcome and 'Ctrl-C' in welcome and any('ended' in line for line in later)


TEMPLATE = (
    '{{ bos_token }}{% for turn in messages %}<turn>{{ turn.role }}\n{{ turn.content }}<eos>'
    '{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}')
CHATTY = ByteTokenizer(Conventions(special={'<turn>': 3}, chat_template=TEMPLATE))


def test_conversation_goes_on_turn_by_turn(opened, monkeypatch, capsys):
  pytest.importorskip('jinja2')
  writer = Writer(opened[0], CHATTY, dataclasses.replace(AUGMENTED, chat=True))
  first, = writer.write(['hello'])
  monkeypatch.setattr('sys.stdin', io.StringIO('hello\nmore\n'))
  answer(writer, [])
  assert [(turn['role'], turn['content']) for turn in writer.history[:3]] == [
      ('user', 'hello'), ('assistant', first['text']), ('user', 'more')]
  expected = Writer(opened[0], CHATTY, writer.request, history=writer.history[:2]).write(['more'])
  assert capsys.readouterr().out == f'{first["text"]}\n{expected[0]["text"]}\n'


def test_typed_control_pieces_are_warned_of(opened, caplog):
  writer = Writer(opened[0], CHATTY, AUGMENTED)
  writer.check([Prompt('plain', 'prompt 1'), Prompt('a<turn>user', 'prompt 2')])
  text, = (message for message in caplog.messages if '--chat' in message)
  assert "prompt 2 has ['<turn>']" in text


def test_asks_for_prompts(writer, capsys, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO(
      f'{PROMPTS[0]}\n\n{"long " * 300}\ncaf\udce9\n{PROMPTS[1]}'))
  answer(writer, [])
  expected = ''.join(each['prompt'] + each['text'] + '\n' for each in (
      writer.write([prompt])[0] for prompt in PROMPTS))
  found = capsys.readouterr()
  assert found.out == expected
  # Errors go to stderr, since the output may be piped on.
  assert 'the prompt has 1501 tokens' in found.err and "'caf\\udce9'" in found.err


def test_typed_prompts_have_seeds_of_their_own(opened, capsys, monkeypatch):
  """The same prompt twice gives the two texts of two prompts in flags."""
  writer = asked(opened, options=DecodingOptions(9, Sampling(1.0), policy=ONCE), seed=3)
  monkeypatch.setattr('sys.stdin', io.StringIO(f'{PROMPTS[0]}\n{PROMPTS[0]}\n'))
  answer(writer, [])
  typed = capsys.readouterr().out
  texts = [PROMPTS[0] + writer.write([PROMPTS[0]], first=number)[0]['text'] + '\n'
           for number in range(2)]
  assert typed == ''.join(texts) and texts[0] != texts[1]


def test_prompts_come_from_flags_and_files(tmp_path):
  path, objects = tmp_path / 'lines.txt', tmp_path / 'lines.jsonl'
  path.write_bytes('\r\none\r\n  \ntwo\u2028and\x85more\r\n'.encode())
  objects.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "\u2028"}', 'utf-8')
  # Empty lines are skipped, and the others keep their numbers.
  assert read_prompts(['zero'], str(path)) == [
      Prompt('zero', 'prompt 1'), Prompt('one', f'{path}, line 2', 2),
      Prompt('two\u2028and\x85more', f'{path}, line 4', 4)]
  assert [(prompt.text, prompt.line) for prompt in read_prompts([], str(objects))] == [
      ('a\nb', 1), ('\u2028', 3)]


@pytest.mark.parametrize('name', ['a.JSONL', 'a.ndjson', 'a.json'])
def test_prompts_in_other_json_lines(tmp_path, name):
  (tmp_path / name).write_text('{"prompt": "a"}\r\n{"prompt": "b"}\r\n', 'utf-8-sig', newline='')
  assert [prompt.text for prompt in read_prompts([], str(tmp_path / name))] == ['a', 'b']


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_prompts_with_a_byte_order_mark(tmp_path, encoding):
  (tmp_path / 'a.txt').write_text('one\rmore\r\nzwölf\n', encoding, newline='')
  prompts = read_prompts([], str(tmp_path / 'a.txt'))
  assert [prompt.text for prompt in prompts] == ['one\rmore', 'zwölf']


@pytest.mark.parametrize('written, meant', [
    (r'\n', '\n'), (r'\n\nQ:', '\n\nQ:'), (r'\t', '\t'), (r'\\n', r'\n'), (r'\\\n', '\\\n'),
    (r'\w', r'\w'), ('\n', '\n'), ('größe', 'größe')])
def test_stop_strings_as_shells_pass_them(written, meant):
  assert read_stop(written) == meant


@pytest.mark.parametrize('name, content, message', [
    ('a.jsonl', b'[' * 10**5, 'line 1: .*"prompt"'),
    ('a.jsonl', b'{"prompt": "a"}\n{"text": "a"}\n', 'a.jsonl, line 2: .*"prompt"'),
    ('a.jsonl', b'{"prompt": 5}\n', 'line 1: .*"prompt" .*: it is 5'),
    ('a.jsonl', b'{"prompt": "\\ud800"}\n', r"a.jsonl, line 1 is '\\ud800', .*Unicode"),
    ('a.jsonl', b'\n{"prompt": ""}\n', 'a.jsonl, line 2 is empty'),
    ('a.txt', b'\n \n', 'a.txt is empty'), ('a.txt', b'', 'a.txt is empty'),
    ('a.txt', b'caf\xe9', 'a.txt is not UTF-8')])
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_prompts([], str(tmp_path / name))
  with pytest.raises(UserError, match='no file'):
    read_prompts([], 'nothing.txt')
  with pytest.raises(UserError, match='prompt 2 is empty'):
    read_prompts(['a', ''], '')


def test_background_compiles_first(opened, monkeypatch, capsys):
  """The coprocessor is compiled before the first prompt."""
  order = []
  monkeypatch.setattr(opened[0], 'warm_up', order.append)
  result = {'text': '', 'tokens': [5], 'latents_at': []}
  monkeypatch.setattr(Writer, 'write', lambda self, prompts, first: (
      order.append(prompts) or [result] * len(prompts)))
  monkeypatch.setattr(Writer, 'write_slowly', lambda self, prompt, first: iter([result]))
  options = DecodingOptions(4, policy=ONCE, timing=LatentTiming(None))
  answer(asked(opened, options=options), GIVEN)
  answer(asked(opened, options=options, streamed=True), GIVEN)
  answer(asked(opened, options=options, batch_size=1), GIVEN)
  assert order == [2, PROMPTS, 1, 1, PROMPTS[:1], PROMPTS[1:]]


@pytest.mark.parametrize('more, message', [
    (dict(as_json=True, streamed=True), '--stream .*--json'),
    (dict(compared=True, streamed=True), '--stream .*--compare'),
    (dict(compared=True, options=DecodingOptions(4, policy=NEVER)), '--compare .*--coprocessor'),
    (dict(cache='there', options=DecodingOptions(4, timing=LatentTiming(None))),
     '--cache=there .*--background'),
    (dict(cache='there', options=DecodingOptions(4), chat=True), '--cache=there .*--chat'),
    (dict(options=DecodingOptions(10, policy=Policy(at=(0, 100)))), '--at=100 .*--max_tokens=10'),
    (dict(options=DecodingOptions(10, policy=Policy(at=(10,)))), '--at=10 .*--max_tokens=10.* 9'),
    (dict(seed=-1), 'seed = -1'), (dict(seed=2**32), 'seed = 4294967296'),
    (dict(batch_size=-1), 'batch_size = -1'), (dict(batch_size=10**30), 'batch_size = 1000'),
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
