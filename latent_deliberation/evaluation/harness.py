"""The decoder and its coprocessor as a model of lm-evaluation-harness (pip extra `eval`).

Importing this module registers the model 'latent_deliberation'. lm-evaluation-harness 0.4.13 looks
for no plugins, so there are two commands that import it:

  python -m latent_deliberation.evaluation --model latent_deliberation --tasks piqa \\
      --model_args decoder=gemma3-270m,coprocessor=runs/gemma/coprocessor,arm=own
  lm_eval --model latent_deliberation --tasks latent_deliberation/evaluation/tasks/piqa.yaml \\
      --metadata data=DIRECTORY --model_args decoder=gemma3-270m

The first is lm_eval's own command, and takes any of its tasks. In the second, our task file, given
by its path, imports this module before lm_eval looks for the model.
"""

import collections
import json
from collections.abc import Callable, Sequence
from typing import Any

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.answer_texts import END, rolling_windows
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.perplexity import FROZEN, OWN
from latent_deliberation.evaluation.task_answers import Settings, TaskAnswers
from latent_deliberation.files import as_path
from latent_deliberation.inference.policy import combine, open_gate

try:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager
except ImportError as error:
  raise UserError(f'lm-evaluation-harness cannot be imported ({error}): pip install -e '
                  "'.[eval]'") from error

NAME = 'latent_deliberation'
__all__ = ['DeliberationLM', 'TaskManager', 'run_command', 'simple_evaluate']


@register_model(NAME)
class DeliberationLM(LM):
  """One arm of a decoder and its coprocessor.

  Every text begins with the token that begins a text. lm_eval's Hugging Face model leaves it out
  unless `add_bos_token` is set.
  """

  def __init__(self, decoder: str, coprocessor: str = '', arm: str = '', constant: str = '',
               vocabulary: str = '', dtype: str = 'float32', max_length: int = 2048,
               mesh: str = '', place: str = END, every: int = 0, at: int | str = '',
               gate: str = '', gate_score: str = 'learned', budget: float = 0.0,
               plain_if_short: bool = False, batch_size: int | str | None = None,
               max_batch_size: int | None = None, device: str | None = None):
    """Loads the model. These are the `--model_args` of lm_eval.

    Args:
      decoder, coprocessor, constant, vocabulary, dtype, max_length, mesh: see `open_arm_model`.
      arm: 'frozen', 'own', 'shuffled', 'zero', 'mean' or 'constant'; default is 'own' with a
        coprocessor, and 'frozen' without one.
      place, plain_if_short: see `task_answers.Settings`.
      every, at, gate, gate_score, budget: policy of latents in place of the end of the context, as
        in launch/generate.py; `at` may be several numbers, as 0+20.
      batch_size: largest number of texts that are decoded together. lm_eval's default of 1, and
        'auto' or 'auto:4', mean as many as fit 2 GiB of cache. It changes scores by rounding alone.
      max_batch_size, device: taken for lm_eval's sake, and not used.

    Raises:
      UserError: see `open_arm_model`, `Settings` and `AnswerScorer`.
    """
    del max_batch_size, device
    super().__init__()
    places = [_integer('at', each) for each in str(at).split('+') if each]
    fitted = open_gate(as_path(gate), gate_score, budget) if gate else None
    is_free = str(batch_size) in ('None', '1') or str(batch_size).startswith('auto')
    size = 0 if is_free else _integer('batch_size', batch_size)
    settings = Settings(place, combine(places, every, fitted), plain_if_short, size)
    model = open_arm_model(decoder, coprocessor, constant, vocabulary=vocabulary, dtype=dtype,
                           max_length=max_length, mesh=mesh)
    if fitted:
      fitted.check_decoder(model.fingerprint)
    self.arm = arm or (OWN if coprocessor else FROZEN)
    self.answers = TaskAnswers(model, (self.arm,), settings)

  @classmethod
  def of(cls, answers: TaskAnswers, arm: str) -> 'DeliberationLM':
    """Returns the model of one arm of several, whose answers are computed together."""
    model = cls.__new__(cls)
    LM.__init__(model)
    model.arm, model.answers = arm, answers
    return model

  def loglikelihood(self, requests: list[Instance],
                    disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """See LM."""

    def score(task: str, chosen: Sequence[Instance]) -> list[tuple[float, bool]]:
      scores = self.answers.score(task, [request.args for request in chosen],
                                  [f'{request.task_name} {request.doc_id}' for request in chosen])
      return [(-nats, greedy) for nats, greedy in scores[self.arm]]

    return self._by(requests, lambda request: request.task_name, score, 'loglikelihood')

  def loglikelihood_rolling(self, requests: list[Instance],
                            disable_tqdm: bool = False) -> list[float]:
    """See LM. Each window begins with the token that begins a text; see `rolling_windows`."""
    tokenizer, length = self.answers.model.tokenizer, self.answers.model.max_length

    def score(task: str, chosen: Sequence[Instance]) -> list[float]:
      windows, owners = [], []
      for number, request in enumerate(chosen):
        found = rolling_windows(tokenizer.encode(request.args[0]), length)
        windows += found
        owners += [number] * len(found)
      totals = [0.0] * len(chosen)
      scores = self.answers.score_windows(f'{task}/rolling', windows)[self.arm] if windows else []
      for owner, (nats, _) in zip(owners, scores, strict=True):
        totals[owner] -= nats
      return totals

    return self._by(requests, lambda request: request.task_name, score, 'loglikelihood_rolling')

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """See LM."""

    def write(key: tuple[str, str], chosen: Sequence[Instance]) -> list[str]:
      task, generation = key[0], json.loads(key[1])
      return self.answers.write(task, [request.args[0] for request in chosen], generation, self.arm)

    return self._by(requests, lambda request: (request.task_name, json.dumps(request.args[1])),
                    write, 'generate_until')

  def get_model_info(self) -> dict[str, Any]:
    """Returns what lm_eval writes to its results about the model."""
    model = self.answers.model
    checkpoint = model.own
    return {'arm': self.arm, 'decoder_fingerprint': model.fingerprint,
            'max_length': model.max_length,
            'num_latents': checkpoint.config.num_latents if checkpoint else 0}

  def _by(self, requests: Sequence[Instance], key: Callable[[Instance], Any],
          answer: Callable[[Any, Sequence[Instance]], list[Any]], method: str) -> list[Any]:
    """Answers the requests of each key together; returns the answers in the order of requests."""
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
      groups[key(request)].append(number)
    answers: list[Any] = [None] * len(requests)
    for each, numbers in groups.items():
      found = answer(each, [requests[number] for number in numbers])
      for number, value in zip(numbers, found, strict=True):
        answers[number] = value
        self.cache_hook.add_partial(method, requests[number].args, value)
    return answers


def _integer(name: str, value: int | str) -> int:
  try:
    return int(value)
  except ValueError as error:
    raise UserError(f'{name} = {value!r}: give an integer') from error


def run_command() -> None:
  """Runs lm_eval's command on the arguments of this process."""
  from lm_eval.__main__ import cli_evaluate
  cli_evaluate()
