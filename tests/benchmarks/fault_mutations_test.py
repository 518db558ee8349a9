"""Every mutation damages, every outcome is told, and what we write notices its damage."""

import json
import time

import numpy as np
import pytest

from latent_deliberation.benchmarks import fault_mutations, fault_subjects
from latent_deliberation.benchmarks.fault_launches import launcher
from latent_deliberation.benchmarks.fault_mutations import (
  CHANGED,
  CRASH,
  DIED,
  HANG,
  REFUSED,
  UNCHANGED,
  mutate,
  run_case,
  run_mutations,
)
from latent_deliberation.benchmarks.fault_subjects import Subject
from latent_deliberation.errors import UserError
from tests import finished

# Tensorstore's threads outlive the event loop of a read that failed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def test_mutations_damage():
  """Each kind comes up, and each gives another content, also of an empty file."""
  content, kinds = json.dumps({'rate': 0.25, 'steps': [1, 20]}).encode() * 9, set()
  for seed in range(200):
    damaged, kind = mutate(content, np.random.default_rng(seed))
    assert damaged != content
    kinds.add(kind)
  assert kinds == set(fault_mutations._MUTATIONS)
  assert mutate(b'', np.random.default_rng(0))[0] != b''


def test_a_case_is_its_seed():
  """A case does the same when it is run again, so a fault can be looked at."""
  content = bytes(range(256)) * 4
  one, other = (mutate(content, np.random.default_rng([3, 7])) for _ in range(2))
  assert one == other


def reading(result):
  """A subject whose damaged file gives this, or raises it."""
  def read(directory):
    if (directory / 'file').read_bytes() == b'whole' * 9:
      return 'whole'
    if isinstance(result, Exception):
      raise result
    return result
  return Subject('subject', lambda directory: (directory / 'file').write_bytes(b'whole' * 9), read)


@pytest.mark.parametrize('result, outcome, note', [
    (UserError('the file is damaged'), REFUSED, 'the file is damaged'), ('whole', UNCHANGED, ''),
    ('other', CHANGED, ''), (ValueError('of numpy'), CRASH, 'ValueError: of numpy')])
def test_outcomes(tmp_path, monkeypatch, result, outcome, note):
  """What a reader does with a damaged file has its name; the whole file is left alone."""
  monkeypatch.setattr(fault_mutations, '_damage', lambda directory, random: (
      'file', (directory / 'file').write_bytes(b'damaged') and 'damage'))
  whole, subject = tmp_path / 'whole', reading(result)
  whole.mkdir()
  subject.make(whole)
  found = run_case(subject, whole, 'whole', np.random.default_rng(0))
  assert (found['outcome'], found['note'], found['damage']) == (outcome, note, 'damage')
  assert [path.name for path in tmp_path.iterdir()] == ['whole']
  assert subject.read(whole) == 'whole'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The files of every subject, with what they hold."""
  place, found = tmp_path_factory.mktemp('subjects'), {}
  for number, subject in enumerate(fault_subjects.subjects()):
    directory = place / str(number) / 'whole'
    directory.mkdir(parents=True)
    subject.make(directory)
    found[subject.name] = (subject, directory, subject.read(directory))
  return found


NAMES = [subject.name for subject in fault_subjects.subjects()]


@pytest.mark.parametrize('name', NAMES)
def test_damage_is_noticed(whole, name):
  """Damaged files are refused, or read as if they were whole."""
  subject, directory, expected = whole[name]
  for seed in range(12):
    found = run_case(subject, directory, expected, np.random.default_rng([1, seed]))
    assert found['outcome'] in (REFUSED, UNCHANGED), found


@pytest.mark.parametrize('name, file, old, new', [
    ('run.json', 'run.json', b'"learning_rate": 0.01', b'"learning_rate": 0.02'),
    ('coprocessor', 'package/coprocessor.json', b'"steps": 7', b'"steps": 8'),
    ('decoder', 'decoder/decoder.json', b'"rope_base": 10000.0', b'"rope_base": 20000.0'),
    ('gate', 'gate.json', b'2.0', b'2.5'),
    ('packed rows', 'manifest.json', b'"seed": 0', b'"seed": 1')])
def test_changed_description(whole, tmp_path, name, file, old, new):
  """A value that could have been written is noticed by the checksum."""
  subject, directory, _ = whole[name]
  path = directory / file
  content = path.read_bytes()
  assert old in content
  try:
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match='checksum'):
      subject.read(directory)
  finally:
    path.write_bytes(content)


def test_flipped_bits_of_a_checkpoint(whole, tmp_path):
  """No flipped bit of the newest state is read as another number."""
  subject, directory, expected = whole['checkpoints of a run']
  files = [path for path in (directory / '4/state').rglob('*') if path.parent.name == 'd']
  refused = 0
  for seed in range(30):
    random = np.random.default_rng(seed)
    path = files[seed % len(files)]
    content = bytearray(path.read_bytes())
    flipped = bytearray(content)
    flipped[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    path.write_bytes(flipped)
    try:
      assert subject.read(directory) == expected
    except UserError:
      refused += 1
    finally:
      path.write_bytes(content)
  assert refused > 3


def badly(notes, seed, first, last):
  """A worker that hangs at case 1 and dies at case 3."""
  with open(notes, 'a') as file:
    for case in range(int(first), int(last)):
      fault_mutations._note(file, {'case': case, 'begun': True})
      time.sleep(60 if case == 1 else 0)
      if case == 3:
        raise SystemExit(9)
      fault_mutations._note(file, {'case': case, 'outcome': UNCHANGED})


@pytest.mark.slow
def test_worker_that_hangs_or_dies(tmp_path, monkeypatch):
  """Its case is a fault, and the next worker goes on after it."""
  monkeypatch.setattr(fault_mutations, 'MOST_WAIT', 40.0)
  with launcher(finished.environment()) as opened:
    found = list(run_mutations(opened, tmp_path, 0, range(6),
                               'tests.benchmarks.fault_mutations_test:badly'))
  assert [each['outcome'] for each in found] == [
      UNCHANGED, HANG, UNCHANGED, DIED, UNCHANGED, UNCHANGED]
  assert [each['case'] for each in found] == list(range(6))
