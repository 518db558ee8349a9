"""Experts attached at run time are the coprocessors that they are made of, and leave no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from latent_deliberation.errors import UserError
from latent_deliberation.experts import attach
from latent_deliberation.experts.attach import Experts, ExpertSource
from latent_deliberation.experts.package import write_package
from latent_deliberation.inference import decode, passes
from latent_deliberation.inference.background import LatentTiming
from latent_deliberation.inference.engine import build_engine
from latent_deliberation.inference.policy import NEVER, ONCE, Policy
from latent_deliberation.inference.session import generate, score
from tests import tiny
from tests.experts import small
from tests.inference.small import PROMPTS, assert_same, decoding

OPTIONS = decoding(ONCE)


@pytest.fixture(scope='module')
def trio():
  """Two experts of adapters, and one of a whole transformer."""
  return small.experts(stars=small.lora(1), law=small.lora(2), poems=small.coprocessor(3))


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: said.append(text % values))
  return said


def decoded(experts, choices, options=OPTIONS, prompts=PROMPTS):
  return generate(experts.engine, prompts, options, source=experts.source(choices))


def assert_close(found, expected):
  for one, other in zip(found, expected, strict=True):
    assert one.tokens == other.tokens and one.latents_at == other.latents_at
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-5)


@pytest.mark.parametrize('name, trained', [
    ('stars', small.lora(1)), ('law', small.lora(2)), ('poems', small.coprocessor(3))],
    ids=['stars', 'law', 'poems'])
def test_expert_is_its_coprocessor(trio, name, trained):
  """An expert that all texts name gives what an engine with its coprocessor gives."""
  assert_close(decoded(trio, [name] * 3), generate(small.engine_of(trained), PROMPTS, OPTIONS))


@pytest.mark.parametrize('trained', [small.lora(1), small.coprocessor(3)], ids=['lora', 'full'])
def test_bfloat16_expert_is_its_coprocessor(trained):
  """An expert computes as a coprocessor does, in the dtypes of its engine."""
  decoder = dataclasses.replace(small.decoder(), dtype='bfloat16')
  experts = Experts(decoder, {'stars': trained}, length=small.LENGTH, strict=True)
  engine = build_engine(decoder, trained, small.LENGTH)
  for one, other in zip(decoded(experts, ['stars'] * 3), generate(engine, PROMPTS, OPTIONS),
                        strict=True):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
  # Matrices of its own are rounded once. This decoder was not loaded, and keeps its float32.
  expected = 'bfloat16' if trained.config.trainable == 'full' else 'float32'
  for weights in (experts._attached['stars'].weights, engine.weights):
    matrices = [leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(
        weights.coprocessor_layers) if path[-1].key in ('w', 'transposed')]
    assert set(matrices) == {expected}
  found = experts.reader.coprocessor
  assert found.activations == engine.model.coprocessor.activations == 'float32'


@pytest.mark.parametrize('positions', ['share', 'shift'])
@pytest.mark.parametrize('latents', ['paper', 'anchored'])
def test_other_forms_attach_alone(latents, positions):
  """Latents after the anchor work, too, but have no weights."""
  trained = small.lora(1, latents=latents, positions=positions)
  experts = small.experts(
      stars=trained, law=small.lora(2, latents=latents, positions=positions))
  assert_close(decoded(experts, ['stars'] * 3),
               generate(small.engine_of(trained), PROMPTS, OPTIONS))
  for choice in ({'stars': 0.5}, {'stars': 1.0, 'law': 1.0}):
    with pytest.raises(UserError, match=f'only refining .* {latents}'):
      experts.mix(choice)
  # A weight of zero is none of them; `verify` relies on it.
  assert experts.mix({'stars': 0.0}) == {} and experts.mix({'stars': 0.0, 'law': 1.0}) == {'law': 1}
  for name in ('stars', 'law'):
    experts.detach(name)
  assert experts.attach('poems', small.lora(3))  # of another form, now that nobody has this one


def test_rows_have_experts_of_their_own(trio):
  """A mixed batch is each text with its own expert, and a text without one is plain to the bit."""
  plain = generate(trio.engine, PROMPTS, decoding(NEVER))
  together = decoded(trio, ['law', None, 'poems'])
  assert_same(together[1:2], plain[1:2])
  for row, name in ((0, 'law'), (2, 'poems')):
    assert_close(together[row:row + 1], decoded(trio, [name] * 3)[row:row + 1])
    assert together[row].logprobs != plain[row].logprobs
  assert [completion.latents_at for completion in together] == [[0], [], [0]]


def test_every_group_size(trio):
  """Groups of 1 to 5 of six texts, which are padded to powers of two, are the texts alone."""
  prompts = [*PROMPTS, *(prompt[::-1] for prompt in PROMPTS)]
  whole = [np.asarray(trio.augment(trio.engine.read(prompts), [{name: 1.0}] * 6).logits)
           for name in ('stars', 'law')]
  state = trio.engine.read(prompts)
  for count in range(1, 6):
    mixes = [{'stars': 1.0}] * count + [{'law': 1.0}] * (6 - count)
    found = np.asarray(trio.augment(state, mixes).logits)
    np.testing.assert_allclose(found, np.concatenate([whole[0][:count], whole[1][count:]]),
                               atol=5e-5)


def test_weights_add_up(trio, monkeypatch):
  """z = base + sum of weight * gate(output): as the passes of training say for each part."""
  state = trio.engine.read(PROMPTS)
  config = tiny.CHOICES
  last = np.array([[*prompt[-config.num_latents:]] for prompt in PROMPTS])
  base = tiny.embed(tiny.decoder_params(), jnp.asarray(last))
  parts = {name: np.asarray(passes.coprocess(trio._attached[name].model,
                                             trio._attached[name].weights, state))
           for name in trio.names}
  assert all(np.abs(part).max() > 0.05 for part in parts.values())
  given = {}
  original = passes.read_latents

  def watch(model, weights, state, added):
    given['added'] = added
    return original(model, weights, state, added)

  monkeypatch.setattr(passes, 'read_latents', watch)
  trio.augment(state, [{'stars': 0.5, 'poems': 2.0}, {'law': -1.0}, {'stars': 1, 'law': 1}])
  expected = np.stack([0.5 * parts['stars'][0] + 2 * parts['poems'][0], -parts['law'][1],
                       parts['stars'][2] + parts['law'][2]])
  np.testing.assert_allclose(given['added'], expected, atol=1e-5)
  # The decoder reads base + added, as it would read any embeddings there.
  _, cache = None, tiny.read(tiny.decoder_params(), np.array([PROMPTS[0]]))[2]
  kept = len(PROMPTS[0]) - config.num_latents
  _, logits, _ = tiny.read_on(
      tiny.decoder_params(), base[:1] + expected[:1], jnp.arange(kept, len(PROMPTS[0])),
      tiny.truncate(cache, kept))
  found = trio.augment(state, [{'stars': 0.5, 'poems': 2.0}, {}, {}])
  np.testing.assert_allclose(found.logits[0], logits[0, -1], atol=5e-5)


def test_weight_zero_is_the_plain_decoder(trio):
  """A weight of zero leaves no bit, and tiny ones little: latents are then the base tokens."""
  plain = generate(trio.engine, PROMPTS, decoding(NEVER))
  assert_same(decoded(trio, [{'stars': 0.0}] * 3), plain)
  for one, other in zip(decoded(trio, [{'stars': 1e-9}] * 3), plain, strict=True):
    assert one.tokens == other.tokens and one.latents_at == [0]
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-5)


def test_switching_leaves_no_bit():
  """Attaching, switching and detaching leave the decoder's own bits as they were."""
  experts = small.experts(stars=small.lora(1))
  state = experts.engine.read(PROMPTS)
  before = jax.tree.map(np.array, state)
  plain = generate(experts.engine, state, decoding(NEVER))
  first = decoded(experts, ['stars'] * 3)
  experts.attach('law', small.lora(2))
  assert_same(decoded(experts, ['stars'] * 3), first)
  assert decoded(experts, ['law'] * 3)[0].logprobs != first[0].logprobs
  assert_same(generate(experts.engine, state, decoding(NEVER)), plain)
  experts.detach('stars')
  assert experts.names == ('law',)
  with pytest.raises(UserError, match="no expert 'stars'"):
    experts.mix('stars')
  experts.attach('stars', small.lora(1))
  assert_same(decoded(experts, ['stars'] * 3), first)
  assert_same(generate(experts.engine, state, decoding(NEVER)), plain)
  jax.tree.map(np.testing.assert_array_equal, state, before)


