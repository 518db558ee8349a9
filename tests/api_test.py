"""The public API gives what the launch scripts and the decoder itself give."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import latent_deliberation as ld
from latent_deliberation.cli.generate import Request, Writer
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.engine import open_engine
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import Decoder
from tests import finished

PROMPTS, CONTINUATIONS = ['Document 3: the', 'the 7th of the forty. the'], [' 3th of', ' 7']
LENGTH = 100


@pytest.fixture(scope='module')
def decoder(quickstart):
  return ld.load_decoder(quickstart / 'pretraining/decoder')


@pytest.fixture(scope='module')
def generator(quickstart, decoder):
  return ld.Generator(decoder, ld.load_coprocessor(quickstart / 'coprocessor'), length=LENGTH)


def test_generate_is_launch_generate(quickstart, generator):
  """Tokens, text and log-probabilities are those of the Writer of launch/generate.py."""
  opened = open_engine(quickstart / 'pretraining/decoder', str(quickstart / 'coprocessor'),
                       length=LENGTH)
  sampling = dict(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01)
  for augment, policy in ((True, ONCE), (None, ONCE), (False, NEVER)):
    found = generator.generate(PROMPTS, max_tokens=20, augment=augment, seeds=[3, 4], **sampling)
    request = Request(DecodingOptions(20, Sampling(**sampling), policy=policy), seed=3)
    assert all(completion.experts == {} for completion in found)
    written = [{'experts': {}, **result} for result in Writer(*opened, request).write(PROMPTS)]
    assert [{'prompt': prompt, **vars(completion)} for prompt, completion in zip(
        PROMPTS, found, strict=True)] == written


def test_stop_strings_end_a_completion(generator):
  whole, = generator.generate(PROMPTS[:1], max_tokens=20)
  stop = whole.text[5:8]
  found, = generator.generate(PROMPTS[:1], max_tokens=20, stop=[stop])
  assert found.finish_reason == 'stop'
  assert found.text == whole.text[:whole.text.index(stop)]


def test_batches_change_only_rounding(generator):
  """Each prompt is drawn by its own seed, whatever its batch is."""
  together, alone = (generator.generate(PROMPTS, max_tokens=9, temperature=1.0, batch_size=size)
                     for size in (0, 1))
  assert [each.tokens for each in alone] == [each.tokens for each in together]
  scores = generator.score(PROMPTS, CONTINUATIONS)
  assert ld.score(generator, PROMPTS, CONTINUATIONS) == scores
  for alone, other in zip(generator.score(PROMPTS, CONTINUATIONS, batch_size=1), scores,
                          strict=True):
    assert alone == pytest.approx(other, abs=1e-4)


def test_plain_score_is_decoder_logprob(quickstart, decoder, generator):
  """Without latents, a score is the sum of what the uncached decoder gives."""
  config, params = weights.load(quickstart / 'pretraining/decoder')
  for prompt, continuation, score in zip(
      PROMPTS, CONTINUATIONS, generator.score(PROMPTS, CONTINUATIONS, augment=False),
      strict=True):
    tokens = decoder.tokenizer.encode(prompt + continuation)
    logits, _ = Decoder(config).apply({'params': params}, jnp.array([tokens]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(len(tokens) - 1),
                                                              tokens[1:]]
    assert score.num_tokens == len(continuation)
    assert score.nats == pytest.approx(logprobs[-score.num_tokens:].sum(), abs=1e-4)


@pytest.mark.parametrize('augment', [False, True])
def test_score_is_sum_of_generated_logprobs(generator, augment):
  """A text that was generated, with latents or without, scores what its tokens had."""
  completions = generator.generate(PROMPTS, max_tokens=9, augment=augment)
  texts = [completion.text for completion in completions]
  for completion, text in zip(completions, texts, strict=True):
    assert generator.tokenizer.encode(text)[1:] == completion.tokens
  for completion, score in zip(
      completions, generator.score(PROMPTS, texts, augment=augment), strict=True):
    assert score.num_tokens == len(completion.tokens)
    assert score.nats == pytest.approx(sum(completion.logprobs), abs=1e-4)


def test_detached_coprocessor_changes_no_bit(quickstart, decoder):
  """Scores after latents were attached and given up are those before, and the plain decoder's."""
  generator = ld.Generator(decoder, ld.load_coprocessor(quickstart / 'coprocessor'), length=LENGTH)
  before = generator.score(PROMPTS, CONTINUATIONS, augment=False)
  augmented = generator.score(PROMPTS, CONTINUATIONS)
  assert generator.score(PROMPTS, CONTINUATIONS, augment=False) == before
  assert all(abs(one.nats - other.nats) > 1e-3
             for one, other in zip(augmented, before, strict=True))
  # A cache without room for latents has another shape, so that sums round otherwise.
  plain = ld.Generator(decoder, length=LENGTH).score(PROMPTS, CONTINUATIONS)
  np.testing.assert_allclose(plain, before, rtol=1e-6)


