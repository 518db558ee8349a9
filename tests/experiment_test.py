"""An experiment is bound and checked as it is made, and errors name the key and its value."""

import copy
import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from flax import linen as nn

from configs import tiny
from latent_deliberation import experiment as experiment_module
from latent_deliberation.build import build_deliberator
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import constant_variant
from latent_deliberation.experiment import Computation, Experiment, bind, defaults_of
from latent_deliberation.model.decoder import boxed_shapes
from tests import finished


@pytest.mark.parametrize('attention, platform, chosen', [
    ('auto', 'tpu', 'fused'), ('auto', 'gpu', 'plain'), ('auto', 'cpu', 'plain'),
    ('plain', 'tpu', 'plain'), ('fused', 'cpu', 'fused')])
def test_auto_attention(attention, platform, chosen):
  """Automatic attention is fused on TPUs alone."""
  computation = Computation(attention=attention, loss_chunk=7)
  assert computation.on(platform).attention == chosen
  assert computation.on(platform).loss_chunk == 7


@pytest.mark.parametrize('platform, flags, dtype, activations', [
    ('tpu', '', 'bfloat16', 'bfloat16'), ('gpu', '', 'bfloat16', 'bfloat16'),
    ('cpu', 'flags : sse amx_bf16', 'bfloat16', 'float32'),
    ('cpu', 'flags : avx512_bf16 sse', 'bfloat16', 'float32'),
    ('cpu', 'flags : sse avx512f', 'float32', 'float32'), ('cpu', None, 'float32', 'float32')])
def test_auto_dtype(platform, flags, dtype, activations, tmp_path, monkeypatch):
  """Automatic products are bfloat16 where that is fast, and a CPU's activations float32."""
  if flags is not None:
    (tmp_path / 'cpuinfo').write_text(flags)
  monkeypatch.setattr(experiment_module, 'CPU_INFO', tmp_path / 'cpuinfo')
  computation = Computation(dtype='auto').on(platform)
  assert (computation.dtype, computation.activations) == (dtype, activations)


@pytest.mark.parametrize('change, message', [
    ({'deliberation__num_ahead': 64}, 'num_ahead = 64.* 64 tokens'),
    ({'computation__attention': 'fused', 'rules': {'trace': ('tensor',)}},
     "rule 'trace'.*attention = 'fused'"),
    ({'deliberation__num_traces': 63}, 'num_traces = 63.* 64 tokens.* 62 '),
    ({'evaluation__num_traces': 63}, 'config.evaluation.num_traces = 63.* 64 tokens'),
    ({'evaluation__num_ahead': 64}, 'config.evaluation.num_ahead = 64'),
    ({'evaluation__positions': (1, 9)}, r'positions = \(1, 9\).*num_ahead = 8'),
    ({'evaluation__positions': (0, 2)}, r'positions = \(0, 2\)'),
    ({'evaluation__positions': (4, 2)}, r'positions = \(4, 2\)'),
    ({'evaluation__positions': ()}, r'positions = \(\)'),
    ({'evaluation__num_texts': 12}, 'num_texts = 12.*batch_size = 8'),
    ({'evaluation__batch_size': 1}, 'evaluation.batch_size = 1'),
    ({'evaluation__eval_batches': 0}, 'evaluation.eval_batches = 0'),
    ({'training__batch_size': 0}, 'config.training.batch_size = 0'),
    ({'training__row_range_percent': (50, 50)}, r'config.training.row_range_percent = \(50, 50\)'),
    ({'pretraining__row_range_percent': (0, 101)}, r'row_range_percent = \(0, 101\)'),
    ({'pretraining__row_range_percent': (0, 50.5)}, r'row_range_percent = \(0, 50.5\)'),
    ({'training__row_range_percent': (False, True)}, r'row_range_percent = \(False, True\)'),
    ({'training__row_range_percent': (0, 50), 'data__mode': 'online'},
     r"training.row_range_percent = \(0, 50\).*data.mode = 'online'"),
    ({'training__accumulation': 0}, 'config.training.accumulation = 0'),
    ({'training__optimizer__learning_rate': -1.0}, r'training.optimizer.*rate = -1\.0'),
    ({'pretraining__loop__save_every': 0}, 'config.pretraining.loop.save_every = 0'),
    ({'deliberation__latents': 'papers'}, "latents = 'papers'.*'refining'"),
    ({'training__multipliers': {'gat': 2.0}}, r"training.multipliers.*\['gat'\].*'gate'"),
    ({'decoder__num_kv_heads': 3}, 'num_heads = 4.*num_kv_heads = 3'),
    ({'data__source': 'stdlib'}, "files = .*source = 'stdlib'"),
    ({'computation__dtype': 'float16'}, "computation.dtype = 'float16'"),
    ({'computation__remat': 'some'}, "computation.remat = 'some'"),
    ({'computation__attention': 'flash'},
     "computation.attention = 'flash'.*'auto', 'fused', 'plain'"),
    ({'computation__loss_chunk': 0}, 'computation.loss_chunk = 0'),
    ({'rules__batch': ('date',)}, r"rule 'batch'.*\['date'\]"),
    ({'seed': -1}, 'seed = -1'),
])
def test_bad_value(change, message):
  """A bad value is refused with its key."""
  with pytest.raises(UserError, match=message):
    finished.experiment(**change)


