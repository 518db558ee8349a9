"""An experiment is checked as it is made, and errors name the key, its value and what may be."""

import re

import jax
import pytest
from flax import linen as nn

from latent_deliberation.jobs.evaluate import constant_variant
from latent_deliberation.jobs.experiment import Computation, Experiment, bind, defaults_of
from latent_deliberation.jobs.models import build_deliberator
from latent_deliberation.model.weights import boxed_shapes
from tests import finished


def test_an_unknown_key_is_named_with_the_nearest_known_one():
  raw = finished.config_of('tiny').to_dict()
  raw['training']['optimizer']['learning_rat'] = raw['training']['optimizer'].pop('learning_rate')
  with pytest.raises(ValueError, match=re.escape(
      "config.training.optimizer.learning_rat is not a key of this project: did you mean "
      "'learning_rate'?")):
    bind(raw)


def test_an_unknown_key_like_no_other_is_shown_the_known_ones():
  with pytest.raises(ValueError, match=r"config.zzz is not .* known keys: \['computation', 'data'"):
    bind(finished.config_of('tiny').to_dict() | {'zzz': 1})


def test_a_missing_key_is_named():
  raw = finished.config_of('tiny').to_dict()
  del raw['decoder']['head_dim']
  with pytest.raises(ValueError, match=r"config.decoder has no \['head_dim'\]: give a value"):
    bind(raw)


@pytest.mark.parametrize('attention, platform, chosen', [
    ('auto', 'tpu', 'fused'), ('auto', 'gpu', 'plain'), ('auto', 'cpu', 'plain'),
    ('plain', 'tpu', 'plain'), ('fused', 'cpu', 'fused')])
def test_automatic_attention_is_fused_on_tpus_alone(attention, platform, chosen):
  computation = Computation(attention=attention, loss_chunk=7)
  assert computation.on(platform) == Computation(attention=chosen, loss_chunk=7)


@pytest.mark.parametrize('change, message', [
    ({'deliberation__num_ahead': 64}, 'num_ahead = 64 tokens do not fit .* trunk of 64 tokens'),
    ({'computation__attention': 'fused', 'rules': {'trace': ('tensor',)}},
     "rule 'trace' -> .*attention = 'fused': .* set attention = 'plain'"),
    ({'deliberation__num_traces': 63}, 'num_traces = 63, but a trunk of 64 tokens has 62 places'),
    ({'evaluation__num_traces': 63}, 'evaluation: num_traces = 63, but a trunk of 64 tokens'),
    ({'evaluation__num_ahead': 64}, 'evaluation: num_ahead = 64 tokens do not fit'),
    ({'evaluation__positions': (1, 9)}, r'positions = \(1, 9\): .* up to num_ahead = 8'),
    ({'evaluation__positions': (0, 2)}, r'positions = \(0, 2\)'),
    ({'evaluation__positions': (4, 2)}, r'positions = \(4, 2\): must increase'),
    ({'evaluation__positions': ()}, r'positions = \(\)'),
    ({'evaluation__num_texts': 12}, 'num_texts = 12 is not a multiple of batch_size = 8'),
    ({'evaluation__batch_size': 1}, 'evaluation.batch_size = 1: .* at least 2'),
    ({'evaluation__watch_batches': 0}, 'evaluation.watch_batches = 0: at least 1'),
    ({'training__batch_size': 0}, 'config.training: batch_size = 0: at least 1'),
    ({'training__portion': (50, 50)}, r'config.training: portion = \(50, 50\): two numbers'),
    ({'pretraining__portion': (0, 101)}, r'portion = \(0, 101\): two numbers are needed'),
    ({'training__portion': (0, 50), 'data__mode': 'online'}, 'training.portion = .* but a stream'),
    ({'training__accumulation': 0}, 'config.training: accumulation = 0: at least 1'),
    ({'training__optimizer__learning_rate': -1.0}, 'config.training.optimizer: .*rate is -1.0'),
    ({'pretraining__loop__save_every': 0}, 'config.pretraining.loop: save_every is 0'),
    ({'deliberation__latents': 'papers'}, "latents = 'papers': must be one of .*'refining'"),
    ({'training__multipliers': {'gat': 2.0}}, r"training.multipliers names \['gat'\]: .*'gate'"),
    ({'decoder__num_kv_heads': 3}, 'num_heads = 4 is not a multiple of num_kv_heads = 3'),
    ({'data__source': 'stdlib'}, "files = .* has no meaning for source = 'stdlib'"),
    ({'computation__dtype': 'float16'}, "computation.dtype = 'float16'"),
    ({'computation__remat': 'some'}, "computation.remat = 'some'"),
    ({'computation__attention': 'flash'},
     "computation.attention = 'flash': .*'auto', 'fused', 'plain'"),
    ({'computation__loss_chunk': 0}, 'computation.loss_chunk = 0'),
    ({'rules__batch': ('date',)}, r"rule 'batch' -> \('date',\): \['date'\] are not mesh axes"),
    ({'seed': -1}, 'seed = -1: it must lie between 0 and'),
])
def test_a_value_that_cannot_be_is_refused_with_what_can(change, message):
  with pytest.raises(ValueError, match=message):
    finished.experiment(**change)


def test_defaults_are_those_of_every_key_that_has_one():
  defaults = defaults_of(Experiment)
  assert defaults['training']['portion'] == (0, 100) and defaults['data']['options'] == {}
  assert defaults['computation']['remat'] == 'none' and 'batch_size' not in defaults['training']


def test_the_constant_variant_learns_soft_tokens_and_gate_alone():
  experiment = finished.experiment()
  variant = constant_variant(experiment)
  shapes = jax.eval_shape(build_deliberator(variant).coprocessor.init, jax.random.key(0),
                          nn.unbox(boxed_shapes(variant.decoder)))
  assert set(shapes) == {'soft_tokens', 'gate'}
