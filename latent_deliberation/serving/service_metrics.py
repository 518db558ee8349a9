"""Counts and times of a server, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServiceMetrics:
  """The metrics of one server; two servers in one process do not share them.

  No label holds a text of a request, so their number is bounded.
  """

  def __init__(self):
    self._registry = registry = CollectorRegistry()

    def named(kind: type, name: str, meaning: str, labels: tuple[str, ...] = (), **more):
      return kind(f'latent_{name}', meaning, labels, registry=registry, **more)

    self.requests = named(Counter, 'requests', 'HTTP requests by path and status.',
                          ('path', 'status'))
    self.texts = named(Counter, 'texts', 'Texts by what ended them.', ('ended_by',))
    self.prompt_tokens = named(Counter, 'prompt_tokens', 'Tokens of prompts that were read.')
    self.tokens = named(Counter, 'tokens', 'Tokens that were decoded.')
    self.latents = named(Counter, 'latents', 'Texts that asked for latents, by what came of it.',
                         ('outcome',))
    self.queued = named(Gauge, 'queued_texts', 'Texts that wait to be read.')
    self.running = named(Gauge, 'running_rows', 'Rows of the batch that have a text.')
    self.rows = named(Gauge, 'rows', 'Rows of the batch.')
    self.first_token = named(Histogram, 'first_token_seconds',
                             'Time from a request to its first token.', buckets=_SECONDS)
    self.whole_text = named(Histogram, 'text_seconds', 'Time from a request to its last token.',
                            buckets=_SECONDS)
    self.token_seconds = named(Histogram, 'decode_step_seconds',
                               'Time of a decode step, which gives every row a token.',
                               buckets=_SECONDS)

  def render(self) -> bytes:
    """Returns all metrics as Prometheus reads them."""
    return generate_latest(self._registry)
