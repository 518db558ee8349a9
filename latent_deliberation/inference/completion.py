"""What is asked for behind a prompt, and what was decoded there."""

import dataclasses
from collections.abc import Callable, Sequence

from latent_deliberation.inference.background import Arrival
from latent_deliberation.inference.policy import NEVER, Policy
from latent_deliberation.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Decoding:
  """What is to be done behind the prompts.

  Attributes:
    max_tokens: decoded for every prompt, unless its text ends before.
    sampling: how a token is chosen.
    eos: id that ends a text; None for none.
    stop: given all that was decoded for a prompt, after every token; True ends the text.
    policy: when to deliberate.
    arrival: when the latents join.
  """
  max_tokens: int
  sampling: Sampling = Sampling()
  eos: int | None = None
  stop: Callable[[Sequence[int]], bool] | None = None
  policy: Policy = NEVER
  arrival: Arrival = Arrival()

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens = {self.max_tokens}: at least 1 must be decoded')


@dataclasses.dataclass
class Completion:
  """What was decoded for a prompt.

  Attributes:
    tokens: ids, that which ended the text included.
    log_probabilities: of the tokens under the model itself, nats, before any filter.
    ended: by 'eos', 'stop' or 'length'; '' while the text goes on.
    latents_at: numbers of tokens after which latents joined.
  """
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probabilities: list[float] = dataclasses.field(default_factory=list)
  ended: str = ''
  latents_at: list[int] = dataclasses.field(default_factory=list)
