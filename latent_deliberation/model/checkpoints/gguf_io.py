"""GGUF files, the format of llama.cpp, in which quantised models are published.

A file is read as if it were a Hugging Face checkpoint. Each tensor is dequantised by the gguf
library and gets Hugging Face's name, shape and values. Three things differ in the file and are
undone here. Shapes are reversed. Gemma's norms are stored as 1 + scale. Architecture 'llama' has
the rows of queries and keys in another order, in which rotary pairs are neighbours. The vocabulary
is read by gguf_tokenizer.py.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from latent_deliberation.array_types import Array
from latent_deliberation.errors import UserError
from latent_deliberation.files import list_directory
from latent_deliberation.model.checkpoints.hugging_face import HEAD, TABLE
from latent_deliberation.model.checkpoints.source import Stored
from latent_deliberation.model.rotary import rotary_frequencies
from latent_deliberation.model.transformer_config import (
  GEMMA1,
  GEMMA3,
  LLAMA,
  PRESETS,
  TransformerConfig,
)
from latent_deliberation.paths import GGUF

GEMMAS, LLAMAS = ('gemma', 'gemma2', 'gemma3'), ('llama', 'qwen2', 'qwen3')
# Stored name -> Hugging Face's name, of the tensors of a layer and of the others.
_LAYER = {
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm'}
# The other norms of a layer, with norms after attention and feed-forward, and without.
_POST_NORMS = {'post_attention_norm': 'post_attention_layernorm',
               'ffn_norm': 'pre_feedforward_layernorm',
               'post_ffw_norm': 'post_feedforward_layernorm'}
_PRE_NORMS = {'ffn_norm': 'post_attention_layernorm'}
_WHOLE = {'token_embd.weight': TABLE, 'output_norm.weight': 'model.norm.weight',
          'output.weight': HEAD}
_ROPE_FACTORS = 'rope_freqs.weight'
_FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# Low and high frequency factors and original length of every published Llama 3. A file holds only
# the factors that follow from them, one for each rotary pair.
_LLAMA3_SHAPE = (1.0, 4.0, 8192.0)


def find_file(path: Path) -> Path | None:
  """Returns the GGUF file that `path` is or holds; None if there is none.

  Raises:
    UserError: a directory holds several GGUF files.
  """
  if path.is_file():
    return path if path.suffix == GGUF else None
  files = [file for file in list_directory(path) if file.suffix == GGUF]
  if len(files) > 1:
    raise UserError(f'{path} holds {len(files)} GGUF files, {[file.name for file in files]}: give '
                    'the path of one of them')
  return files[0] if files else None


class GGUFSource:
  """A Source of a GGUF file. Opening it reads metadata and the list of tensors, but no weights.

  Attributes:
    file: path of the file, also called `directory` as in other sources.
    architecture: general.architecture, one of GEMMAS and LLAMAS.
    metadata: all key-value pairs of the file.
    tensors: all tensors, by Hugging Face's names; quantised ones count as float32.
    rope_factors: [H / 2] factors of Llama 3's rotary wavelengths; None if the file has none.

  Raises:
    UserError: the gguf library is not installed; or the file is damaged, cut short, one of several
      parts, of an unknown architecture, or has a tensor of an unknown name or type.
  """

  def __init__(self, file: Path):
    if importlib.util.find_spec('gguf') is None:
      raise UserError(f"{file} is a GGUF file, which needs the gguf library: pip install -e "
                      "'.[gguf]'")
    # Imported lazily, because the library is an extra.
    import gguf

    from latent_deliberation.model.checkpoints.gguf_reader import open_file
    self._dequantise = gguf.dequantize
    self.directory = self.file = file
    reader = open_file(file)
    # The metadata say whether we know the architecture, and whether tensors are in other files.
    self.metadata = dict(reader.fields)
    self.architecture = self.get('general.architecture')
    if self.architecture not in GEMMAS + LLAMAS:
      raise UserError(f'{file}: architecture {self.architecture!r} is not supported; give one of '
                      f'{", ".join(GEMMAS + LLAMAS)}')
    parts = self.get('split.count', 1)
    if parts not in (0, 1):
      raise UserError(f'{file} is one of {parts} parts: merge them with llama-gguf-split --merge')
    # Names, shapes and dtypes of all tensors. The reader maps the file and copies nothing.
    self.tensors: dict[str, Stored] = {}
    self._stored: dict[str, Any] = {}
    self.rope_factors: np.ndarray | None = None
    for tensor in reader.tensors:
      if tensor.name == _ROPE_FACTORS and self.architecture in LLAMAS:
        self.rope_factors = np.array(tensor.data)
        continue
      name = self._name(tensor.name)
      kind = tensor.tensor_type.name
      self.tensors[name] = Stored(tuple(int(size) for size in reversed(tensor.shape)),
                                  _FLOATS.get(kind, 'float32'))
      self._stored[name] = tensor

  def get(self, key: str, default: Any = None) -> Any:
    """Returns a value of the metadata; '{}' in the key stands for the architecture."""
    field = self.metadata.get(key.format(getattr(self, 'architecture', '')))
    try:
      return default if field is None else field.contents()
    except (ValueError, IndexError) as error:  # a text that is no Unicode
      raise UserError(f'{self.file}: {key} is damaged ({error}): download it again') from error

  @property
  def num_embeddings(self) -> int:
    """Number of rows of the embedding table."""
    return self.tensors[TABLE].shape[0]

  def encodings(self) -> dict[str, str]:
    """Returns how the file stores each tensor, such as 'Q4_K', by Hugging Face's names."""
    return {name: tensor.tensor_type.name for name, tensor in self._stored.items()}

  def _name(self, stored: str) -> str:
    """Returns Hugging Face's name of a stored tensor."""
    if stored in _WHOLE:
      return _WHOLE[stored]
    layered = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', stored)
    norms = _POST_NORMS if self.architecture in ('gemma2', 'gemma3') else _PRE_NORMS
    known = _LAYER | norms
    if layered is None or layered[2] not in known:
      raise UserError(f'{self.file}: tensor {stored} is unknown in a {self.architecture}: give '
                      'another decoder')
    return f'model.layers.{layered[1]}.{known[layered[2]]}.{layered[3]}'

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """Returns the leading `shape` of a tensor, with Hugging Face's values; see Source.

    A row is stored in whole blocks, so only the rows of this host's shards are dequantised.
    """
    tensor, whole = self._stored[name], self.tensors[name]
    # Undo what llama.cpp's converter changed: the order of rows, and the offset of norms.
    order = np.arange(whole.shape[0])
    if self.architecture == 'llama' and re.search(r'\.[qk]_proj\.', name):
      order = _in_halves(order, self.get('{}.attention.head_count') if '.q_proj.' in name
                         else self.get('{}.attention.head_count_kv',
                                       self.get('{}.attention.head_count')))
    offset = self.architecture in GEMMAS and name.endswith('norm.weight')

    @functools.cache  # shards may share rows
    def read_rows(start: int, stop: int) -> np.ndarray:
      if len(whole.shape) == 1:
        values = np.asarray(self._dequantise(tensor.data, tensor.tensor_type))[order[start:stop]]
      else:
        values = self._dequantise(tensor.data[order[start:stop]], tensor.tensor_type)
      values = values.reshape(stop - start, *whole.shape[1:])
      return (values - offset if offset else values).astype(whole.dtype)

    return jax.make_array_from_callback(shape, sharding, lambda index: read_rows(
        *index[0].indices(shape[0])[:2])[:, *index[1:]])


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
  """Returns rows of heads, whose rotary pairs are neighbours, with the pairs in two halves."""
  pairs = values.reshape(heads, -1, 2, *values.shape[1:])
  return pairs.swapaxes(1, 2).reshape(values.shape)