def test_many_experts_share_weights_and_programs(trio):
  """Ten experts hold the decoder's own arrays, and compile nothing that two have not."""
  many = small.experts(**{f'n{seed}': small.lora(seed) for seed in range(1, 11)})
  shared = {id(leaf) for leaf in jax.tree.leaves(small.decoder().params)}
  own = 0
  for each in many._attached.values():
    leaves = jax.tree.leaves(each.weights)
    own = sum(leaf.size for leaf in leaves if id(leaf) not in shared)
    assert own == sum(leaf.size for leaf in jax.tree.leaves(small.lora(1).params))
  decoded(many, ['n1', 'n2', None])
  counts = [attach._add._cache_size(), decode.decode._cache_size(), passes.read._cache_size()]
  for names in (['n3', 'n4', None], ['n9', None, 'n10']):
    decoded(many, names)
  assert [attach._add._cache_size(), decode.decode._cache_size(),
          passes.read._cache_size()] == counts


@pytest.mark.parametrize('delay', [0, 3, None])
def test_broken_expert_spares_the_others(warnings, delay):
  """Only the texts of an expert whose weights are not finite stay plain, with one warning."""
  experts = small.experts(stars=small.lora(1), bad=small.broken(small.lora(2)))
  options = dataclasses.replace(OPTIONS, timing=LatentTiming(delay=3 if delay is None else delay))
  plain = generate(experts.engine, PROMPTS, decoding(NEVER))
  good = decoded(experts, ['stars', None, 'stars'], options)
  found = decoded(experts, ['stars', 'bad', 'stars'], options)
  assert_same(found[1:2], plain[1:2])
  assert_close(found[::2], good[::2])
  assert len(warnings) == 1 and 'not finite' in warnings[0]