def test_experts_are_coprocessors(quickstart, decoder, generator):
  """Each prompt has its own expert; a coprocessor without a card may be one."""
  loaded = ld.load_coprocessor(quickstart / 'coprocessor')
  several = ld.Generator(decoder, experts={'own': loaded, 'twin': loaded}, length=LENGTH)
  options = dict(max_tokens=9, temperature=0.8, seeds=[3, 4])
  expected = generator.generate(PROMPTS, **options)
  for expert, mixes in (('own', [{'own': 1}] * 2), (['twin', 'own'], [{'twin': 1}, {'own': 1}]),
                        ({'own': 0.5, 'twin': 0.5}, [{'own': 0.5, 'twin': 0.5}] * 2)):
    found = several.generate(PROMPTS, expert=expert, **options)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.experts for each in found] == mixes
    for one, other in zip(
        several.score(PROMPTS, CONTINUATIONS, expert=expert),
        generator.score(PROMPTS, CONTINUATIONS), strict=True):
      assert one == pytest.approx(other, abs=1e-4)
  plain = several.generate(PROMPTS, **options)
  mixed = several.generate(PROMPTS, expert=[None, 'own'], **options)
  assert vars(mixed[0]) == vars(plain[0]) and mixed[1].logprobs != plain[1].logprobs
  assert several.generate(PROMPTS, expert='own', augment=False, **options) == plain
  several.experts.detach('twin')
  assert several.generate(PROMPTS, expert='twin', **options) == plain
  for call, message in (
      (lambda: several.generate(PROMPTS, expert=['own']), '1 for 2 prompts'),
      (lambda: several.generate(PROMPTS, augment=True), 'augment = True: with experts'),
      (lambda: generator.generate(PROMPTS, expert='own'), "expert = 'own' without experts"),
      (lambda: ld.Generator(decoder, loaded, experts={}), 'coprocessor and experts')):
    with pytest.raises(ld.UserError, match=message):
      call()


def test_wrong_pairs_are_refused(quickstart, tmp_path, decoder):
  config, params = weights.load(quickstart / 'pretraining/decoder')
  vocabulary = weights.open_checkpoint(quickstart / 'pretraining/decoder').vocabulary_hash
  weights.save(tmp_path / 'other', config, jax.tree.map(np.negative, params), vocabulary)
  other = ld.load_decoder(tmp_path / 'other')
  coprocessor = ld.load_coprocessor(quickstart / 'coprocessor')
  with pytest.raises(ld.UserError,
                     match=f'fingerprint {decoder.fingerprint}, .*{other.fingerprint}'):
    ld.Generator(other, coprocessor)


