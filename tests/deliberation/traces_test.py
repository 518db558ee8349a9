"""Anchors are drawn evenly from all places that can hold a trace, and their latents placed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.array_types import Batch
from latent_deliberation.deliberation.deliberation_config import LATENTS, DeliberationConfig
from latent_deliberation.deliberation.traces import gather_traces, place, sample_traces
from tests import tiny

# Documents of 7, 4 and 8 tokens; of 9, 6 and four of padding; of 2, 1 and sixteen of padding.
DOCUMENTS = [(7, 4, 8), (9, 6), (2, 1)]
PLACES = {  # with a next token in their document, and two tokens before them for 'refining'
    'after': [[*range(6), *range(7, 10), *range(11, 18)], [*range(8), *range(9, 14)], [0]],
    'refining': [[*range(2, 6), 9, *range(13, 18)], [*range(2, 8), *range(11, 14)], []],
}


draw = jax.jit(sample_traces, static_argnames='config')


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def sample(latents, num_traces, seed=0):
  batch = tiny.packed_batch(DOCUMENTS)
  config = dataclasses.replace(tiny.CHOICES, latents=latents, num_traces=num_traces)
  return draw(keys(3, seed), batch, config)


@pytest.mark.parametrize('latents', LATENTS)
def test_all_places_drawn_once(latents):
  """With enough traces, every place is drawn once and in order."""
  traces = sample(latents, num_traces=18)
  for text, places in enumerate(PLACES['refining' if latents == 'refining' else 'after']):
    assert traces.valid[text].tolist() == [True] * len(places) + [False] * (18 - len(places))
    assert traces.anchors[text, :len(places)].tolist() == places
    assert not traces.ahead_valid[text, len(places):].any()


def test_fewer_traces():
  """Fewer traces are distinct and sorted, and change with the key."""
  draws = [sample('refining', 4, seed) for seed in range(5)]
  for traces in draws:
    anchors = np.asarray(traces.anchors)[:2]
    assert traces.valid[:2].all() and not traces.valid[2].any()
    assert (np.diff(anchors, axis=1) > 0).all()
  assert len({draw.anchors.tobytes() for draw in map(jax.device_get, draws)}) == 5


def test_ahead_tokens_end():
  """Ahead tokens end with the document and with the trunk."""
  batch = tiny.packed_batch(DOCUMENTS)
  anchors = jnp.array([[0, 4, 15], [7, 12, 13], [0, 0, 0]])
  valid = jnp.array([[True] * 3, [True] * 3, [True, True, False]])
  traces = gather_traces(batch, anchors, valid, num_ahead=4)
  assert traces.ahead_valid.sum(axis=-1).tolist() == [[4, 2, 3], [1, 2, 1], [1, 1, 0]]
  for text, trace, ahead in np.argwhere(traces.ahead_valid):
    assert (traces.ahead_tokens[text, trace, ahead]
            == batch.tokens[text, anchors[text, trace] + 1 + ahead])
  # A prefix of the ahead tokens is valid, and none after an invalid one.
  assert (np.diff(traces.ahead_valid.astype(int), axis=-1) <= 0).all()


def test_delays():
  """Delays are drawn evenly and change no anchor."""
  batch = tiny.packed_batch(DOCUMENTS[:1] * 300)
  late = draw(keys(300), batch, dataclasses.replace(tiny.CHOICES, max_delay=2))
  at_once = draw(keys(300), batch, tiny.CHOICES)
  assert at_once.delay is None
  np.testing.assert_array_equal(late.anchors, at_once.anchors)
  counts = np.bincount(np.ravel(late.delay))
  assert counts.shape == (3,) and counts.min() > 300 and counts.sum() == 1200


def test_counted():
  """An ahead token counts only where latents had a chance to predict it."""
  batch = tiny.packed_batch([(12,)])
  anchors = jnp.array([[0, 1, 2, 8]])
  traces = gather_traces(batch, anchors, jnp.ones_like(anchors, bool), num_ahead=4)
  assert (traces.counted == traces.ahead_valid).all()
  delayed = traces.replace(delay=jnp.array([[0, 1, 2, 1]]))
  assert delayed.counted.astype(int)[0].tolist() == [
      [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]


def test_padding_has_no_trace():
  """A text of padding alone has no trace."""
  nothing = jnp.zeros((1, tiny.LENGTH), jnp.int32)
  traces = draw(keys(1), Batch(nothing, nothing, nothing), tiny.CHOICES)
  assert not traces.valid.any() and not traces.ahead_valid.any()


def test_draw_is_per_text():
  """A draw depends on the text and its key alone."""
  batch = tiny.packed_batch(DOCUMENTS)
  whole = draw(keys(3), batch, tiny.CHOICES)
  for text in range(3):
    alone = draw(keys(3)[text:text + 1],
                 jax.tree.map(lambda leaf, at=text: leaf[at:at + 1], batch), tiny.CHOICES)
    jax.tree.map(lambda a, b, at=text: np.testing.assert_array_equal(a, b[at:at + 1]), alone, whole)


def test_draw_is_uniform():
  """Every place is drawn equally often, whatever its document."""
  draws, num_traces = 3000, 4
  batch = tiny.packed_batch(DOCUMENTS[:1] * draws)
  anchors = draw(keys(draws), batch, tiny.CHOICES).anchors
  places = PLACES['refining'][0]
  counts = np.bincount(np.ravel(anchors), minlength=tiny.LENGTH)[places]
  expected = draws * num_traces / len(places)
  assert counts.sum() == draws * num_traces
  # Chi-square with 9 degrees of freedom: 27.9 once in a thousand seeds.
  assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_anchor_tokens():
  """Anchors are among the given tokens."""
  batch = tiny.packed_batch(DOCUMENTS)
  wanted = tuple({int(batch.tokens[0, 3]), int(batch.tokens[1, 2])})
  config = dataclasses.replace(tiny.CHOICES, latents='anchored', num_traces=18,
                               anchor_tokens=wanted)
  traces = draw(keys(3), batch, config)
  for text, places in enumerate(PLACES['after']):
    expected = [place for place in places if int(batch.tokens[text, place]) in wanted]
    assert traces.anchors[text][traces.valid[text]].tolist() == expected
  assert traces.valid.any()


SMALL = Batch(tokens=jnp.array([[10, 11, 12, 20, 21, 22, 23, 0]]),
              segments=jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
              positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]))


# Two latents, three ahead tokens, one trace at token 21: index 4, position 1.
@pytest.mark.parametrize('latents, positions, latent, ahead, base, reads, shown', [
    ('paper', 'share', [1, 1], [2, 3, 4], [21, 21], 5, 5),
    ('paper', 'shift', [2, 3], [4, 5, 6], [21, 21], 5, 5),
    ('anchored', 'share', [1, 1], [2, 3, 4], [21, 21], 5, 5),
    ('anchored', 'shift', [2, 3], [4, 5, 6], [21, 21], 5, 5),
    ('refining', 'share', [0, 1], [2, 3, 4], [20, 21], 5, 3),
    ('refining', 'shift', [0, 1], [2, 3, 4], [20, 21], 5, 3)])
def test_placement(latents, positions, latent, ahead, base, reads, shown):
  """Each scheme places a trace as counted by hand."""
  config = DeliberationConfig(num_latents=2, num_ahead=1, num_traces=1, latents=latents,
                              positions=positions)
  placement = place(SMALL, jnp.array([[4]]), config, num_ahead=3)
  np.testing.assert_array_equal(placement.segments, [[2]])
  np.testing.assert_array_equal(placement.latent_positions, [[latent]])
  np.testing.assert_array_equal(placement.ahead_positions, [[ahead]])
  np.testing.assert_array_equal(placement.base_tokens, [[base]])
  np.testing.assert_array_equal(placement.coprocessor_prefix_length, [[reads]])
  np.testing.assert_array_equal(placement.decoder_prefix_length, [[shown]])
