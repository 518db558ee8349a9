"""The shape of a decoder, and the published sizes by name."""

import dataclasses

LAYER_KINDS = ('local', 'global')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Gemma-style decoder: grouped-query attention, GeGLU, RMS norms around both halves of a block.

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
    rope_base: wavelength base of the rotary embedding.
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
  rope_base: float = 10_000.0
  norm_epsilon: float = 1e-6

  def __post_init__(self):
    object.__setattr__(self, 'layer_pattern', tuple(self.layer_pattern))
    for name in ('vocab_size', 'embed_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim',
                 'hidden_dim', 'window'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} = {getattr(self, name)}: a decoder needs at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f'num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}: '
          'every kv head serves the same number of query heads')
    if self.head_dim % 2:
      raise ValueError(f'head_dim = {self.head_dim} is odd: rotary embeddings turn pairs of it')
    unknown = set(self.layer_pattern) - set(LAYER_KINDS)
    if unknown or not self.layer_pattern:
      raise ValueError(
          f'layer_pattern = {self.layer_pattern}: its entries must be among {LAYER_KINDS}')

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Kind of each of the L layers."""
    period = len(self.layer_pattern)
    return tuple(self.layer_pattern[i % period] for i in range(self.num_layers))


PRESETS = {
    'tiny': TransformerConfig(
        vocab_size=260, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        hidden_dim=64, window=8),
    'gemma2_2b': TransformerConfig(
        vocab_size=256_000, embed_dim=2304, num_layers=26, num_heads=8, num_kv_heads=4,
        head_dim=256, hidden_dim=9216),
    'gemma2_9b': TransformerConfig(
        vocab_size=256_000, embed_dim=3584, num_layers=42, num_heads=16, num_kv_heads=8,
        head_dim=256, hidden_dim=14_336),
    'gemma2_27b': TransformerConfig(
        vocab_size=256_000, embed_dim=4608, num_layers=46, num_heads=32, num_kv_heads=16,
        head_dim=128, hidden_dim=36_864, query_scale=(4608 / 32) ** -0.5),
}
