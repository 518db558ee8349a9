"""transformers' side of the benchmark of a step, for a process of its own."""

from collections.abc import Sequence
from pathlib import Path

from latent_deliberation.benchmarks.baseline import Program


def build_steps(directory: Path, tokens: Sequence[Sequence[int]],
                threads: int) -> dict[str, Program]:
  """Eager programs 'forward' and 'forward_backward' (of all weights) of the model in `directory`.

  Args:
    tokens: B texts of T ids.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  # Eager attention is the one that has Gemma 2's soft-cap.
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, attn_implementation='eager')
  ids = torch.tensor(tokens)

  def forward() -> None:
    with torch.inference_mode():
      model(ids, use_cache=False)

  def forward_backward() -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()

  return {'forward': forward, 'forward_backward': forward_backward}