def test_failing_pass_keeps_the_plain_stream(monkeypatch, warnings):
  """Whatever becomes of the experts, the decoder's own stream continues."""
  experts = small.experts(stars=small.lora(1))
  plain = generate(experts.engine, PROMPTS, decoding(NEVER))

  def fail(*unused):
    raise RuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(attach, '_add', fail)
  assert_same(decoded(experts, ['stars'] * 3), plain)
  assert 'RESOURCE_EXHAUSTED' in warnings[0] and experts.engine.stats.failed == 1


def test_scores_are_decoded_logprobs(trio):
  """Given tokens score as when they were drawn, with the same experts."""
  names = ['law', None, {'stars': 0.5, 'poems': 0.5}]
  drawn = decoded(trio, names)
  found = score(trio.engine, PROMPTS, [each.tokens for each in drawn], OPTIONS,
                source=trio.source(names))
  assert_same(found, drawn)


def test_experts_deliberate_again(trio):
  """Latents of a row's own expert are renewed at other places, too."""
  options = decoding(Policy(at=(0, 5)))
  found = decoded(trio, ['law', None, 'stars'], options)
  alone = generate(small.engine_of(small.lora(2)), PROMPTS, options)
  assert_close(found[:1], alone[:1])
  assert [completion.latents_at for completion in found] == [[0, 5], [], [0, 5]]


def test_gates_stay_closed_without_an_expert(trio):
  """A text without an expert never stops the loop, and its gate does not hold up the others."""
  options = decoding(Policy(threshold=0.0, min_gap=4))
  found = decoded(trio, ['law', None, None], options)
  plain = generate(trio.engine, PROMPTS, decoding(NEVER))
  assert found[0].latents_at and not found[1].latents_at
  assert_same(found[1:], plain[1:])


