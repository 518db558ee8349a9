"""Writes tiny checkpoints of every family and the results of transformers with them.

    python -m tests.parity.make_goldens [--target=DIR]

Needs torch and transformers (the extra `parity`). The same versions on the same machine write the
same bytes. On another machine, the last bits of the logits may differ.

Each folder is a Hugging Face directory from save_pretrained, and two more files:
  config_legacy.json: the config in the form of transformers 4, if it could express it;
  golden.npz: tokens [B, T]; logits [B, T, V] and logits_bfloat16, computed in float32 and in
    bfloat16 from the stored weights; continuation [B, C], the greedy text after
    tokens[:, :PROMPT].
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from transformers.utils import logging as transformers_logging

from tests.parity.golden import CONTINUATION, DIRECTORY, LENGTH, PROMPT
from tests.parity.legacy_configs import legacy_config
from tests.parity.tiny_models import (
  CONFIGS,
  build,
  continue_greedily,
  draw_tokens,
  load,
  logits_of,
)

MARGIN = 1e-3  # smallest lead of a greedy choice: about fifty times the error of float32
# With these seeds, no greedy choice is close, and no continuation soon repeats one token.
SEEDS = {'gemma1': 7, 'gemma1_multihead': 4, 'gemma2': 3, 'gemma2_bfloat16': 5, 'gemma3': 1,
         'gemma3_multimodal': 1, 'llama3': 3, 'mistral': 1, 'qwen2': 1, 'qwen3': 2}
SHARDED = 'gemma2_bfloat16'  # stored in bfloat16 and in several files

_TARGET = flags.DEFINE_string('target', str(DIRECTORY), 'Directory to write the goldens to.')


def write(name: str, directory: Path) -> None:
  """Writes one golden, and replaces the directory.

  Raises:
    ValueError: a greedy choice is too close for a fair test; take another seed.
  """
  stored = torch.bfloat16 if name == SHARDED else torch.float32
  model, tokens = build(name, SEEDS[name]).to(stored), draw_tokens(SEEDS[name], LENGTH)
  partial = directory.with_name(directory.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  model.save_pretrained(partial, max_shard_size='30KB' if name == SHARDED else '1MB')
  config = json.loads((partial / 'config.json').read_text())
  if name != SHARDED:
    (partial / 'config_legacy.json').write_text(json.dumps(legacy_config(config), indent=2) + '\n')

  reference = load(partial, torch.float32)
  continuation, lead = continue_greedily(reference, tokens[:, :PROMPT], CONTINUATION)
  if lead < MARGIN:
    raise ValueError(f'{name}: a greedy choice leads by {lead:.1e}, less than {MARGIN:.0e}; take '
                     f'another seed than {SEEDS[name]}')
  logits = logits_of(reference, tokens)
  np.savez(partial / 'golden.npz', tokens=tokens, logits=logits, continuation=continuation,
           logits_bfloat16=logits_of(load(partial, torch.bfloat16), tokens))
  shutil.rmtree(directory, ignore_errors=True)
  os.replace(partial, directory)
  size = sum(file.stat().st_size for file in directory.iterdir())
  kinds = [len(set(text)) for text in continuation.tolist()]
  print(f'{name}: {size / 1e3:.0f} kB, logits up to {np.abs(logits).max():.1f}, greedy lead '
        f'{lead:.4f}, different tokens {kinds}')


def main(_: list[str]) -> None:
  transformers_logging.disable_progress_bar()
  for name in CONFIGS:
    write(name, Path(_TARGET.value) / name)


if __name__ == '__main__':
  app.run(main)
