"""The architecture of a decoder, and the published sizes by name."""

import dataclasses

from latent_deliberation.errors import UserError

LAYER_KINDS = ('local', 'global')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Gemma-style decoder: grouped-query attention, gated feed-forward, RMS norms.

  The defaults are Gemma 2's. Gemma 1 has global layers only, no caps and no post-norms. Gemma 3
  (its text part) has no caps, but query-key norms, five local layers to a global one, and a rotary
  base of its own for each of the two kinds.

  Attributes:
    vocab_size: V; rows of the embedding, which is also the output head.
    embed_dim: D, model width.
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K; divides N.
    head_dim: H; even, since rotary embeddings turn pairs.
    hidden_dim: F, width of each of the two gated feed-forward branches.
    layer_pattern: kinds of the layers, repeated from the first layer on; 'local' sees a sliding
      window, 'global' everything before it.
    window: keys that a local layer sees, the query's own included.
    attention_softcap: scores become cap * tanh(scores / cap); None for no cap.
    final_softcap: the same for the output logits.
    query_scale: factor on the queries; None for head_dim ** -0.5.
    qk_norm: RMS norms on every head's query and key, before they are rotated.
    post_norms: RMS norms behind attention and feed-forward too, not only before them.
    rope_base: wavelength base of the rotary embedding.
    rope_local_base: the same on local layers; None where it is rope_base.
    rope_scaling: factor by which global layers' positions are divided (linear scaling, arXiv
      2306.15595).
    norm_epsilon: added to the mean square in every RMS norm.
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
  norm_epsilon: float = 1e-6

  def __post_init__(self):
    object.__setattr__(self, 'layer_pattern', tuple(self.layer_pattern))
    for name in ('vocab_size', 'embed_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim',
                 'hidden_dim', 'window'):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f'{name} = {value!r}: a decoder needs an integer of at least 1')
    for name in ('attention_softcap', 'final_softcap', 'query_scale', 'rope_base',
                 'rope_local_base', 'rope_scaling', 'norm_epsilon'):
      value = getattr(self, name)
      if value is None and name not in ('rope_base', 'rope_scaling', 'norm_epsilon'):
        continue
      if not isinstance(value, int | float) or not 0 < value < float('inf'):
        raise UserError(f'{name} = {value!r}: it must be a finite number above 0')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
          f'num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}: '
          'every kv head serves the same number of query heads')
    if self.head_dim % 2:
      raise UserError(f'head_dim = {self.head_dim} is odd: rotary embeddings turn pairs of it')
    unknown = set(self.layer_pattern) - set(LAYER_KINDS)
    if unknown or not self.layer_pattern:
      raise UserError(
          f'layer_pattern = {self.layer_pattern}: its entries must be among {LAYER_KINDS}')

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Kind of each of the L layers."""
    period = len(self.layer_pattern)
    return tuple(self.layer_pattern[i % period] for i in range(self.num_layers))

  def last(self, num_layers: int) -> 'TransformerConfig':
    """The architecture of the last layers alone. ValueError: there are not so many, or none."""
    if not 0 < num_layers <= self.num_layers:
      raise UserError(f'num_layers = {num_layers}: a decoder of {self.num_layers} layers has 1 to '
                       f'{self.num_layers} last ones')
    return dataclasses.replace(
        self, num_layers=num_layers, layer_pattern=self.layer_kinds[-num_layers:])


def _gemma1(**sizes: int) -> TransformerConfig:
  return TransformerConfig(
      vocab_size=256_000, head_dim=256, layer_pattern=('global',), attention_softcap=None,
      final_softcap=None, post_norms=False, **sizes)


def _gemma3(**sizes: float) -> TransformerConfig:
  return TransformerConfig(
      **{'head_dim': 256, **sizes}, layer_pattern=('local',) * 5 + ('global',),
      attention_softcap=None, final_softcap=None, qk_norm=True, rope_base=1e6, rope_local_base=1e4)


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
  """A published size by name. Raises: UserError with the names that there are."""
  if name not in PRESETS:
    raise UserError(f'{name!r} is neither a directory nor a preset; presets are '
                     f'{", ".join(PRESETS)}')
  return PRESETS[name]
