"""Speed, operations and seconds of a run are what its clock and its architecture say."""

import pytest

from latent_deliberation.training.utilisation import (
  COMPILE,
  DATA,
  SAVE,
  STEP,
  Pace,
  TimeLedger,
  measure_goodput,
  memory_gib,
  peak_flops,
)


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_pace_without_compilation():
  """Speed and ETA leave out compilation."""
  clock = Clock()
  pace = Pace(num_steps=1000, tokens_per_step=100, clock=clock)
  clock.now = 60.0  # the first step, nearly all of it compilation
  pace.start(1)
  clock.now = 62.0
  assert (pace.describe(11), pace.eta(11)) == ('500 tokens/s', '3m18s')


def test_pace_with_pauses():
  """Speed covers the last window, and the ETA includes pauses."""
  clock = Clock()
  pace = Pace(num_steps=40, tokens_per_step=1000, clock=clock)
  pace.start(0)
  clock.now = 10.0
  assert (pace.describe(10), pace.eta(10)) == ('1,000 tokens/s', '30s')
  clock.now = 50.0  # an evaluation
  pace.start(10)
  clock.now = 55.0
  assert pace.measure(20)['tokens_per_second'] == pytest.approx(2000)
  assert (pace.describe(20), pace.eta(20)) == ('2,000 tokens/s', '55s')


def test_pace_before_measuring():
  """Before anything is measured, the line shows dashes."""
  pace = Pace(9, 10, step_flops=1e12, peak=1e12)
  assert (pace.describe(1), pace.eta(1)) == ('- tokens/s', '-')


def test_operations_a_second():
  """Operations of a step over its seconds, and over what the device could do in them."""
  clock = Clock()
  pace = Pace(num_steps=40, tokens_per_step=1000, step_flops=8e13, peak=1e14, clock=clock)
  pace.start(0)
  clock.now = 20.0
  assert pace.measure(10) == pytest.approx(
      {'tokens_per_second': 500, 'teraflops_per_device': 40.0, 'mfu': 0.4})
  assert pace.describe(10) == '500 tokens/s  40 TFLOP/s  MFU 40.0%'


def test_no_utilisation_of_an_unknown_device():
  """Without a published peak, operations are told and no part of a peak."""
  clock = Clock()
  pace = Pace(num_steps=40, tokens_per_step=1, step_flops=1e12, clock=clock)
  pace.start(0)
  clock.now = 1.0
  assert set(pace.measure(1)) == {'tokens_per_second', 'teraflops_per_device'}


@pytest.mark.parametrize('kind, teraflops', [
    ('TPU v5 lite', 197), ('TPU v5', 459), ('TPU v5p', 459), ('TPU v6 lite', 918), ('TPU v4', 275),
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H100 NVL', 835), ('NVIDIA L4', 121), ('NVIDIA L40', 181), ('NVIDIA L40S', 362),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('cpu', None), ('NVIDIA GeForce RTX 4090', None)])
def test_peak_of_a_device(kind, teraflops):
  """Names are those of jax's `device_kind`. A CPU has no peak."""
  assert peak_flops(kind) == (teraflops and teraflops * 1e12)


def test_memory_of_a_process():
  """Devices of a CPU have the memory of the process: more than jax takes, less than the machine."""
  assert 0.05 < memory_gib() < 64


def test_ledger_books_every_moment_once():
  """The seconds of all kinds are the time since the launch began."""
  clock = Clock()
  clock.now = 5.0
  ledger = TimeLedger(begun=2.0, clock=clock)
  ledger.begin(40)
  for now, kind in ((6.0, DATA), (16.0, COMPILE), (18.0, STEP), (18.04, SAVE), (19.0, STEP)):
    clock.now = now
    ledger.book(kind)
  assert ledger.describe() == 'start 3.0s data 1.0s compile 10.0s step 3.0s'
  taken = ledger.take(42)
  assert taken == {'time/from': 40, 'time/start': 3.0, 'time/data': 1.0, 'time/compile': 10.0,
                   'time/step': pytest.approx(2.96), 'time/save': 0.04}
  assert ledger.take(42) == {'time/from': 42}


def line(begin, end, seconds, **spent):
  return {'step': end, 'seconds': seconds, 'time/from': begin,
          **{f'time/{kind}': value for kind, value in spent.items()}}


def test_goodput_of_one_launch():
  """Steps count, and nothing else does."""
  goodput = measure_goodput([
      line(0, 10, 1010.0, start=2.0, compile=3.0, step=5.0), {'step': 10, 'seconds': 1011.0},
      line(10, 20, 1020.0, step=7.0, data=1.0, evaluation=2.0), line(20, 20, 1030.0, save=10.0)])
  assert (goodput.total, goodput.share, goodput.launches) == (30.0, 12 / 30, 1)
  assert goodput.describe() == ('goodput 40.0% of 30s in 1 launch: start 2s, data 1s, compile 3s, '
                                'step 12s, save 10s, evaluation 2s')


def test_goodput_after_a_kill():
  """Steps that were not saved count once, and so does the time that nobody saw."""
  goodput = measure_goodput([
      line(0, 10, 1010.0, start=2.0, step=8.0), line(10, 20, 1020.0, step=10.0),
      # Killed at step 27 or so, and resumed from step 15 half a minute after its last line.
      line(15, 25, 1070.0, start=4.0, step=16.0)])
  assert (goodput.repeated, goodput.away, goodput.launches) == (5.0, 30.0, 2)
  assert goodput.share == (8 + 10 + 16 - 5) / (10 + 10 + 20 + 30)
  assert goodput.describe().endswith('; steps made again 5s; between launches 30s')


def test_goodput_of_a_crash_loop():
  """Steps that are lost several times are lost each time."""
  lines = [line(0, 10, 1010.0, start=0.0, step=10.0)]
  for restart in range(1, 4):
    lines.append(line(5, 10, 1010.0 + 5 * restart, start=0.0, step=5.0))
  goodput = measure_goodput(lines)
  assert (goodput.repeated, goodput.away, goodput.share) == (15.0, 0.0, 10 / 25)


def test_clock_that_jumped():
  """A clock that was set back gives no time away; what was measured stays."""
  goodput = measure_goodput([line(0, 10, 5000.0, start=1.0, step=9.0),
                             line(10, 20, 1000.0, start=1.0, step=9.0)])
  assert (goodput.total, goodput.share) == (20.0, 0.9)


def test_run_of_an_older_code():
  """Lines without seconds say nothing, and those of a newer launch count."""
  older = [{'step': 1, 'seconds': 10.0, 'loss': 1.0}]
  assert measure_goodput(older) is None
  assert measure_goodput([*older, line(1, 2, 99.0, start=1.0, step=1.0)]).total == 2.0
