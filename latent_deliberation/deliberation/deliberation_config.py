"""The choices of an experiment on latents. Those the paper leaves open say so."""

import dataclasses
import math

from latent_deliberation.errors import UserError

LATENTS = ('paper', 'anchored', 'refining')
POSITIONS = ('shift', 'share')
INITIALISATIONS = ('decoder', 'scratch')
TRAINABLES = ('full', 'lora', 'constant')
READS = ('cache', 'states')
GATES = ('channel', 'matrix')
SOFT_TOKENS = ('free', 'additive')


@dataclasses.dataclass(frozen=True)
class DeliberationConfig:
  """How latents are made, where they enter the decoder, and how many of what there are.

  Attributes:
    num_latents: Z, latents of a trace (N_L in the paper).
    num_ahead: A, true tokens after the anchor that the loss is on (N_A).
    num_traces: M, traces drawn from each text.
    latents: what the decoder is fed; the ablations in docs/results.md say why 'refining' is the
      default. With o_i the coprocessor's output at soft token i:
      'paper':    z_i = o_i, behind the anchor.
      'anchored': z_i = embedding of the anchor token + gate * o_i, behind the anchor.
      'refining': z_i = embedding of trunk token (anchor - Z + i) + gate * o_i, in that token's
                  place: with the gate at zero this is the frozen decoder.
    positions: position ids of latents that stand behind the anchor (not stated in the paper):
      'shift' counts on from the anchor and moves the ahead tokens by Z; 'share' puts all of them
      at the anchor's own position and leaves the ahead tokens where they are. Refining latents
      always have the positions of the tokens that they replace.
    initialisation: of the coprocessor's transformer, the 'decoder's weights or 'scratch'.
    trainable: 'full' transformer; 'lora' adapters on the decoder's frozen weights; or 'constant',
      soft tokens alone in the place of o (with 'paper' latents: pause tokens).
    num_layers: of the coprocessor, which has the shapes, the cache and, at the start, the weights
      of the decoder's last so many layers; 0 for all of them, as in the paper.
    reads: the decoder's kv-'cache', as in the paper, or its final hidden 'states' alone, of which
      every layer of the coprocessor makes keys and values of its own: a control, which inference
      has no use for.
    gate: what multiplies o, zero at the start: one factor a 'channel', or a [D, D] 'matrix'
      (measured: -0.63% against -0.49% at position 1).
    soft_tokens: what the coprocessor is fed (the paper: learned embeddings, 'free' of the text);
      'additive' ones are added to the embedding of the token that the latent rests on, so that a
      coprocessor initialised from the decoder begins with the decoder's own reading of it.
      'constant' ones have no coprocessor to read them, and are free whatever this says.
    lora_rank, lora_alpha: of the adapters, whose product is multiplied by lora_alpha / lora_rank,
      or by 1 where lora_alpha is None; unused otherwise. With a factor of 16 a coprocessor's
      adapters learnt next to nothing in our studies (docs/results.md, ranks of adapters).
    max_delay: ahead tokens that the decoder may have read before latents join its cache; training
      draws a delay for every trace, uniformly from 0 to this, and has its loss on tokens that are
      predicted once latents are there. The paper trains without delay (0).
    anchor_tokens: ids behind which latents may come in training, such as the sign that ends a
      question; empty for anywhere, as in the paper's training.
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
    object.__setattr__(self, 'anchor_tokens', tuple(self.anchor_tokens))
    for name, allowed in (('latents', LATENTS), ('positions', POSITIONS),
                          ('initialisation', INITIALISATIONS), ('trainable', TRAINABLES),
                          ('reads', READS), ('gate', GATES), ('soft_tokens', SOFT_TOKENS)):
      if getattr(self, name) not in allowed:
        raise UserError(f'{name} = {getattr(self, name)!r}: must be one of {allowed}')
    for name in ('num_latents', 'num_ahead', 'num_traces', 'lora_rank'):
      if getattr(self, name) < 1:
        raise UserError(f'{name} = {getattr(self, name)}: at least 1 is needed')
    if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
      raise UserError(f'lora_alpha = {self.lora_alpha}: it must be above 0, or None')
    if self.num_layers < 0:
      raise UserError(f'num_layers = {self.num_layers}: at least 1 is needed, or 0 for as many as '
                       'the decoder has')
    if not 0 <= self.max_delay <= max(self.num_ahead - 2, 0):
      raise UserError(
          f'max_delay = {self.max_delay}, num_ahead = {self.num_ahead}: a delay is at least 0, and '
          'leaves an ahead token to be predicted after it: lower max_delay to num_ahead - 2')

  def check_trunk(self, length: int) -> None:
    """Raises UserError where a trunk of `length` tokens cannot hold the traces asked for."""
    anchors = length - self.first_anchor - 1
    if self.num_ahead >= length:
      raise UserError(
          f'num_ahead = {self.num_ahead} tokens do not fit behind an anchor in a trunk of '
          f'{length} tokens: lower num_ahead or raise data.length')
    if self.num_traces > anchors:
      raise UserError(
          f'num_traces = {self.num_traces}, but a trunk of {length} tokens has {anchors} places '
          f'for an anchor of {self.num_latents} {self.latents} latents: lower num_traces or '
          'num_latents, or raise data.length')

  def with_traces(self, num_traces: int, num_ahead: int) -> 'DeliberationConfig':
    """To be scored with, for which the delay of training has no meaning."""
    return dataclasses.replace(self, num_traces=num_traces, num_ahead=num_ahead, max_delay=0)

  @property
  def without_effect(self) -> tuple[str, ...]:
    """Keys that mean nothing with these choices, in which a run and its resumption may differ."""
    return () if self.trainable == 'lora' else ('lora_rank', 'lora_alpha')

  @property
  def rests(self) -> bool:
    """Whether a coprocessor is fed soft tokens on top of the embeddings that latents rest on."""
    return self.soft_tokens == 'additive' and self.trainable != 'constant'

  @property
  def first_anchor(self) -> int:
    """Least index in its document that an anchor may have."""
    return self.num_latents - 1 if self.latents == 'refining' else 0
