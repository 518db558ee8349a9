"""What the fault campaign damages: files of every kind that a run reads, and how a run reads them.

A subject makes its files once. `read` then reads them as a run, or a command, would, with all that
it knows besides them. It returns a digest of what it read.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from safetensors.numpy import save

from latent_deliberation.array_types import Params
from latent_deliberation.benchmarks.fault_launches import ROOT
from latent_deliberation.cli.config_flag import read_run
from latent_deliberation.data.rows import MANIFEST_FILE, Framing, Manifest, PackedRows, Recipe
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.experiment import bind
from latent_deliberation.files import seal, write_whole
from latent_deliberation.inference.policy import open_gate
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import hugging_face
from latent_deliberation.model.decoder import Decoder, fingerprint
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig
from latent_deliberation.paths import GATE_FILE, GATE_WEIGHTS_FILE, RUN_FILE
from latent_deliberation.training.checkpointer import Checkpointer
from latent_deliberation.training.run_identity import RunIdentity, claim_workdir
from latent_deliberation.training.step import TrainState

_DECODER = dataclasses.replace(
    PRESETS['tiny'], vocab_size=48, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
    hidden_dim=24, num_layers=2)
_LATENTS = DeliberationConfig(num_latents=2, num_ahead=4, num_traces=4)


@dataclasses.dataclass(frozen=True)
class Subject:
  """Files that may be damaged.

  Attributes:
    name: what they are, for tables.
    make: writes them into a directory.
    read: reads them from a directory, and returns a digest of what it read.
  """
  name: str
  make: Callable[[Path], None]
  read: Callable[[Path], str]


def digest(value: Any) -> str:
  """Returns a hash of a value whose text says all of it."""
  return hashlib.sha256(str(value).encode()).hexdigest()[:16]


def params_of(config: TransformerConfig) -> Params:
  """Returns random weights of a decoder."""
  shapes = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0),
                                   jnp.zeros((1, 1), jnp.int32)))['params']
  leaves, tree = jax.tree.flatten(shapes)
  random = np.random.default_rng(1)
  return jax.tree.unflatten(tree, [
      jnp.asarray(0.3 * random.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])


# --- Checkpoints of a training ---


class _Position:
  """Batches that have a position and nothing else."""
  fingerprint, num_rows, restored = 'rows', None, None

  def save(self, directory: Path, step: int) -> None:
    (directory / 'position.json').write_text(json.dumps({'step': step}))

  def restore(self, directory: Path, step: int) -> None:
    self.restored = step


def _state(step: int) -> TrainState:
  params = {'kernel': jax.random.normal(jax.random.key(step), (24, 24)), 'gate': jnp.zeros(3)}
  state = TrainState.create(params, optax.adam(1e-3))
  return state.replace(step=state.step + step)


def _make_checkpoints(directory: Path) -> None:
  checkpointer = Checkpointer(directory, keep=2)
  for step in (2, 4):
    checkpointer.save(step, _state(step), _Position())
  checkpointer.close()


def _read_checkpoints(directory: Path) -> str:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), _state(0))
  checkpointer, batches = Checkpointer(directory, keep=2), _Position()
  try:
    state = checkpointer.restore(like, batches)
  finally:
    checkpointer.close()
  return digest(state and (int(state.step), batches.restored, fingerprint(vars(state))))


# --- What training and gating write ---


def _make_coprocessor(directory: Path) -> None:
  boxed = Coprocessor(_DECODER, _LATENTS).init(jax.random.key(0), params_of(_DECODER))
  coprocessor_checkpoint.save(directory / 'package', coprocessor_checkpoint.CoprocessorCheckpoint(
      decoder_config=_DECODER, config=_LATENTS, decoder_fingerprint='d' * 32,
      vocabulary_hash='v' * 16, steps=7, params=nn.unbox(boxed)))


def _read_coprocessor(directory: Path) -> str:
  loaded = coprocessor_checkpoint.load(directory / 'package')
  described = {key: value for key, value in vars(loaded).items() if key != 'params'}
  return digest((described, fingerprint(loaded.params)))


def _make_decoder(directory: Path) -> None:
  weights.save(directory / 'decoder', _DECODER, params_of(_DECODER), 'v' * 16)


def _read_decoder(directory: Path) -> str:
  checkpoint = weights.open_checkpoint(directory / 'decoder')
  return digest((checkpoint.config, checkpoint.vocabulary_hash, checkpoint.fingerprint,
                 fingerprint(checkpoint.load())))


def _make_run(directory: Path) -> None:
  get_config = runpy.run_path(str(ROOT / 'configs/tiny.py'))['get_config']
  experiment = bind(get_config())
  config = dataclasses.asdict(experiment)
  del config['pretraining']  # which a training does not read
  claim_workdir(directory, RunIdentity('train', config, 'd' * 32, 'r' * 64))


def _read_run(directory: Path) -> str:
  return digest(bind(read_run(directory / RUN_FILE)))


def _make_gate(directory: Path) -> None:
  curve = {'fractions': [0.1, 0.4, 0.9], 'thresholds': [3.0, 2.0, 1.0]}
  stored = save({'weight': np.arange(16, dtype=np.float32), 'bias': np.ones(1, np.float32)})
  content = {'decoder': 'd' * 32, 'curves': {'learned': curve, 'entropy': curve},
             'weights': hashlib.sha256(stored).hexdigest()}
  (directory / GATE_FILE).write_text(json.dumps(seal(content), indent=2))
  (directory / GATE_WEIGHTS_FILE).write_bytes(stored)


def _read_gate(directory: Path) -> str:
  gate = open_gate(directory, 'learned', 0.1)
  inside = gate.policy.gate
  return digest((gate.decoder_fingerprint, gate.policy.threshold,
                 np.asarray(inside.weight).tolist(), float(inside.bias)))


# --- Packed rows ---


def _make_rows(directory: Path) -> None:
  # Imported by name, since it needs TensorFlow.
  packing = importlib.import_module('latent_deliberation.data.packing')
  random, bos, length = np.random.default_rng(3), 2, 16
  framing = Framing(bos, eos_id=1)
  recipe = Recipe(task='t', split='train', source_fingerprint='s', vocabulary_hash='v',
                  vocabulary_size=300, length=length, seed=0, max_tokens=0)
  files = packing.RowFiles(directory, recipe, framing, np.ones(300, np.int32))
  documents = (np.concatenate([[bos], random.integers(3, 300, random.integers(5, 40))])
               for _ in range(40))
  rows = list(packing.fill_rows(documents, length, framing))
  for first in range(0, len(rows), 32):
    files.write(rows[first:first + 32])
  manifest = Manifest(recipe, files.rows, files.tokens, 40, files.text_bytes, 32,
                      files.content_hash, bos)
  files.close()
  write_whole(directory / MANIFEST_FILE, manifest.seal())


def _read_rows(directory: Path) -> str:
  rows = PackedRows(directory)
  batch = rows.take(np.arange(len(rows)))
  return digest((vars(rows.manifest), rows.fingerprint,
                 [np.asarray(part).tolist() for part in (batch.tokens, batch.segments)]))


# --- Decoders of others ---


class _Foreign:
  """A decoder in a format that has no fingerprint of its own, and the coprocessor's word for it.

  Args:
    config: architecture.
    write: writes the decoder into a directory.
    name: name of its file; '' for the directory.
  """

  def __init__(self, config: TransformerConfig, write: Callable[[Path, TransformerConfig], None],
               name: str = ''):
    self._config, self._write, self._name = config, write, name
    self._described = coprocessor_checkpoint.Description(config, _LATENTS, '', '', 0)

  def make(self, directory: Path) -> None:
    """Writes the decoder, and notes its architecture and its fingerprint."""
    self._write(directory, self._config)
    checkpoint = weights.open_checkpoint(directory / self._name)
    self._described = dataclasses.replace(
        self._described, decoder_config=checkpoint.config,
        decoder_fingerprint=fingerprint(checkpoint.load()))

  def read(self, directory: Path) -> str:
    """Opens the decoder as a run with a coprocessor does, and compares what it knows."""
    checkpoint = weights.open_checkpoint(directory / self._name, self._described.decoder_config)
    checkpoint.check()
    found = fingerprint(checkpoint.load())
    coprocessor_checkpoint.check_decoder(self._described, found)
    return digest((checkpoint.config, found))


def _write_hugging_face(directory: Path, config: TransformerConfig) -> None:
  hugging_face.write(directory, config, params_of(config), file_bytes=6_000)  # with an index


_GGUF_NAMES = {
    'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'model.layers.': 'blk.',
    'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm',
    'pre_feedforward_layernorm': 'ffn_norm', 'post_feedforward_layernorm': 'post_ffw_norm',
    'post_attention_layernorm': 'post_attention_norm'}


def _write_gguf(directory: Path, config: TransformerConfig) -> None:
  gguf = importlib.import_module('gguf')
  writer = gguf.GGUFWriter(directory / 'model.gguf', 'gemma2')
  for name in ('block_count', 'embedding_length', 'feed_forward_length', 'head_count',
               'head_count_kv', 'key_length', 'layer_norm_rms_eps', 'rope_freq_base',
               'sliding_window', 'attn_logit_softcapping', 'final_logit_softcapping'):
    value = {'block_count': config.num_layers, 'embedding_length': config.embed_dim,
             'feed_forward_length': config.hidden_dim, 'head_count': config.num_heads,
             'head_count_kv': config.num_kv_heads, 'key_length': config.head_dim,
             'layer_norm_rms_eps': config.norm_epsilon, 'rope_freq_base': config.rope_base,
             'sliding_window': config.window, 'attn_logit_softcapping': config.attention_softcap,
             'final_logit_softcapping': config.final_softcap}[name]
    getattr(writer, f'add_{name}')(value)
  for name, values in hugging_face.stored_tensors(
      hugging_face.find_layout(config), config, params_of(config)):
    values = np.ascontiguousarray(values, np.float32) + name.endswith('norm.weight')
    for theirs, ours in _GGUF_NAMES.items():
      name = name.replace(theirs, ours)
    writer.add_tensor(name, values.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def subjects() -> list[Subject]:
  """Returns all subjects; GGUF only where its library is installed."""
  hub = _Foreign(_DECODER, _write_hugging_face)
  file = _Foreign(dataclasses.replace(PRESETS['gemma2_2b'], **{
      key: getattr(_DECODER, key) for key in (
          'vocab_size', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'hidden_dim',
          'num_layers', 'window')}), _write_gguf, 'model.gguf')
  return [
      Subject('checkpoints of a run', _make_checkpoints, _read_checkpoints),
      Subject('run.json', _make_run, _read_run),
      Subject('coprocessor', _make_coprocessor, _read_coprocessor),
      Subject('decoder', _make_decoder, _read_decoder),
      Subject('gate', _make_gate, _read_gate),
      Subject('packed rows', _make_rows, _read_rows),
      Subject('Hugging Face directory', hub.make, hub.read),
      *([Subject('GGUF file', file.make, file.read)] if importlib.util.find_spec('gguf') else [])]
