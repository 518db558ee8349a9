"""An experiment is checked as it is made, and errors name the key, its value and what may be."""

import jax
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import constant_variant
from latent_deliberation.experiment import Computation
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.models import build_deliberator
from tests import finished


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
    ({'evaluation__eval_batches': 0}, 'evaluation.eval_batches = 0: at least 1'),
    ({'training__batch_size': 0}, 'config.training: batch_size = 0: at least 1'),
    ({'training__row_range_percent': (50, 50)}, r'config.training: row_range_percent = \(50, 50\): two whole'),
    ({'pretraining__row_range_percent': (0, 101)}, r'row_range_percent = \(0, 101\): two whole numbers are needed'),
    ({'pretraining__row_range_percent': (0, 50.5)}, r'row_range_percent = \(0, 50.5\): two whole numbers are needed'),
    ({'training__row_range_percent': (False, True)}, r'row_range_percent = \(False, True\): two whole numbers'),
    ({'training__row_range_percent': (0, 50), 'data__mode': 'online'}, 'training.row_range_percent = .* but a stream'),
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
  with pytest.raises(UserError, match=message):
    finished.experiment(**change)


def test_the_constant_variant_learns_soft_tokens_and_gate_alone():
  experiment = finished.experiment()
  variant = constant_variant(experiment)
  shapes = jax.eval_shape(build_deliberator(variant).coprocessor.init, jax.random.key(0),
                          nn.unbox(boxed_shapes(variant.decoder)))
  assert set(shapes) == {'soft_tokens', 'gate'}


def test_a_delay_of_training_does_not_bound_what_is_scored():
  finished.experiment(deliberation__num_ahead=8, deliberation__max_delay=6,
                      evaluation__num_ahead=2, evaluation__positions=(1, 2))