@pytest.mark.parametrize('section, values', [
    ('decoder', {'window': 0, 'head_dim': 7, 'activation': 'relu'}),
    ('deliberation', {'latents': 'none', 'num_traces': 0, 'lora_rank': 0, 'num_layers': -1}),
    ('training', {'batch_size': 0, 'accumulation': 0})])
def test_all_bad_values_of_a_section(section, values):
  """Each impossible value of a section is named, not the first alone."""
  with pytest.raises(UserError) as raised:
    dataclasses.replace(getattr(finished.experiment(), section), **values)
  named = [line.split(' = ')[0] for line in str(raised.value).splitlines()]
  assert sorted(named) == sorted(values)


def test_bad_section_hides_no_bad_key():
  """Keys beside a section that could not be made are checked, too, also for their type."""
  raw = finished.config_of('tiny').to_dict()
  raw['training']['loop']['num_steps'] = -1
  raw['training'] |= {'batch_size': -3, 'multipliers': 3, 'trackers': 'mlflow'}
  with pytest.raises(UserError) as raised:
    bind(raw)
  assert [line.split(' = ')[0] for line in str(raised.value).splitlines()] == [
      f'config.training.{key}' for key in ('loop.num_steps', 'multipliers', 'batch_size',
                                           'trackers')]


def test_constant_variant():
  """The constant variant trains soft tokens and gate alone."""
  experiment = finished.experiment()
  variant = constant_variant(experiment)
  shapes = jax.eval_shape(build_deliberator(variant).coprocessor.init, jax.random.key(0),
                          nn.unbox(boxed_shapes(variant.decoder)))
  assert set(shapes) == {'soft_tokens', 'gate'}


def test_training_delay_while_scoring():
  """A delay of training does not limit what is scored."""
  finished.experiment(deliberation__num_ahead=8, deliberation__max_delay=6,
                      evaluation__num_ahead=2, evaluation__positions=(1, 2))


def test_unknown_key():
  """An unknown key is named with the nearest known one."""
  raw = finished.config_of('tiny').to_dict()
  raw['training']['optimizer']['learning_rat'] = raw['training']['optimizer'].pop('learning_rate')
  near = "config.training.optimizer.learning_rat .*'training.optimizer.learning_rate'"
  with pytest.raises(UserError, match=near):
    bind(raw)


def test_unlike_any_key():
  """An unknown key that is like no other is named with all known ones."""
  with pytest.raises(UserError, match=r"config.zzz .*\['computation', 'coprocessor_from', 'data'"):
    bind(finished.config_of('tiny').to_dict() | {'zzz': 1})


def test_missing_key():
  """A missing key is named."""
  raw = finished.config_of('tiny').to_dict()
  del raw['decoder']['head_dim']
  with pytest.raises(UserError, match=r"config.decoder.*\['head_dim'\]"):
    bind(raw)


@dataclasses.dataclass(frozen=True)
class Part:
  size: int
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
  part: Part
  other: Part = Part(3, 2.0)


def test_defaults_of_sections():
  """A section has its field's default, or else those of its class."""
  assert defaults_of(Whole) == {'part': {'scale': 1.0}, 'other': {'size': 3, 'scale': 2.0}}


def test_defaults():
  """The defaults are those of every key that has one."""
  defaults = defaults_of(Experiment)
  assert defaults['training']['row_range_percent'] == (0, 100) and defaults['data']['options'] == {}
  assert defaults['computation']['remat'] == 'none' and 'batch_size' not in defaults['training']


CONFIG = tiny.get_config().to_dict()
EXTREMES = (math.nan, math.inf, -math.inf, -1, 0, 1.5, 1e300, 10**9, 10**30, 10**400, '4', True,
            None, (), ('a',), (math.nan,), (-1,), {'embedder': math.nan}, {'embedder': 'a'})


def typed_keys(kind: type, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the dotted path and the annotation of each key that is no section."""
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      yield from typed_keys(field.type, f'{path}{field.name}.')
    else:
      yield path + field.name, field.type


def leaves(value: Any) -> Iterator[Any]:
  """Yields the values in a tuple or mapping, or the value itself."""
  for each in value.values() if isinstance(value, dict) else value:
    yield from leaves(each) if isinstance(each, dict | tuple) else [each]


@pytest.mark.parametrize('key, kind', list(typed_keys(Experiment)))
def test_extremes(key, kind):
  """A key takes values of its own type alone, no NaN and no endless number; others are named."""
  allowed = {kind, *typing.get_args(kind)}
  allowed |= {int} if float in allowed else set()
  for value in EXTREMES:
    config = copy.deepcopy(CONFIG)
    *sections, name = key.split('.')
    functools.reduce(dict.__getitem__, sections, config)[name] = value
    try:
      bound = bind(config)
    except UserError as error:
      assert name in str(error), value
      continue
    found = list(leaves([functools.reduce(getattr, key.split('.'), bound)]))
    assert {type(each) for each in found} <= allowed, value
    assert all(each == each and each not in (10**30, 10**400) for each in found), value
