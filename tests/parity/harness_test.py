"""The plain decoder's scores are those of lm-evaluation-harness's own Hugging Face model.

Needs torch, transformers, accelerate and lm_eval: pip install -e '.[parity,eval]' accelerate.
"""

import numpy as np
import pytest

torch = pytest.importorskip('torch')
for library in ('transformers', 'accelerate', 'lm_eval'):
  pytest.importorskip(library)

import jax  # noqa: E402

from latent_deliberation.benchmarks import harness_speed  # noqa: E402
from latent_deliberation.evaluation.answer_contexts import Request  # noqa: E402
from latent_deliberation.evaluation.answers import AnswerScorer  # noqa: E402
from latent_deliberation.model import weights  # noqa: E402
from latent_deliberation.model.decoder import Decoder  # noqa: E402
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh  # noqa: E402
from tests.parity import tiny_models  # noqa: E402


@pytest.mark.parametrize('name', ['gemma2', 'gemma3', 'llama3'])
def test_equals_harness(tmp_path, name):
  """Log-likelihoods and greedy answers, of several continuations of contexts of many lengths."""
  tiny_models.build(name, 5).save_pretrained(tmp_path)
  random = np.random.default_rng(0)
  draw = lambda size: tuple(random.integers(4, tiny_models.VOCAB_SIZE, size).tolist())  # noqa: E731
  requests = [Request((2, *context), draw(1 + item % 5), item=item)
              for item, context in enumerate(draw(3 + 2 * item) for item in range(8))
              for _ in range(3)]
  config, params = weights.load(tmp_path, dtype='float32')
  scorer = AnswerScorer(Decoder(config), params, ('frozen',), rules=DEFAULT_RULES,
                        mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
  ours, greedy = np.zeros(len(requests)), np.zeros(len(requests), bool)
  for scored, _ in scorer.score(requests):
    ours[scored.numbers], greedy[scored.numbers] = -scored.nats[:, 0], scored.greedy[:, 0]
  plain = [(list(request.context), list(request.continuation)) for request in requests]
  theirs, theirs_greedy = map(np.array, zip(*harness_speed.score_by_harness(
      tmp_path, plain, 'float32', 4), strict=True))
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  np.testing.assert_array_equal(greedy, theirs_greedy)