def test_bad_calls_are_refused(quickstart, tmp_path, decoder, generator):
  plain = ld.Generator(decoder, length=LENGTH)
  for call, message in (
      (lambda: ld.load_decoder(tmp_path / 'nothing'), 'nothing'),
      (lambda: ld.load_decoder(quickstart / 'pretraining/decoder', dtype='int8'), 'int8'),
      (lambda: ld.load_decoder(quickstart / 'pretraining/decoder', dtype='float16'), 'float16'),
      (lambda: ld.load_coprocessor(tmp_path), 'no trained coprocessor'),
      (lambda: plain.generate(PROMPTS, augment=True), 'augment = True'),
      (lambda: generator.generate('one text'), "prompts = 'one text'"),
      (lambda: generator.generate(PROMPTS, stop='.'), "stop = '.'"),
      (lambda: generator.generate(PROMPTS, temperature=-1), 'temperature = -1'),
      (lambda: generator.generate(PROMPTS, seeds=[1]), '1 seeds .* 2 texts'),
      (lambda: generator.generate(['a' * LENGTH]), 'text 0 has 101 tokens'),
      (lambda: generator.score(PROMPTS, CONTINUATIONS[:1]), '2 prompts and 1 continuations'),
      (lambda: generator.score(PROMPTS, ['a', 'a' * LENGTH]), 'text 1 has 126 tokens'),
      (lambda: generator.score(PROMPTS, ['a', '']), 'continuation 1 is empty'),
      (lambda: generator.generate(PROMPTS, max_tokens=2.5), 'max_tokens = 2.5'),
      (lambda: generator.generate(PROMPTS, augment='no'), "augment = 'no'"),
      (lambda: generator.generate([3]), 'prompts holds 3'),
      (lambda: generator.generate(['\ud800']), 'one of prompts is .* not Unicode'),
      (lambda: generator.generate(PROMPTS, chat=True), 'no chat template'),
      (lambda: generator.generate(PROMPTS, batch_size=-1), 'batch_size = -1'),
      (lambda: generator.generate(PROMPTS, seeds=[0, 2**32]), 'seed = 4294967296'),
      (lambda: generator.generate(PROMPTS, max_tokens=10**30), 'max_tokens = 1000'),
      (lambda: generator.generate(PROMPTS, max_tokens=2**31 - 1), 'text 1 has 26 tokens'),
      (lambda: generator.generate(PROMPTS, top_k=10**30), 'top_k = 1000'),
      (lambda: ld.Generator(decoder, length=0.5), 'length = 0.5'),
      (lambda: ld.Generator(decoder, length=2**31), 'length = 2147483648'),
      (lambda: generator.score(PROMPTS, CONTINUATIONS, batch_size=0.5), 'batch_size = 0.5'),
      (lambda: ld.Generator('a/directory'), "decoder = 'a/directory'"),
      (lambda: ld.Generator(decoder, decoder), 'coprocessor = ')):
    with pytest.raises(ld.UserError, match=message):
      call()


def test_file_names_the_decoder(quickstart, decoder):
  directory = quickstart / 'pretraining/decoder'
  path = next(filter(Path.is_file, directory.iterdir()))
  loaded = ld.load_decoder(path, vocabulary='byte', dtype='bfloat16')
  assert loaded.fingerprint == decoder.fingerprint
  # Matrices are rounded when they are loaded. Norms are computed in float32, from float32.
  dtypes = {path[-1].key: leaf.dtype.name
            for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params['embedder'])
            + jax.tree_util.tree_leaves_with_path(loaded.params['transformer'].blocks[0]['params'])}
  assert dtypes == {'table': 'bfloat16', 'w': 'bfloat16', 'scale': 'float32'}
  completion, = ld.Generator(loaded, length=LENGTH).generate(PROMPTS[:1], max_tokens=2)
  assert isinstance(completion, ld.TextCompletion) and len(completion.tokens) == 2


def test_gguf_file_is_a_decoder(tmp_path):
  """A GGUF file is opened itself, whatever else its directory has."""
  for name in ('one.gguf', 'two.gguf'):
    (tmp_path / name).write_bytes(b'GGUF')
  with pytest.raises(ld.UserError, match=r'/one\.gguf .*GGUF file'):
    ld.load_decoder(tmp_path / 'one.gguf')


def test_import_is_cheap():
  """The package loads nothing of itself, and no jax, before a name is used."""
  code = ("import sys, latent_deliberation as ld; assert 'jax' not in sys.modules; "
          "assert set(ld.__all__) <= set(dir(ld)); print([getattr(ld, name).__name__ "
          "for name in ld.__all__])")
  process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           env=finished.environment(), timeout=120)
  assert process.stdout == f'{ld.__all__}\n', process.stderr
  with pytest.raises(AttributeError, match='nothing'):
    ld.nothing  # noqa: B018
