"""A description says of a coprocessor what was written of it; a damaged one is refused."""

import dataclasses
import json

import pytest

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  DESCRIPTION,
  Description,
  check_decoder,
  compare_frozen_dtype,
  describe,
  read_description,
  write_description,
)
from latent_deliberation.errors import UserError
from tests import tiny

WRITTEN = Description(tiny.CONFIG, tiny.CHOICES, decoder='d0', vocabulary='v0', steps=7,
                      frozen_dtype='int8')


@pytest.fixture
def directory(tmp_path):
  write_description(tmp_path, WRITTEN, 'f0')
  return tmp_path


def test_what_is_read_is_what_was_written(directory):
  assert read_description(directory) == (WRITTEN, 'f0')
  assert describe(directory) == WRITTEN


def test_one_that_does_not_say_what_its_decoder_was_kept_in_is_read(directory):
  path = directory / DESCRIPTION
  content = json.loads(path.read_text())
  assert content.pop('frozen_dtype') == 'int8'
  path.write_text(json.dumps(content))
  assert describe(directory).frozen_dtype == ''


@pytest.mark.parametrize('trained, now, warned', [
    ('int8', 'float32', True), ('bfloat16', 'int8', True), ('float32', 'bfloat16', False),
    ('int8', 'int8', False), ('', 'int8', False)])
def test_weights_that_are_int8_on_one_side_alone_are_warned_of(caplog, trained, now, warned):
  compare_frozen_dtype(dataclasses.replace(WRITTEN, frozen_dtype=trained), now)
  expected = f'beside frozen weights in {trained}, and reads those of {now} now'
  assert [expected in text for text in caplog.messages] == [True] * warned


def test_another_decoder_is_refused_with_both_fingerprints():
  check_decoder(WRITTEN, 'd0')
  with pytest.raises(UserError, match='decoder with fingerprint d0, this one has d1: give the'):
    check_decoder(WRITTEN, 'd1')


def test_a_directory_without_a_coprocessor_is_refused(tmp_path):
  for directory in (tmp_path, tmp_path / 'absent'):
    for read in (describe, coprocessor_checkpoint.load):
      with pytest.raises(UserError, match=f'{directory} holds no trained coprocessor'):
        read(directory)


@pytest.mark.parametrize('damage', [
    lambda text: text[:-30],
    lambda text: '[]',
    lambda text: text.replace('"format": 1', '"format": 2'),
    lambda text: text.replace('"num_latents"', '"latents_num"'),
    lambda text: text.replace('"refining"', '"refined"'),
    lambda text: text.replace('"num_kv_heads": 2', '"num_kv_heads": 3'),
    lambda text: text.replace('"decoder"', '"encoder"')])
def test_a_damaged_description_is_refused(directory, damage):
  path = directory / DESCRIPTION
  changed = damage(path.read_text())
  assert changed != path.read_text()
  path.write_text(changed)
  for read in (describe, coprocessor_checkpoint.load):
    with pytest.raises(UserError, match=f'{path} is damaged or of another format'):
      read(directory)
