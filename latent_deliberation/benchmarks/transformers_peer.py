"""transformers' side of the benchmark of inference, for a process of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_deliberation.benchmarks.baseline import Program

CACHES = {'dynamic': None, 'static': 'static'}  # as its `generate` calls them


def build_programs(directory: Path, prompts: Mapping[str, Sequence[Sequence[int]]],
                   num_tokens: int, threads: int) -> dict[str, Program]:
  """Prefill and greedy generation of each batch of prompts, of the model in `directory`.

  Returns: programs '<batch> prefill', '<batch> dynamic' and '<batch> static', the latter two with
    their kind of cache.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

  def prefill(ids: torch.Tensor) -> None:
    with torch.inference_mode():
      model(ids, use_cache=True, logits_to_keep=1)

  def generate(ids: torch.Tensor, cache: str | None) -> None:
    with torch.inference_mode():
      model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                     max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                     cache_implementation=cache)

  programs = {}
  for name, batch in prompts.items():
    ids = torch.tensor(batch)
    programs[f'{name} prefill'] = lambda ids=ids: prefill(ids)
    for kind, cache in CACHES.items():
      programs[f'{name} {kind}'] = lambda ids=ids, cache=cache: generate(ids, cache)
  return programs
