"""Tables for terminals and for pages of GitHub Markdown, and the estimates in their cells."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = '--:') -> str:
  """Returns a table of GitHub Markdown. `align` is '--:' for right, '---' for left."""
  lines = [header, [align] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = '>') -> str:
  """Returns a table for a terminal, in columns. `align` is '>' for right, '<' for left."""
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(f'{cell:{align}{width}}' for cell, width in zip(
      line, widths, strict=True)).rstrip() for line in lines)


def format_estimate(value: float, ends: Sequence[float] | None = None) -> str:
  """Returns a number, and its interval if it has one, as a cell of a table."""
  return f'{value:+.3f}' + (f' [{ends[0]:+.3f}, {ends[1]:+.3f}]' if ends else '')