class Fixed:
  """A router that gives what it is told."""

  def __init__(self, names, scores):
    self.names, self._scores, self.queries = names, np.array(scores), []

  def scores(self, query):
    self.queries.append(query)
    return self._scores


def test_auto_takes_the_best_or_none(trio):
  router = Fixed(['stars', 'law'], [[-1.0, 2.0], [-1.0, -2.0], [3.0, 2.0]])
  experts = Experts(small.decoder(), {'stars': small.lora(1), 'law': small.lora(2)},
                    length=small.LENGTH, router=router)
  source = experts.source(['auto', 'auto', 'law'], ['a', 'b', 'c'])
  found = generate(experts.engine, PROMPTS, OPTIONS, source=source)
  assert source.mixes == [{'law': 1.0}, {}, {'law': 1.0}]
  assert_same(found, decoded(experts, ['law', None, 'law']))
  query, = router.queries
  assert query.texts == ['a', 'b', 'c'] and query.hidden.shape == (3, tiny.CONFIG.embed_dim)


def test_failing_router_chooses_none(warnings):
  experts = Experts(small.decoder(), {'stars': small.lora(1)}, length=small.LENGTH,
                    router=Fixed(['stars'], 'no numbers'))
  source = experts.source(['auto'] * 3)
  assert_same(generate(experts.engine, PROMPTS, OPTIONS, source=source),
              generate(experts.engine, PROMPTS, decoding(NEVER)))
  assert source.mixes == [{}] * 3 and len(warnings) == 1 and 'the router failed' in warnings[0]


