"""Plans as text: one in full, several as a table."""

import collections
import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from latent_deliberation.planning.plan import Plan
from latent_deliberation.tables import text_table

_ROWS = 12  # of collectives that are printed


def describe(plan: Plan) -> str:
  """Returns one plan in full."""
  memory = dataclasses.asdict(plan.memory)
  peak = memory.pop('peak')
  fits = {True: 'fits', False: 'DOES NOT FIT', None: 'unknown whether it fits'}[plan.fits]
  capacity = f' of {plan.hbm_capacity / 1e9:.1f} GB' if plan.hbm_capacity else ''
  settings = ', '.join(f'{name}={value}' for name, value in plan.settings.items() if value != '')

  # Memory.
  lines = [
      f'{plan.topology}, mesh {name_mesh(plan)}: {fits}', f'({settings})', '',
      f'Memory of a chip: {_size(peak)}{capacity}',
      # Without a loop over layers, activations are not told apart.
      *(f'  {name:<12}{_size(size) if size or name != "activations" else "in temporary":>12}'
        for name, size in memory.items()),
      *([plan.remedy] if plan.remedy else []), '',
      f'Model FLOPs a chip and step: {plan.model_flops_per_chip / 1e12:.3g} T']

  # Time, where there is an estimate.
  if plan.estimated_step_seconds is not None:
    lines += [
        f'Estimated step: {plan.estimated_step_seconds:.3g} s = {plan.compute_seconds:.3g} s '
        f'compute + {plan.exposed_seconds:.3g} s exposed collectives',
        f'Hidden collectives: {plan.overlapped_seconds:.3g} s',
        f'Model-FLOPs utilisation: {plan.mfu:.1%} ({plan.mfu_without_collectives:.1%} without '
        'collectives)']
  lines += [f'({plan.estimate})']
  if plan.unknown_loops:
    lines.append(f'Loops of unknown length count as one run: {", ".join(plan.unknown_loops)}')

  # The largest parts of that time.
  if plan.collectives:
    lines += ['', f'{"collective":<20}{"axis":<18}{"":<12}{"count":>7}{"bytes":>12}{"seconds":>10}'
              f'{"exposed":>10}', *_sum_collectives(plan)]
  if plan.operations:
    lines += ['', 'Largest operations, in seconds a step:']
    lines += [f'  {operation.seconds:8.4f}  x{operation.count:<6} {operation.what}'
              for operation in plan.operations]
  lines.append(f'\nCompiled in {plan.compile_seconds:.0f} s.')
  return '\n'.join(lines)


def _size(num_bytes: float) -> str:
  return f'{num_bytes / 1e9:.2f} GB' if num_bytes >= 1e8 else f'{num_bytes / 1e6:.2f} MB'


def _sum_collectives(plan: Plan) -> list[str]:
  """Returns a line for each kind, axis and overlap, with sums over a step."""
  groups = collections.defaultdict(list)
  for row in plan.collectives:
    groups[row.kind, row.axis, row.overlapped].append(row)
  lines = []
  for (kind, axis, overlapped), rows in groups.items():
    sums = ['', ''] if rows[0].seconds is None else [
        f'{sum(row.seconds for row in rows):.4f}',
        f'{sum(row.exposed_seconds for row in rows):.4f}']
    lines.append(f'{kind:<20}{axis:<18}{"overlapped" if overlapped else "exposed":<12}'
                 f'{sum(row.count for row in rows):>7}'
                 f'{_size(sum(row.count * row.bytes for row in rows)):>12}'
                 f'{sums[0]:>10}{sums[1]:>10}')
  return lines[:_ROWS]


def name_mesh(plan: Plan) -> str:
  """Returns a name such as 'replica=1,data=16,fsdp=16,tensor=1'."""
  return ','.join(f'{axis}={size}' for axis, size in plan.mesh.items())


def flatten(plan: Plan) -> dict[str, Any]:
  """Returns the numbers of a plan, one level deep, as a row of a table."""
  row = {'topology': plan.topology, **plan.mesh, **plan.settings,
         **{f'rule_{name}': '+'.join(axes) for name, axes in plan.rules.items()}}
  for field in dataclasses.fields(Plan):
    value = getattr(plan, field.name)
    if value is None or isinstance(value, bool | int | float):
      row[field.name] = value
  return row | {f'{name}_bytes': size for name, size in dataclasses.asdict(plan.memory).items()}


def write_csv(plans: Sequence[Plan]) -> bytes:
  """Returns a CSV with a row a plan."""
  rows = [flatten(plan) for plan in plans]
  columns = list(dict.fromkeys(column for row in rows for column in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


def compare(plans: Sequence[Plan]) -> str:
  """Returns a line a plan, numbered as in the plot, without the settings that all plans share."""
  rows = [flatten(plan) for plan in plans]
  fixed = ('topology', *plans[0].mesh)
  differing = [key for key in rows[0] if key in plans[0].settings or key.startswith('rule_')
               if len({str(row.get(key)) for row in rows}) > 1]
  heads = ['', *fixed, *differing, 'fits', 'GB', 'seconds', 'compute', 'exposed', 'MFU']
  lines = []
  for number, (row, plan) in enumerate(zip(rows, plans, strict=True), 1):
    seconds = [plan.estimated_step_seconds, plan.compute_seconds, plan.exposed_seconds]
    lines.append([
        f'{number}:', *(str(row.get(key, '')) for key in (*fixed, *differing)),
        {True: 'yes', False: 'no', None: '?'}[plan.fits], f'{plan.hbm_bytes_per_chip / 1e9:.3g}',
        *('-' if each is None else f'{each:.3g}' for each in seconds),
        '-' if plan.mfu is None else f'{plan.mfu:.1%}'])
  return text_table(heads, lines)
