import itertools
import time

from absl import logging

from latent_deliberation.progress import Progress


def lines_of(monkeypatch, total, seconds_between):
  """What six updates log that come `seconds_between` after one another."""
  lines, clock = [], itertools.count(0, seconds_between)
  monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(logging, 'info', lambda text, *values: lines.append(text % values))
  progress = Progress('Packing train', 'documents', total)
  for done in range(1, 7):
    progress.update(done)
  return lines


def test_the_time_left_follows_from_the_pace_so_far(monkeypatch):
  lines = lines_of(monkeypatch, 10, 10)
  assert lines[0] == 'Packing train: 1 of 10 documents, 90 s left'
  assert lines[-1] == 'Packing train: 6 of 10 documents, 40 s left'


def test_lines_come_every_ten_seconds_at_most(monkeypatch):
  assert len(lines_of(monkeypatch, 10, 4)) == 2


def test_without_a_known_total_only_the_count_is_told(monkeypatch):
  for total in (None, float('inf')):
    assert lines_of(monkeypatch, total, 10)[0] == 'Packing train: 1 documents'
