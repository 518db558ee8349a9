"""Configuration of latents. A choice that the paper leaves open says so."""

import dataclasses
import math
from collections.abc import Iterator

from latent_deliberation.errors import (
  UserError,
  check_integer,
  check_types,
  problems_of,
  raise_problems,
)

LATENTS = ('paper', 'anchored', 'refining')
POSITIONS = ('shift', 'share')
INITIALISATIONS = ('decoder', 'scratch')
TRAINABLES = ('full', 'lora', 'constant')
READS = ('cache', 'states')
GATES = ('channel', 'matrix')
SOFT_TOKENS = ('free', 'additive')


@dataclasses.dataclass(frozen=True)
class DeliberationConfig:
  """How latents are made, where they enter the decoder, and how many there are.

  Attributes:
    num_latents: Z, number of latents of a trace (N_L in the paper).
    num_ahead: A, number of true tokens after the anchor that the loss covers (N_A in the paper).
    num_traces: M, number of traces drawn from each text.
    latents: form of a latent: 'refining', 'anchored' or 'paper'.
      With o_i as the coprocessor's output at soft token i, the decoder reads as latent z_i:
      'paper': z_i = o_i, placed after the anchor.
      'anchored': z_i = embedding of the anchor token + gate * o_i, placed after the anchor.
      'refining': z_i = embedding of trunk token (anchor - Z + i) + gate * o_i, placed where that
      token is. With the gate at zero this is the frozen decoder.
      The ablations in docs/log.md say why 'refining' is the default.
    positions: position ids of latents that are placed after the anchor: 'share' or 'shift'.
      'share' gives every latent the anchor's own position and does not move the ahead tokens.
      'shift' counts on from the anchor and moves the ahead tokens by Z. The paper does not say
      which. Refining latents always have the positions of the tokens that they replace.
    initialisation: start of the coprocessor's transformer: 'decoder' weights or 'scratch'.
    trainable: trained part of the coprocessor: 'full', 'lora' or 'constant'.
      'full' trains a whole transformer. 'lora' trains adapters on the decoder's frozen weights.
      'constant' trains soft tokens alone, which then are the outputs (pause tokens, with 'paper'
      latents).
    num_layers: number of layers of the coprocessor; 0 for all of the decoder's, as in the paper.
      A smaller one has the shapes, the cache and the first weights of the decoder's last layers.
    reads: input of the coprocessor's attention: 'cache' or 'states'.
      'cache' is the decoder's kv-cache, as in the paper. 'states' is a control: each layer makes
      its own keys and values from the decoder's final hidden states. Inference does not support it.
    gate: factor on the outputs, zero at the start: 'matrix' or 'channel'.
      'matrix' is [D, D], 'channel' has one factor for each channel. The measured change of
      perplexity at position 1 was -0.63% for 'matrix' and -0.49% for 'channel'.
    soft_tokens: input of the coprocessor: 'additive' or 'free'.
      'free' are learned embeddings, as in the paper. 'additive' are added to the embedding of each
      latent's base token. A coprocessor that starts from the decoder's weights then begins with the
      decoder's own reading of that token. Constant soft tokens are always free.
    lora_rank: rank of the adapters; unused unless trainable is 'lora'.
      The default is large: 128 trains 30.8 M parameters of Gemma 3 270M (123 MB in float32), and
      16 about an eighth of that.
    lora_alpha: scale of the adapters: their product is multiplied by lora_alpha / lora_rank.
      None multiplies by 1. Unused unless trainable is 'lora'. With a factor of 16 the adapters
      learned almost nothing in our studies (docs/log.md, ranks of adapters).
    max_delay: largest number of ahead tokens that the decoder reads before latents join its cache.
      Training draws a delay for each trace, uniformly from 0 to this. The loss then covers the
      tokens that are predicted with latents in the cache. 0 is no delay, as in the paper.
    anchor_tokens: token ids that an anchor may have, in training, evaluation and gates.
      Empty for any token.
      The sign that ends a question is an example. The paper's training uses any token.
  """
  num_latents: int
  num_ahead: int
  num_traces: int
  latents: str = 'refining'
  positions: str = 'share'
  initialisation: str = 'decoder'
  trainable: str = 'full'
  num_layers: int = 0
  reads: str = 'cache'
  gate: str = 'matrix'
  soft_tokens: str = 'additive'
  lora_rank: int = 128
  lora_alpha: float | None = None
  max_delay: int = 0
  anchor_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'anchor_tokens', tuple(self.anchor_tokens))
    raise_problems(self._problems())

  def _problems(self) -> Iterator[str]:
    # Choices, then sizes, then numbers that depend on each other.
    for name, allowed in (('latents', LATENTS), ('positions', POSITIONS),
                          ('initialisation', INITIALISATIONS), ('trainable', TRAINABLES),
                          ('reads', READS), ('gate', GATES), ('soft_tokens', SOFT_TOKENS)):
      if getattr(self, name) not in allowed:
        yield f'{name} = {getattr(self, name)!r}: it must be one of {allowed}'
    for name in ('num_latents', 'num_ahead', 'num_traces'):
      yield from problems_of(check_integer, name, getattr(self, name), 1)
    # No decoder is wider than the largest rank.
    yield from problems_of(check_integer, 'lora_rank', self.lora_rank, 1, 2**16)
    for token in self.anchor_tokens:
      yield from problems_of(check_integer, 'anchor_tokens', token, 0)
    if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
      yield f'lora_alpha = {self.lora_alpha}: it must be above 0, or None'
    if self.num_layers < 0:
      yield (f'num_layers = {self.num_layers}: it must be 1 or more, or 0 for as many as the '
             'decoder has')
    if not 0 <= self.max_delay <= max(self.num_ahead - 2, 0):
      yield (f'max_delay = {self.max_delay}, num_ahead = {self.num_ahead}: max_delay must be '
             'between 0 and num_ahead - 2, so that an ahead token is left to predict')

  def check_trunk(self, length: int) -> None:
    """Raises UserError where a trunk of `length` tokens cannot hold the configured traces."""
    # An anchor needs a token after it, and room for the tokens that latents replace.
    anchors = length - self.first_anchor - 1
    if self.num_ahead >= length:
      raise UserError(
          f'num_ahead = {self.num_ahead} does not fit after an anchor in a trunk of {length} '
          'tokens: lower num_ahead or raise data.length')
    if self.num_traces > anchors:
      raise UserError(
          f'num_traces = {self.num_traces}, but a trunk of {length} tokens has {anchors} places '
          f'for an anchor of {self.num_latents} {self.latents} latents: lower num_traces or '
          'num_latents, or raise data.length')

  def with_traces(self, num_traces: int, num_ahead: int) -> 'DeliberationConfig':
    """Returns the config for scoring, where traces bring their own delay."""
    return dataclasses.replace(self, num_traces=num_traces, num_ahead=num_ahead, max_delay=0)

  @property
  def without_effect(self) -> tuple[str, ...]:
    """Keys that these choices do not use. A resumed run may change them."""
    return () if self.trainable == 'lora' else ('lora_rank', 'lora_alpha')

  @property
  def is_additive(self) -> bool:
    """Whether the coprocessor reads soft tokens plus the embeddings of base tokens."""
    return self.soft_tokens == 'additive' and self.trainable != 'constant'

  @property
  def first_anchor(self) -> int:
    """Least index in its document that an anchor may have."""
    return self.num_latents - 1 if self.latents == 'refining' else 0
