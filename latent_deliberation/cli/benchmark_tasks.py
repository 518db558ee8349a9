"""The body of launch/benchmark_tasks.py: benchmarks of a decoder with its coprocessor."""

from collections.abc import Sequence
from pathlib import Path

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.answers import ARMS, check_arms
from latent_deliberation.evaluation.arm_model import check_policy
from latent_deliberation.evaluation.found_arm_model import find_arm_model
from latent_deliberation.evaluation.perplexity import CHAIN, CONSTANT, FROZEN, OWN, SHUFFLED, ZERO
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_catalog import PAPER, expand, local_names
from latent_deliberation.evaluation.task_report import format_table
from latent_deliberation.evaluation.task_run import Plan, check_output, run_tasks
from latent_deliberation.files import as_path
from latent_deliberation.inference.policy import ONCE, combine, open_gate


def benchmark(tasks: Sequence[str], output: Path, *, decoder: str, coprocessor: str, constant: str,
              arms: Sequence[str] | None, data: str, limit: int | None, num_fewshot: int | None,
              place: str, at: Sequence[int], every: int, gate: str, gate_score: str, budget: float,
              plain_if_short: bool, run_code: bool, dtype: str, max_length: int, batch_size: int,
              mesh: str, vocabulary: str, overwrite: bool) -> None:
  """Runs tasks and prints the table of accuracies; arguments are those of the flags.

  Raises:
    UserError: see `open_gate`, `Plan`, `find_arm_model`, `check_output` and `run_tasks`.
  """
  if not tasks:
    paper = ', '.join(f'{name} ({shots} shots)' if shots else name
                      for name, shots in PAPER.items())
    others = ', '.join(name for name in local_names() if name not in PAPER)
    raise UserError(f'no task is given (--tasks). Those of the paper, all of them as '
                    f'--tasks=paper: {paper}. Others: {others}')
  names = expand(tasks)
  check_integer('every', every, 0)
  # Everything that needs no weights first.
  fitted = open_gate(as_path(gate), gate_score, budget) if gate else None
  settings = Settings(place, combine(at, every, fitted), plain_if_short, batch_size)
  if not arms:
    # A policy has no arm with another example's latents.
    own = [OWN, SHUFFLED, ZERO] if settings.policy == ONCE else [OWN, ZERO]
    arms = [FROZEN, *(own if coprocessor else []), *([CONSTANT] if constant else []),
            *([CHAIN] if data else [])]  # of tasks that have one
  check_policy(arms, settings.policy)
  # The plan refuses those that are unknown.
  if known := [arm for arm in ARMS if arm in arms]:
    check_arms(known, bool(coprocessor), bool(constant))
  plan = Plan(tuple(names), tuple(arms), data, limit, num_fewshot, run_code)
  plan.check()
  found = find_arm_model(decoder, coprocessor, constant, vocabulary=vocabulary, dtype=dtype,
                         max_length=max_length, mesh=mesh)
  check_output(output)
  plan.check_documents()  # it takes the longest of what needs no weights
  model = found.load()
  if fitted:
    fitted.check_decoder(model.fingerprint)
  summary = run_tasks(model, plan, settings, output, overwrite=overwrite)
  if summary:
    print(format_table(summary))
    print(f'Results: {output / "results.md"}')
