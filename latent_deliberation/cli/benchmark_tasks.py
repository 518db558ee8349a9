"""The body of launch/benchmark_tasks.py: benchmarks of a decoder with its coprocessor."""

from collections.abc import Sequence
from pathlib import Path

from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.evaluation.answers import CONSTANT
from latent_deliberation.evaluation.arm_model import open_arm_model
from latent_deliberation.evaluation.perplexity import FROZEN, OWN
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_catalog import CHAIN_OF, PAPER, expand, local_names
from latent_deliberation.evaluation.task_report import format_table
from latent_deliberation.evaluation.task_run import CHAIN, Plan, run_tasks
from latent_deliberation.inference.policy import ONCE, combine


def benchmark(tasks: Sequence[str], output: Path, *, decoder: str, coprocessor: str, constant: str,
              arms: Sequence[str] | None, data: str, limit: int | None, num_fewshot: int | None,
              place: str, at: Sequence[int], every: int, plain_if_short: bool, run_code: bool,
              dtype: str, max_length: int, batch_size: int, mesh: str, vocabulary: str,
              overwrite: bool) -> None:
  """Runs tasks and prints the table of accuracies; arguments are those of the flags.

  Raises:
    UserError: see `Plan.check`, `open_arm_model` and `run_tasks`.
  """
  if not tasks:
    paper = ', '.join(f'{name} ({shots} shots)' if shots else name
                      for name, shots in PAPER.items())
    others = ', '.join(name for name in local_names() if name not in PAPER)
    raise UserError(f'no task is given (--tasks). Those of the paper, all of them as '
                    f'--tasks=paper: {paper}. Others: {others}')
  names = expand(tasks)
  check_integer('every', every, 0)
  if not arms:
    arms = [FROZEN, *([OWN, 'shuffled', 'zero'] if coprocessor else []),
            *([CONSTANT] if constant else []), *([CHAIN] if set(names) & set(CHAIN_OF) else [])]
  # Everything that needs no weights first.
  plan = Plan(tuple(names), tuple(arms), data, limit, num_fewshot, run_code)
  plan.check()
  settings = Settings(place, combine(at, every, None) if at or every else ONCE, plain_if_short,
                      batch_size)
  model = open_arm_model(decoder, coprocessor, constant, vocabulary=vocabulary, dtype=dtype,
                         max_length=max_length, mesh=mesh)
  summary = run_tasks(model, plan, settings, output, overwrite=overwrite)
  if summary:
    print(format_table(summary))
    print(f'Results: {output / "results.md"}')