def read_config(source: GGUFSource) -> TransformerConfig:
  """Returns the architecture that the metadata describe.

  Raises:
    UserError: a key is missing, or has a value that no decoder of ours has.
  """
  try:
    common = _read_sizes(source)
    if source.architecture in GEMMAS:
      return _read_gemma(source, common)
    return TransformerConfig(
        **common, **LLAMA, activation='silu', qk_norm=source.architecture == 'qwen3',
        qkv_bias=source.architecture == 'qwen2', tied_head=HEAD not in source.tensors,
        rope_llama3=_read_llama3(source, common['head_dim'], common['rope_base']))
  except KeyError as error:
    raise UserError(f'{source.file} lacks {error}: download it again') from error
  except UserError as error:
    raise UserError(f'{source.file} describes a decoder that is not supported: {error}') from error
  except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
    raise UserError(f'{source.file} has a value of a wrong type ({error}): download it '
                    'again') from error


def _read_sizes(source: GGUFSource) -> dict[str, Any]:
  """Returns the keys of a TransformerConfig that all architectures have."""
  width, heads = _need(source, 'embedding_length'), _need(source, 'attention.head_count')
  sizes = dict(
      vocab_size=source.num_embeddings, embed_dim=width,
      num_layers=_need(source, 'block_count'), num_heads=heads,
      num_kv_heads=source.get('{}.attention.head_count_kv', heads),
      head_dim=source.get('{}.attention.key_length', width // heads),
      hidden_dim=_need(source, 'feed_forward_length'),
      norm_epsilon=_shorten(_need(source, 'attention.layer_norm_rms_epsilon')),
      # llama.cpp's default, which no Gemma 3 has.
      rope_base=float(_need(source, 'rope.freq_base') if source.architecture == 'gemma3'
                      else source.get('{}.rope.freq_base', 10_000.0)))
  # As llama.cpp reads them: linear without a type, by a factor of the current or an older name.
  scaling = source.get('{}.rope.scaling.type', 'linear')
  if scaling == 'linear':
    sizes['rope_scaling'] = float(
        source.get('{}.rope.scaling.factor') or source.get('{}.rope.scale_linear') or 1)
  elif scaling != 'none':
    raise UserError(f'rope.scaling.type = {scaling!r}, only linear and none are supported: give '
                    'another decoder')
  return sizes


def _need(source: GGUFSource, key: str) -> Any:
  """Returns a value of the architecture's own keys. KeyError: there is none."""
  value = source.get('{}.' + key)
  if value is None:
    raise KeyError(f'{source.architecture}.{key}')
  return value


def _shorten(value: float) -> float:
  """Returns the shortest decimal that rounds to the same float32: 9.99999997e-07 is 1e-06."""
  return float(str(np.float32(value)))


def _read_gemma(source: GGUFSource, common: Mapping[str, Any]) -> TransformerConfig:
  """Returns the architecture of Gemma 1, 2 or 3.

  A file does not hold the scale of queries. As in llama.cpp, the number of layers tells the 27B
  sizes, which have another scale than the rest.
  """
  family = source.architecture
  if family == 'gemma':
    return TransformerConfig(**common, **GEMMA1)
  scale = {config.num_layers: config.query_scale
           for config in (PRESETS['gemma2_27b'], PRESETS['gemma3_27b'])}
  common = {**common, 'query_scale': scale.get(common['num_layers'])}
  if family == 'gemma2':
    return TransformerConfig(
        **common, window=_need(source, 'attention.sliding_window'),
        attention_softcap=_shorten(_need(source, 'attn_logit_softcapping')),
        final_softcap=_shorten(_need(source, 'final_logit_softcapping')))
  # A Gemma 3 has Google's values of these unless the file has others.
  own = dict(GEMMA3)
  if (cap := source.get('{}.final_logit_softcapping')) is not None:
    own['final_softcap'] = _shorten(cap)
  if (base := source.get('{}.rope.freq_base_swa')) is not None:
    own['rope_local_base'] = float(base)
  if (pattern := source.get('{}.attention.sliding_window_pattern')) is not None:
    own['layer_pattern'] = _read_pattern(source, pattern, common['num_layers'])
  if 'local' in own['layer_pattern']:
    own['window'] = _need(source, 'attention.sliding_window')
  return TransformerConfig(**common, **own)


def _read_pattern(source: GGUFSource, pattern: int | list[bool], num_layers: int,
                  ) -> tuple[str, ...]:
  """Returns the kinds of layers; `pattern` says how often one is global, or which are local."""
  if isinstance(pattern, list):
    if len(pattern) != num_layers:
      raise UserError(f'{source.file}: attention.sliding_window_pattern has {len(pattern)} values '
                      f'for {num_layers} layers: download it again')
    return tuple('local' if is_local else 'global' for is_local in pattern)
  return ('local',) * (pattern - 1) + ('global',) if pattern else ('local',)


def _read_llama3(source: GGUFSource, head_dim: int, base: float) -> tuple[float, ...]:
  """Returns the `rope_llama3` whose factors the file holds; () if it holds none."""
  factors = source.rope_factors
  if factors is None:
    return ()
  # The longest wavelengths are divided by the whole factor, so it is the largest that is stored.
  scaling = (float(factors.max()), *_LLAMA3_SHAPE)
  plain, scaled = rotary_frequencies(head_dim, base), rotary_frequencies(head_dim, base, 1, scaling)
  if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-3):
    raise UserError(f"{_ROPE_FACTORS} {list(factors.shape)} does not hold Llama 3's scaling of "
                    'rotary embeddings: give another decoder')
  return scaling