def test_router_of_a_detached_expert_chooses_none(warnings):
  """A router of one's own may not know that an expert has gone."""
  experts = Experts(small.decoder(), {'law': small.lora(2)}, length=small.LENGTH,
                    router=Fixed(['stars', 'law'], [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
  source = experts.source(['auto'] * 3)
  assert_same(generate(experts.engine, PROMPTS, OPTIONS, source=source),
              generate(experts.engine, PROMPTS, decoding(NEVER)))
  assert source.mixes == [{}] * 3
  assert len(warnings) == 1 and "['stars'], which are not attached" in warnings[0]


def test_short_auto_text_is_plain():
  """'auto' leaves a text alone that is too short for latents; a named expert is refused there."""
  experts = Experts(small.decoder(), {'stars': small.lora(1)}, length=small.LENGTH,
                    router=Fixed(['stars'], [[1.0], [1.0]]))
  prompts = [PROMPTS[0], PROMPTS[1][:2]]
  found = decoded(experts, ['auto', 'auto'], prompts=prompts)
  assert [completion.latents_at for completion in found] == [[0], []]
  with pytest.raises(UserError, match='text 1 has 2 tokens'):
    experts.check_lengths([{}, {'stars': 1.0}], np.array([5, 2]))


def foreign(case):
  other = small.lora(2)
  if case == 'other decoder':
    return dataclasses.replace(other, decoder_fingerprint='d1')
  if case == 'other architecture':
    return dataclasses.replace(other, decoder_config=dataclasses.replace(tiny.CONFIG, window=9))
  if case == 'other vocabulary':
    return dataclasses.replace(other, vocabulary_hash='v1')
  if case == 'other number':
    return small.lora(2, num_latents=2)
  if case == 'other form':
    return small.lora(2, latents='anchored')
  if case == 'reads states':
    return small.lora(2, reads='states')
  return 3


@pytest.mark.parametrize('case, message', [
    ('other decoder', 'fingerprint d1'), ('other architecture', 'decoder.window'),
    ('other vocabulary', 'vocabulary v1'), ('other number', '2 refining .* 3 refining'),
    ('other form', '3 anchored .* 3 refining'), ('reads states', "reads = 'states'"),
    ('no expert', 'load_expert')])
def test_foreign_expert_leaves_the_plain_text(warnings, case, message):
  """It is left out with one warning, or refused with `strict`."""
  named = {'stars': small.lora(1), 'bad': foreign(case)}
  experts = Experts(small.decoder(), named, length=small.LENGTH)
  assert experts.names == ('stars',)
  found = decoded(experts, ['stars', 'bad', None])
  assert_same(found[1:], generate(experts.engine, PROMPTS, decoding(NEVER))[1:])
  assert len(warnings) == 1 and "'bad'" in warnings[0]
  with pytest.raises(UserError, match=message):
    Experts(small.decoder(), named, length=small.LENGTH, strict=True)


def test_package_in_the_home(tmp_path, monkeypatch):
  """A ~ stands for the home directory."""
  monkeypatch.setenv('HOME', str(tmp_path))
  write_package(tmp_path / 'stars', small.card(), small.lora(1))
  experts = Experts(small.decoder(), {'stars': '~/stars'}, length=small.LENGTH, strict=True)
  assert experts.names == ('stars',)


def test_package_of_another_decoder_is_not_loaded(tmp_path, monkeypatch):
  """Its card is enough to refuse it, however large it is."""
  base = {'name': 'large', 'fingerprint': 'd1'}
  write_package(tmp_path / 'stars', small.card(base=base),
                dataclasses.replace(small.lora(1), decoder_fingerprint='d1'))
  monkeypatch.setattr(attach, 'load_package', lambda *unused: pytest.fail('it was loaded'))
  with pytest.raises(UserError, match="'stars' was made for large, weights d1"):
    Experts(small.decoder(), {'stars': tmp_path / 'stars'}, length=small.LENGTH, strict=True)


def test_router_knows_the_experts_of_now():
  """Also where an expert was attached while another thread made the router."""
  experts = Experts(small.decoder(), {'stars': small.lora(1)}, length=small.LENGTH)
  assert experts.router() is experts.router()
  slow = experts.router()
  experts.attach('law', small.lora(2))
  assert list(experts.router().names) == ['stars', 'law']
  experts._made_router = (experts._made_router[0], slow)
  experts.detach('stars')
  assert list(experts.router().names) == ['law']


def test_unknown_name_leaves_the_plain_text(warnings):
  experts = Experts(small.decoder(), {'stars': small.lora(1)}, length=small.LENGTH)
  for _ in range(2):
    assert experts.mix('moon') == {}
  assert len(warnings) == 1 and "'moon'" in warnings[0]
  with pytest.raises(UserError, match="no expert 'moon'"):
    small.experts(stars=small.lora(1)).mix('moon')


def test_bad_requests(trio):
  for call, message in (
      (lambda: trio.attach('stars', small.lora(1)), "'stars' is attached already"),
      (lambda: trio.attach('auto', small.lora(1)), "name = 'auto'"),
      (lambda: trio.attach('../x', small.lora(1)), "name = '../x'"),
      (lambda: trio.detach('moon'), "no expert 'moon'"),
      (lambda: trio.mix({}), 'expert = {}'), (lambda: trio.mix(3), 'expert = 3'),
      (lambda: trio.mix({'stars': float('nan')}), 'weight .* nan'),
      (lambda: trio.mix({'stars': '1'}), "weight .* '1'"),
      (lambda: Experts(small.decoder(), {}, router='best'), "router = 'best'"),
      (lambda: Experts(small.decoder(), {}, length=0), 'length = 0')):
    with pytest.raises(UserError, match=message):
      call()


def test_no_expert_is_the_plain_decoder():
  """An empty generator decodes, and takes its first expert at run time."""
  experts = Experts(small.decoder(), {}, length=small.LENGTH)
  plain = generate(experts.engine, PROMPTS, decoding(NEVER))
  assert_same(decoded(experts, [None] * 3), plain)
  assert ExpertSource(experts, [{}, {}]).is_plain
  assert experts.attach('stars', small.lora(1))
  assert_close(decoded(experts, ['stars'] * 3),
               generate(small.engine_of(small.lora(1)), PROMPTS, OPTIONS))
