"""TransformerConfig, the architecture of a decoder, and PRESETS, the published sizes by name."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from latent_deliberation.errors import (
  UserError,
  check_integer,
  check_types,
  problems_of,
  raise_problems,
)

LAYER_KINDS = ('local', 'global')
ACTIVATIONS = ('gelu', 'silu')
# Switches that tell Llama and Qwen from Gemma, which has the default of each.
_SWITCHES = ('rope_llama3', 'norm_offset', 'activation', 'scale_embeddings', 'qkv_bias',
             'tied_head')

MOST_LAYERS = 10_000  # a number beyond it is damage, and would take all memory


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder of the Gemma or Llama family: grouped-query attention, gated feed-forward, RMS norms.

  The defaults are those of Gemma 2. Gemma 1 has only global layers, no caps and no post-norms. The
  text part of Gemma 3 has query-key norms and no caps. It has five local layers for each global
  one, and each of the two kinds has its own rotary base. Llama, Mistral and Qwen have plain norms,
  SiLU, unscaled embeddings, no caps and no post-norms.

  Attributes:
    vocab_size: V; number of rows of the embedding and of the output head.
    embed_dim: D, width of the model.
    num_layers: L, number of blocks.
    num_heads: N, number of query heads.
    num_kv_heads: K, number of key and value heads; divides N.
    head_dim: H, width of a head; even, because rotary embeddings rotate pairs.
    hidden_dim: F, width of each of the two gated feed-forward branches.
    layer_pattern: kinds of the layers, repeated from the first layer on; 'local' sees a sliding
      window, 'global' sees everything before it.
    window: number of keys that a local layer sees, with the query's own.
    attention_softcap: scores become cap * tanh(scores / cap); None for no cap.
    final_softcap: the same for the output logits.
    query_scale: factor on the queries; None for head_dim ** -0.5.
    qk_norm: whether each head's query and key have RMS norms, before they are rotated.
    post_norms: whether attention and feed-forward have RMS norms after them, too.
    rope_base: wavelength base of the rotary embedding.
    rope_local_base: wavelength base on local layers; None for rope_base.
    rope_scaling: factor that positions are divided by on global layers (linear scaling, arXiv
      2306.15595).
    rope_llama3: Llama 3's scaling of wavelengths on global layers: factor, low and high frequency
      factors, and the length that the model was first trained on; () for none.
    norm_epsilon: number added to the mean square in every RMS norm.
    norm_offset: whether norms multiply by 1 + scale, as in Gemma, or by scale.
    activation: function of the feed-forward's gate, one of ACTIVATIONS; 'gelu' is its tanh form.
    scale_embeddings: whether input embeddings are multiplied by sqrt(D), as in Gemma.
    qkv_bias: whether queries, keys and values have a bias, as in Qwen 2.
    tied_head: whether the embedding is also the output head; otherwise the head has a table of
      its own.
  """
  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  hidden_dim: int
  layer_pattern: tuple[str, ...] = LAYER_KINDS
  window: int = 4096
  attention_softcap: float | None = 50.0
  final_softcap: float | None = 30.0
  query_scale: float | None = None
  qk_norm: bool = False
  post_norms: bool = True
  rope_base: float = 10_000.0
  rope_local_base: float | None = None
  rope_scaling: float = 1.0
  rope_llama3: tuple[float, ...] = ()
  norm_epsilon: float = 1e-6
  norm_offset: bool = True
  activation: str = 'gelu'
  scale_embeddings: bool = True
  qkv_bias: bool = False
  tied_head: bool = True

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'layer_pattern', tuple(self.layer_pattern))
    object.__setattr__(self, 'rope_llama3', tuple(self.rope_llama3))
    raise_problems(self._problems())

  def _problems(self) -> Iterator[str]:
    wrong = set()
    for name in ('vocab_size', 'embed_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim',
                 'hidden_dim', 'window'):
      most = MOST_LAYERS if name == 'num_layers' else 2**31 - 1
      problems = problems_of(check_integer, name, getattr(self, name), 1, most)
      wrong |= {name} if problems else set()
      yield from problems
    # Factors. None turns a soft-cap off, or selects the default that the docstring names.
    for name in ('attention_softcap', 'final_softcap', 'query_scale', 'rope_base',
                 'rope_local_base', 'rope_scaling', 'norm_epsilon'):
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        yield f'{name} = {value!r} is not a finite number above 0: set one'
    if self.activation not in ACTIVATIONS:
      yield f'activation = {self.activation!r}: set one of {ACTIVATIONS}'
    # Numbers that must fit together.
    if not wrong & {'num_heads', 'num_kv_heads'} and self.num_heads % self.num_kv_heads:
      yield (f'num_heads = {self.num_heads} is not a multiple of num_kv_heads = '
             f'{self.num_kv_heads}: each kv head serves the same number of query heads, so change '
             'one of the two')
    if self.rope_llama3 and not _is_llama3(self.rope_llama3):
      yield (f'rope_llama3 = {self.rope_llama3}: give () or four numbers above 0, which are '
             'factor, low and high frequency factors, and original length; low must be less than '
             'high')
    if 'head_dim' not in wrong and self.head_dim % 2:
      yield f'head_dim = {self.head_dim} is odd: set an even number'
    unknown = set(self.layer_pattern) - set(LAYER_KINDS)
    if unknown or not self.layer_pattern:
      yield f'layer_pattern = {self.layer_pattern}: give one or more of {LAYER_KINDS}'

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The kind of each of the L layers."""
    period = len(self.layer_pattern)
    return tuple(self.layer_pattern[i % period] for i in range(self.num_layers))

  def last(self, num_layers: int) -> 'TransformerConfig':
    """Returns the architecture of the last layers. UserError: there are not that many, or none."""
    if not 0 < num_layers <= self.num_layers:
      raise UserError(f'num_layers = {num_layers}: the decoder has {self.num_layers} layers; set a '
                      f'number from 1 to {self.num_layers}')
    return dataclasses.replace(
        self, num_layers=num_layers, layer_pattern=self.layer_kinds[-num_layers:])


def _is_llama3(values: tuple[Any, ...]) -> bool:
  """Whether values are a scaling of wavelengths, whose ramp goes from `low` up to `high`."""
  return (len(values) == 4 and all(0 < value < math.inf for value in values)
          and values[1] < values[2])


def unlike_gemma(config: TransformerConfig) -> dict[str, Any]:
  """Returns the switches, by key, that have a value which no Gemma has."""
  defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
  return {name: getattr(config, name) for name in _SWITCHES
          if getattr(config, name) != defaults[name]}


# What all models of a family have. The defaults of TransformerConfig are those of Gemma 2.
_NO_SOFTCAPS = {'attention_softcap': None, 'final_softcap': None}
GEMMA1 = {'layer_pattern': ('global',), 'post_norms': False, **_NO_SOFTCAPS}
GEMMA3 = {'layer_pattern': ('local',) * 5 + ('global',), 'qk_norm': True, 'rope_local_base': 1e4,
          **_NO_SOFTCAPS}
LLAMA = {'layer_pattern': ('global',), 'post_norms': False, 'norm_offset': False,
         'scale_embeddings': False, **_NO_SOFTCAPS}


def _gemma1(**sizes: int) -> TransformerConfig:
  return TransformerConfig(vocab_size=256_000, head_dim=256, **sizes, **GEMMA1)


def _gemma3(**sizes: float) -> TransformerConfig:
  return TransformerConfig(**{'head_dim': 256, **sizes}, rope_base=1e6, **GEMMA3)


PRESETS = {
    'tiny': TransformerConfig(
        vocab_size=260, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        hidden_dim=64, window=8),
    'gemma1_2b': _gemma1(
        embed_dim=2048, num_layers=18, num_heads=8, num_kv_heads=1, hidden_dim=16_384),
    'gemma1_7b': _gemma1(
        embed_dim=3072, num_layers=28, num_heads=16, num_kv_heads=16, hidden_dim=24_576),
    'gemma2_2b': TransformerConfig(
        vocab_size=256_000, embed_dim=2304, num_layers=26, num_heads=8, num_kv_heads=4,
        head_dim=256, hidden_dim=9216),
    'gemma2_9b': TransformerConfig(
        vocab_size=256_000, embed_dim=3584, num_layers=42, num_heads=16, num_kv_heads=8,
        head_dim=256, hidden_dim=14_336),
    'gemma2_27b': TransformerConfig(
        vocab_size=256_000, embed_dim=4608, num_layers=46, num_heads=32, num_kv_heads=16,
        head_dim=128, hidden_dim=36_864, query_scale=(4608 / 32) ** -0.5),
    'gemma3_270m': _gemma3(
        vocab_size=262_144, embed_dim=640, num_layers=18, num_heads=4, num_kv_heads=1,
        hidden_dim=2048, window=512),
    'gemma3_1b': _gemma3(
        vocab_size=262_144, embed_dim=1152, num_layers=26, num_heads=4, num_kv_heads=1,
        hidden_dim=6912, window=512),
    'gemma3_4b': _gemma3(
        vocab_size=262_208, embed_dim=2560, num_layers=34, num_heads=8, num_kv_heads=4,
        hidden_dim=10_240, window=1024, rope_scaling=8.0),
    'gemma3_12b': _gemma3(
        vocab_size=262_208, embed_dim=3840, num_layers=48, num_heads=16, num_kv_heads=8,
        hidden_dim=15_360, window=1024, rope_scaling=8.0),
    'gemma3_27b': _gemma3(
        vocab_size=262_208, embed_dim=5376, num_layers=62, num_heads=32, num_kv_heads=16,
        head_dim=128, hidden_dim=21_504, window=1024, rope_scaling=8.0,
        query_scale=(5376 / 32) ** -0.5),
}


def find_preset(name: str) -> TransformerConfig:
  """Returns the preset of a name. UserError: there is none; the message lists the names."""
  if name not in PRESETS:
    raise UserError(f'{name!r} is neither a directory nor a preset; presets are '
                    f'{", ".join(PRESETS)}')
  return PRESETS[name]
