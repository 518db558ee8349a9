"""GGUF files, llama.cpp's format, in which quantised models are passed around.

A file is read as if it were a Hugging Face checkpoint: tensors get Hugging Face's names, shapes and
values, one at a time, dequantised by the gguf library. Three things differ in the file, and are
undone here: shapes are reversed, Gemma's norms are stored as 1 + scale, and queries and keys of the
architecture 'llama' are stored in the order of another rotary layout.
"""

import hashlib
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
from latent_deliberation.files import write_whole
from latent_deliberation.model.checkpoints.source import Stored
from latent_deliberation.model.rotary import rotary_frequencies
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig

SUFFIX = '.gguf'
GEMMAS, LLAMAS = ('gemma', 'gemma2', 'gemma3'), ('llama', 'qwen2', 'qwen3')
_LAYER = {
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm'}
# With norms after attention and feed-forward, and without.
_POST_NORMS = {'post_attention_norm': 'post_attention_layernorm',
               'ffn_norm': 'pre_feedforward_layernorm',
               'post_ffw_norm': 'post_feedforward_layernorm'}
_PRE_NORMS = {'ffn_norm': 'post_attention_layernorm'}
_WHOLE = {'token_embd.weight': 'model.embed_tokens.weight',
          'output_norm.weight': 'model.norm.weight', 'output.weight': 'lm_head.weight'}
_ROPE_FACTORS = 'rope_freqs.weight'
_FLOATS = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# What a scaling of Llama 3's wavelengths may be; a file holds only the factors that come of it.
_LLAMA3_SHAPE = (1.0, 4.0, 8192.0)


def find_file(path: Path) -> Path | None:
  """The GGUF file that `path` is or holds; None where there is none.

  Raises:
    UserError: a directory holds several.
  """
  if path.is_file():
    return path if path.suffix == SUFFIX else None
  files = sorted(path.glob(f'*{SUFFIX}'))
  if len(files) > 1:
    raise UserError(f'{path} holds {len(files)} GGUF files, {[file.name for file in files]}: give '
                    'the path of one of them')
  return files[0] if files else None


class GGUFSource:
  """A Source. Opening it reads metadata and the list of tensors, and no weights.

  Attributes:
    file: path of the file.
    architecture: general.architecture, one of GEMMAS and LLAMAS.
    metadata: all key-value pairs of the file.

  Raises:
    UserError: the gguf library is not installed, or the file is damaged, cut short, of an unknown
      architecture, or has a tensor that we do not know.
  """

  def __init__(self, file: Path):
    if importlib.util.find_spec('gguf') is None:
      raise UserError(f"{file} is a GGUF file, which needs the gguf library: pip install -e "
                      "'.[gguf]'")
    import gguf
    self._dequantise = gguf.dequantize
    self.directory = self.file = file
    try:
      reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader raises whatever numpy raises
      raise UserError(f'{file} ({file.stat().st_size:,} bytes) is not a whole GGUF file ({error}): '
                      'download it again') from error
    self.metadata = {name: field for name, field in reader.fields.items()}
    self.architecture = self.get('general.architecture')
    if self.architecture not in GEMMAS + LLAMAS:
      raise UserError(f'{file}: architecture {self.architecture!r} is not supported; supported are '
                      f'{", ".join(GEMMAS + LLAMAS)}')
    self.tensors: dict[str, Stored] = {}
    self._stored: dict[str, Any] = {}
    self.rope_factors: np.ndarray | None = None
    for tensor in reader.tensors:
      if tensor.data_offset + tensor.n_bytes > file.stat().st_size:
        raise UserError(f'{file} ends inside of {tensor.name}: download it again')
      if tensor.name == _ROPE_FACTORS:
        self.rope_factors = np.array(tensor.data)
        continue
      name = self._name(tensor.name)
      kind = tensor.tensor_type.name
      self.tensors[name] = Stored(tuple(int(size) for size in reversed(tensor.shape)),
                                  _FLOATS.get(kind, 'float32'))
      self._stored[name] = tensor

  def get(self, key: str, default: Any = None) -> Any:
    """A value of the metadata; '{}' in the key stands for the architecture."""
    field = self.metadata.get(key.format(getattr(self, 'architecture', '')))
    return default if field is None else field.contents()

  def encodings(self) -> dict[str, str]:
    """How each tensor is stored, such as 'Q4_K'."""
    return {name: tensor.tensor_type.name for name, tensor in self._stored.items()}

  def _name(self, stored: str) -> str:
    """Hugging Face's name of a stored tensor."""
    if stored in _WHOLE:
      return _WHOLE[stored]
    layered = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', stored)
    norms = _POST_NORMS if self.architecture in ('gemma2', 'gemma3') else _PRE_NORMS
    known = _LAYER | norms
    if layered is None or layered[2] not in known:
      raise UserError(f'{self.file}: tensor {stored} is none that a {self.architecture} has')
    return f'model.layers.{layered[1]}.{known[layered[2]]}.{layered[3]}'

  def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
    """The leading `shape` of a tensor, with Hugging Face's values."""
    tensor = self._stored[name]
    try:
      values = self._dequantise(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise UserError(f'{self.file}: {tensor.name} is stored as {tensor.tensor_type.name}, which '
                      'the gguf library cannot dequantise: take a file of another type'
                      ) from error
    values = np.asarray(values).reshape(self.tensors[name].shape)
    if self.architecture in GEMMAS and name.endswith('norm.weight'):
      values = values - 1
    if self.architecture == 'llama' and re.search(r'\.[qk]_proj\.', name):
      values = _in_halves(values, self.get('{}.attention.head_count') if '.q_proj.' in name
                          else self.get('{}.attention.head_count_kv'))
    values = values[:shape[0]].astype(self.tensors[name].dtype)
    return jax.make_array_from_callback(shape, sharding, lambda index: values[index])


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
  """Rows of heads whose rotary pairs are neighbours, with each pair's members in two halves."""
  pairs = values.reshape(heads, -1, 2, *values.shape[1:])
  return pairs.swapaxes(1, 2).reshape(values.shape)


def read_config(source: GGUFSource) -> TransformerConfig:
  """The architecture that the metadata describes.

  Raises:
    UserError: a key is missing, or has a value that no decoder of ours has.
  """
  get = source.get
  try:
    width, heads = _need(source, 'embedding_length'), _need(source, 'attention.head_count')
    head_dim = get('{}.attention.key_length', width // heads)
    common = dict(
        vocab_size=source.tensors['model.embed_tokens.weight'].shape[0], embed_dim=width,
        num_layers=_need(source, 'block_count'), num_heads=heads,
        num_kv_heads=get('{}.attention.head_count_kv', heads), head_dim=head_dim,
        hidden_dim=_need(source, 'feed_forward_length'),
        norm_epsilon=_short(_need(source, 'attention.layer_norm_rms_epsilon')),
        rope_base=float(get('{}.rope.freq_base', 10_000.0)))
    if get('{}.rope.scaling.type') == 'linear':
      common['rope_scaling'] = float(get('{}.rope.scaling.factor'))
    if source.architecture in GEMMAS:
      return _gemma(source, common)
    return TransformerConfig(
        **common, layer_pattern=('global',), attention_softcap=None, final_softcap=None,
        post_norms=False, norm_offset=False, activation='silu', scale_embeddings=False,
        qk_norm=source.architecture == 'qwen3', qkv_bias=source.architecture == 'qwen2',
        tied_head='lm_head.weight' not in source.tensors,
        rope_llama3=_llama3(source, head_dim, common['rope_base']))
  except (KeyError, TypeError, ZeroDivisionError) as error:
    raise UserError(f'{source.file}: the metadata lack {error}: download the file again') from error


def _need(source: GGUFSource, key: str) -> Any:
  value = source.get('{}.' + key)
  if value is None:
    raise KeyError(f'{source.architecture}.{key}')
  return value


def _short(value: float) -> float:
  """A float32 as the shortest decimal that rounds to it: 9.99999997e-07 is 1e-06."""
  return float(str(np.float32(value)))


def _gemma(source: GGUFSource, common: Mapping[str, Any]) -> TransformerConfig:
  """Gemma 1, 2 or 3. What a file does not tell is that of the preset with as many layers."""
  family = source.architecture
  scale = {46: PRESETS['gemma2_27b'].query_scale, 62: PRESETS['gemma3_27b'].query_scale}
  common = {**common, 'query_scale': scale.get(common['num_layers'])}
  if family == 'gemma':
    return TransformerConfig(**{**common, 'query_scale': None}, layer_pattern=('global',),
                             attention_softcap=None, final_softcap=None, post_norms=False)
  window = _need(source, 'attention.sliding_window')
  if family == 'gemma2':
    return TransformerConfig(
        **common, window=window, attention_softcap=_short(_need(source, 'attn_logit_softcapping')),
        final_softcap=_short(_need(source, 'final_logit_softcapping')))
  return TransformerConfig(
      **common, window=window, layer_pattern=('local',) * 5 + ('global',), attention_softcap=None,
      final_softcap=None, qk_norm=True, rope_local_base=1e4)


def _llama3(source: GGUFSource, head_dim: int, base: float) -> tuple[float, ...]:
  """The scaling whose factors the file holds; () where it holds none."""
  if source.rope_factors is None:
    return ()
  scaling = (float(source.rope_factors.max()), *_LLAMA3_SHAPE)
  plain, scaled = rotary_frequencies(head_dim, base), rotary_frequencies(head_dim, base, 1, scaling)
  if not np.allclose(plain / scaled, source.rope_factors, rtol=1e-3):
    raise UserError(f'{source.file}: {_ROPE_FACTORS} holds a scaling of rotary embeddings that is '
                    "not Llama 3's: take another model")
  return scaling


# Types of a piece in the metadata, which are SentencePiece's own.
_UNKNOWN, _USER_DEFINED = 2, 4
_SPACE = '\u2581'  # SentencePiece's sign for a space
CACHE = Path('~/.cache/latent_deliberation/tokenizers')


def rebuild_sentencepiece(source: GGUFSource) -> bytes:
  """The SentencePiece model that the metadata describe, as the bytes of a tokenizer.model.

  Raises:
    UserError: the vocabulary is not SentencePiece's, or it is larger than the table of embeddings.
  """
  from sentencepiece import sentencepiece_model_pb2
  kind = source.get('tokenizer.ggml.model')
  if kind != 'llama':
    raise UserError(f'{source.file}: tokenizer.ggml.model = {kind!r} is not a SentencePiece '
                    'vocabulary: give the tokenizer of the model, --vocabulary=PATH')
  pieces, scores, types = (source.get(f'tokenizer.ggml.{key}')
                           for key in ('tokens', 'scores', 'token_type'))
  rows = source.tensors['model.embed_tokens.weight'].shape[0]
  if len(pieces) > rows:
    raise UserError(f'{source.file}: {len(pieces)} pieces, but {rows} embeddings: download it '
                    'again')
  ids = {name: source.get(f'tokenizer.ggml.{name}_token_id')
         for name in ('padding', 'eos', 'bos', 'unknown')}
  model = sentencepiece_model_pb2.ModelProto()
  for number, (piece, score, type_) in enumerate(zip(pieces, scores, types, strict=True)):
    # User-defined pieces hold real spaces in the file, where SentencePiece wants its sign.
    model.pieces.add(
        piece=piece.replace(' ', _SPACE) if type_ == _USER_DEFINED else piece, score=score,
        type=_UNKNOWN if number == ids['unknown'] else type_)
  spec = model.trainer_spec
  spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, True, len(pieces)
  for ours, theirs in (('pad', 'padding'), ('eos', 'eos'), ('bos', 'bos'), ('unk', 'unknown')):
    number = -1 if ids[theirs] is None else ids[theirs]
    setattr(spec, f'{ours}_id', number)
    if number >= 0:
      setattr(spec, f'{ours}_piece', pieces[number])
  normaliser = model.normalizer_spec
  normaliser.name, normaliser.escape_whitespaces = 'identity', True
  normaliser.add_dummy_prefix = bool(source.get('tokenizer.ggml.add_space_prefix', True))
  normaliser.remove_extra_whitespaces = False
  return model.SerializeToString()


def cache_tokenizer(source: GGUFSource) -> Path | None:
  """Path of the rebuilt tokenizer.model in the user's cache; None where it is of another kind."""
  if source.get('tokenizer.ggml.model') != 'llama':
    return None
  content = rebuild_sentencepiece(source)
  path = CACHE.expanduser() / hashlib.sha256(content).hexdigest()[:16] / 'tokenizer.model'
  if not path.is_file():
    write_whole(path, content)
  return path
