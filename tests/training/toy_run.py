"""A run of the loop that takes milliseconds: four weights and random batches, otherwise real."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_deliberation.array_types import Array, Batch, Params
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.loop import LoopConfig, train
from latent_deliberation.training.metrics import MetricsWriter
from latent_deliberation.training.step import TrainState

OPTIMIZER = optax.adam(0.1)


class ToyBatches:
  """Random batches with the step as their seed.

  Attributes:
    restored: step that they were last restored to.
  """
  fingerprint = 'toy'

  def __init__(self, before: Callable[[int], object] = lambda step: None):
    """`before(step)` runs before each batch."""
    self._before, self.restored = before, None

  def __call__(self, step: int) -> Batch:
    self._before(step)
    tokens = np.random.default_rng(step).integers(1, 9, (2, 4), dtype=np.int32)
    return Batch(tokens, np.ones_like(tokens), np.arange(8, dtype=np.int32).reshape(2, 4) % 4)

  def save(self, directory: Path, step: int) -> None:
    (directory / 'step.json').write_text(json.dumps(step))

  def restore(self, directory: Path, step: int) -> None:
    self.restored = json.loads((directory / 'step.json').read_text())


def loss_fn(params: Params, batch: Batch) -> Array:
  return jnp.mean((batch.tokens @ params['w'] - batch.tokens.sum(axis=1)) ** 2)


def toy_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
  loss, gradients = jax.value_and_grad(loss_fn)(state.params, batch)
  updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
  state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
  return state, {'loss': loss, 'grad_norm': optax.tree.norm(gradients)}


JITTED_STEP = jax.jit(toy_step, donate_argnums=0)


def new_state() -> TrainState:
  return TrainState.create({'w': jnp.zeros(4)}, OPTIMIZER)


def run(workdir: Path, num_steps: int = 6, *, batches: ToyBatches | None = None,
        train_step: Callable[..., Any] | None = JITTED_STEP,
        evaluators: Mapping[str, Callable[..., Any]] | None = None, save_every: int = 100,
        eval_every: int = 100, log_every: int = 1, checkpoints: bool = True,
        config: Mapping[str, Any] | None = None, **options: Any) -> TrainState:
  """One launch with new objects, which resumes the run in `workdir`.

  Args:
    config: further settings of LoopConfig.
    options: further arguments of `train`.
  """
  config = LoopConfig(**{'num_steps': num_steps, 'log_every': log_every, 'eval_every': eval_every,
                         'save_every': save_every, 'keep': 2, **(config or {})})
  batches = batches or ToyBatches()
  state, checkpointer = new_state(), None
  metrics = MetricsWriter(workdir)
  if checkpoints:
    checkpointer = Checkpointer(workdir / 'checkpoints', config.keep, config.keep_every)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state)
    state = checkpointer.restore(abstract, batches) or state
  try:
    return train(state, train_step, batches, place=jax.device_put, checkpointer=checkpointer,
                 config=config, metrics=metrics, evaluators=evaluators or {}, **options)
  finally:
    metrics.close()
    if checkpointer is not None:
      checkpointer.close()


def saved_steps(workdir: Path) -> list[int]:
  """The steps of the checkpoints that exist."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()
                if path.name.isdigit())
