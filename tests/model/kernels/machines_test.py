"""Each machine gets its own kernels, and what they cannot do is refused."""

import jax
import jax.numpy as jnp
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model.kernels.fused_attention import GPU, TPU, choose_kernels


def queries(width, dtype):
  return jnp.ones((2, 5, 3, 4, width), dtype)


@pytest.mark.parametrize('platform, kernels', [('tpu', TPU), ('cpu', TPU), ('gpu', GPU)])
def test_each_machine_has_its_kernels_and_a_cpu_those_of_a_tpu(monkeypatch, platform, kernels):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert choose_kernels(queries(256, 'bfloat16')) is kernels


def test_another_platform_is_refused(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'metal')
  with pytest.raises(UserError, match="'fused' on platform 'metal': .* set .* 'plain'"):
    choose_kernels(queries(256, 'bfloat16'))


@pytest.mark.parametrize('width, dtype, words', [
    (6, 'bfloat16', '6 x bfloat16'), (96, 'bfloat16', '96 x bfloat16'),
    (256, 'float32', "256 x float32.*dtype = 'bfloat16'")])
def test_heads_that_a_gpu_cannot_hold_are_refused(monkeypatch, width, dtype, words):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(UserError, match=f"'fused' on a GPU with heads of {words}"):
    choose_kernels(queries(width, dtype))
