"""A card says the same to programs and people, and believes no other."""

import dataclasses
import json

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import (
  check_name,
  format_gain,
  from_json,
  numbers_of,
  render,
  split_address,
  to_json,
)
from tests.experts import small


def round_trip(content):
  return from_json(json.loads(json.dumps(content)))


def test_round_trip():
  """A card comes back from JSON with its fingerprint, which any change changes."""
  card = small.card()
  assert round_trip(to_json(card)) == card
  assert card.address == f'stars@{card.fingerprint}' and len(card.fingerprint) == 16
  for change in ({'description': 'Other'}, {'keywords': ('comet',)}, {'recipe': {'steps': 8}}):
    assert dataclasses.replace(card, **change).fingerprint != card.fingerprint


def test_unknown_fields_are_left_out():
  """A field that is not known means nothing, and a newer format is refused."""
  card = small.card()
  assert round_trip({**to_json(card), 'colour': 'red'}) == card
  with pytest.raises(UserError, match='format = 2, expected 1'):
    round_trip({**to_json(card), 'format': 2})


@pytest.mark.parametrize('change, message', [
    ({'fingerprint': '0' * 16}, "fingerprint = '0000"), ({'description': 'Other'}, 'fingerprint'),
    ({'description': 3}, 'description = 3'), ({'name': '../x'}, "name = '../x'"),
    ({'base': {}}, 'base.name = None'), ({'base': 3}, 'base = 3'),
    ({'files': {'a': {}}}, 'files.a'), ({'files': {'a': {'sha256': '0' * 64, 'bytes': -1}}},
                                        'files.a.bytes = -1'),
    ({'licence': 'a\x1b[2Jb'}, 'cannot be printed'), ({'scores': []}, r'scores = \[\]'),
    ({'recipe': {'a': ['\u202e']}}, 'cannot be printed')])
def test_damaged_cards_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    round_trip({**to_json(small.card()), **change})


def test_no_card():
  for content in ([], None, 3, {}):
    with pytest.raises(UserError, match='no card of an expert'):
      from_json(content)
  with pytest.raises(UserError, match=r"lacks \['name'"):
    from_json({'format': 1})


@pytest.mark.parametrize('name', ['astronomy', 'a', 'law-de_1.2', '9'])
def test_names(name):
  check_name(name)
  assert split_address(name) == (name, '')
  assert split_address(f'{name}@0123456789abcdef') == (name, '0123456789abcdef')


@pytest.mark.parametrize('name', [
    '', 'A', 'a/b', '..', 'a..b', '.a', 'a.', 'auto', 'none', 'a b', 'a' * 65, 'ä', 'a\n'])
def test_bad_names(name):
  with pytest.raises(UserError, match='name = '):
    check_name(name)


def test_bad_addresses():
  for written in ('a@', 'a@xyz', 'a@0123456789ABCDEF', 'a@0123456789abcdef0'):
    with pytest.raises(UserError, match='16 hexadecimal digits'):
      split_address(written)


def test_gain_is_shown_with_its_whole_interval():
  """The interval must be above zero, and the mean above another text's latents."""
  def scored(nats, ci95, shuffled=-0.1):
    return small.card(scores={'stars': {'gain': {
        'own': {'nats': nats, 'ci95': ci95},
        'shuffled': {'nats': shuffled, 'ci95': [shuffled - 1, shuffled + 1]}}}})
  assert scored(0.2, [0.1, 0.3]).gains
  assert not scored(0.2, [-0.1, 0.3]).gains
  assert not scored(0.2, None).gains
  assert not scored(0.2, [0.1, 0.3], shuffled=0.25).gains
  assert not small.card(scores={}).gains


def test_page_for_people():
  """The page has the address, every control with its interval, and a warning without a gain."""
  page = render(small.card())
  assert 'Change of perplexity' not in page  # it was not measured by position
  for part in ('# stars', 'stars@', 'Stars and planets', 'CC0-1.0', '+0.200 [+0.100, +0.300]',
               '-0.100 [-0.200, -0.050]', '--expert=stars', 'comet, orbit'):
    assert part in page
  assert 'No gain is shown' not in page
  assert 'No gain is shown' in render(small.card(scores={}))
  assert 'Nothing was measured' in render(small.card(scores={}))


def test_page_has_changes_by_position():
  scores = {**small.card().scores['stars'], 'all_positions': {
      arm: {'change_pct': [-3.0, number], 'ci95': [[-4.0, -2.0], [-0.5, 0.5]]}
      for number, arm in enumerate(('own', 'shuffled'))}}
  page = render(small.card(scores={'stars': scores}))
  assert 'in percent on stars text' in page
  assert '| 1 | -3.0 [-4.0, -2.0] | -3.0 [-4.0, -2.0] |' in page
  assert '| 2 | +0.0 [-0.5, +0.5] | +1.0 [-0.5, +0.5] |' in page
  scores['positions'] = [1, 3]  # the third was not measured
  assert 'in percent on' not in render(small.card(scores={'stars': scores}))


@pytest.mark.parametrize('nats, ends', [
    ('nan', None), ('0.5', None), (0.5, ['0', '1']), (float('inf'), None), (10**400, None)])
def test_scores_are_finite_numbers(nats, ends):
  """A text such as 'nan' is no score: JSON could not tell it on."""
  assert numbers_of({'gain': {'own': {'nats': nats, 'ci95': ends}}}) is None


def test_page_of_a_strange_card():
  """Values that nobody vouches for never break the page."""
  strange = small.card(
      latents={'parameters': 'many'}, recipe={'seconds': {'a': 'b', 'c': -1}, 'text': {}},
      scores={'stars': 3, 'general': {'gain': {'own': [], 'zero': {'nats': 'x'}}}})
  assert '# stars' in render(strange)
  assert format_gain(3) == format_gain(None) == '-'
