"""The other side of the benchmarks of experts: PEFT's LoRA, in an interpreter of its own.

  PYTHON peft_side.py JOB DIRECTORY

PYTHON has torch, transformers and peft, and needs nothing of this project. DIRECTORY has
request.json, arrays.npz and the decoder; the result is written there as result.json, and arrays as
result.npz. JOB is 'train' or 'speed'.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

MODULES = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


def load(directory: Path, dtype: str, threads: int):
  """Returns torch and the decoder, frozen."""
  import torch
  import transformers
  if threads:
    torch.set_num_threads(threads)
  config = transformers.AutoConfig.from_pretrained(directory / 'decoder')
  # Only eager attention has Gemma 2's soft-cap. The others take the library's own choice.
  options = {'attn_implementation': 'eager'} if getattr(
      config, 'attn_logit_softcapping', None) else {}
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory / 'decoder', dtype=getattr(torch, dtype), **options)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  return torch, model.to(device).eval(), device


def with_adapter(model, rank: int, name: str = 'default', seed: int = 0, spread: float = 0.0):
  """Adds a LoRA on every projection; with a spread, none of its weights is zero."""
  import peft
  import torch
  config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=MODULES, lora_dropout=0.0)
  torch.manual_seed(seed)
  if isinstance(model, peft.PeftModel):
    model.add_adapter(name, config)
  else:
    model = peft.get_peft_model(model, config, adapter_name=name)
  if spread:
    for key, weight in model.named_parameters():
      if f'lora_B.{name}' in key:
        weight.data.normal_(0, spread)
  return model


def masks_of(torch, model, segments, device: str):
  """Returns additive masks [B, 1, T, T], causal and within one document.

  A model with a sliding window gets one for each kind of its layers, since it takes a mask that is
  given as it is.
  """
  segments = torch.tensor(segments, device=device)
  same = (segments[:, None, :] == segments[:, :, None]) & (segments[:, None, :] > 0)
  index = torch.arange(segments.shape[1], device=device)
  distance = index[:, None] - index
  dtype = next(model.parameters()).dtype

  def mask(window: float):
    # A row of padding sees itself, since a softmax over nothing is not a number.
    seen = (same & (distance >= 0) & (distance < window)) | (distance == 0)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]

  kinds = set(getattr(model.config, 'layer_types', None) or ())
  if 'sliding_attention' not in kinds:
    return mask(float('inf'))
  return {'full_attention': mask(float('inf')),
          'sliding_attention': mask(model.config.sliding_window)}


def logprobs(torch, model, batch, device: str):
  """Returns the log-probabilities [B, T - 1] of each next token."""
  tokens, segments, positions = batch
  ids = torch.tensor(tokens.astype(np.int64), device=device)
  logits = model(input_ids=ids, attention_mask=masks_of(torch, model, segments, device),
                 position_ids=torch.tensor(positions.astype(np.int64), device=device),
                 use_cache=False).logits[:, :-1].float()
  return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def score(torch, model, arrays, text: str, size: int, device: str):
  """Returns nats [R, A] at each ahead position, summed over the places of a row."""
  tokens, segments, positions = (arrays[f'{text}/{part}'] for part in (
      'tokens', 'segments', 'positions'))
  anchors, valid = arrays[f'{text}/anchors'], arrays[f'{text}/valid']
  totals = []
  for first in range(0, len(tokens), size):
    rows = slice(first, first + size)
    with torch.inference_mode():
      nats = -logprobs(torch, model, (tokens[rows], segments[rows], positions[rows]), device)
    nats = nats.cpu().numpy()
    index = anchors[rows][..., None] + np.arange(valid.shape[-1])
    found = np.take_along_axis(nats[:, None], np.minimum(index, nats.shape[1] - 1), axis=-1)
    totals.append((found * valid[rows]).sum(axis=1, dtype=np.float64))
  return np.concatenate(totals)


def train(directory: Path, request: dict, arrays) -> tuple[dict, dict]:
  """Trains a LoRA on next tokens, and scores texts without it and with it."""
  torch, model, device = load(directory, request['dtype'], request['threads'])
  scores = {f'{text}/base': score(torch, model, arrays, text, request['score_size'], device)
            for text in request['texts']}
  model = with_adapter(model, request['rank'])
  trained = [weight for weight in model.parameters() if weight.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=request['learning_rate'], weight_decay=0.0)
  steps, warmup = len(arrays['train/tokens']), max(1, request['warmup'])
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
      (step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / steps))))
  model.train()
  taken, losses = [], []
  for step in range(steps):
    begun = time.perf_counter()
    batch = tuple(arrays[f'train/{part}'][step] for part in ('tokens', 'segments', 'positions'))
    # Only tokens of a document that goes on have a next one.
    counted = torch.tensor((batch[1][:, 1:] == batch[1][:, :-1]) & (batch[1][:, 1:] > 0),
                           device=device)
    loss = -(logprobs(torch, model, batch, device) * counted).sum() / counted.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(float(loss))
    taken.append(time.perf_counter() - begun)
    if step % 10 == 0:
      print(f'step {step}/{steps} loss {losses[-1]:.4f}', file=sys.stderr, flush=True)
  memory = peak_memory(torch, device)
  model.eval()
  for text in request['texts']:
    scores[f'{text}/lora'] = score(torch, model, arrays, text, request['score_size'], device)
  return {'parameters': sum(weight.numel() for weight in trained), 'losses': losses,
          'seconds': sum(taken), 'seconds_a_step': statistics.median(taken),
          'peak_memory_bytes': memory}, scores


def peak_memory(torch, device: str) -> int:
  """Returns the peak of the device's memory, or of this process's on a CPU."""
  if device == 'cuda':
    return torch.cuda.max_memory_allocated()
  # As `host_memory.peak_memory_bytes`: on Linux, getrusage begins with the peak of our side.
  status = Path('/proc/self/status')
  lines = status.read_text().splitlines() if status.is_file() else []
  found = [int(line.split()[1]) for line in lines if line.startswith('VmHWM')]
  unit = 1 if sys.platform == 'darwin' else 1024
  return found[0] << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed(directory: Path, request: dict, arrays) -> tuple[dict, dict]:
  """Times greedy generation with adapters loaded: one for all rows, and one for each."""
  torch, model, device = load(directory, request['dtype'], request['threads'])
  ids = torch.tensor(arrays['prompts'].astype(np.int64), device=device)
  tokens, rows = request['decoded'], len(ids)

  def seconds(**options) -> float:
    taken = []
    for _ in range(1 + request['repeats']):
      begun = time.perf_counter()
      with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       max_new_tokens=tokens, min_new_tokens=tokens, **options)
      taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])

  result = {'0 loaded': {'plain': rows * tokens / seconds()}}
  loaded = 0
  for count in sorted(request['experts']):
    while loaded < count:
      model = with_adapter(model, request['rank'], f'a{loaded}', seed=loaded, spread=0.01)
      loaded += 1
    model.eval()  # an adapter that is added is in training
    same = [f'a{count - 1}'] * rows
    mixed = [f'a{row % count}' for row in range(rows)]
    result[f'{count} loaded'] = {
        'one for all': rows * tokens / seconds(adapter_names=same),
        'mixed': rows * tokens / seconds(adapter_names=mixed),
        'peak_memory_bytes': peak_memory(torch, device)}
    print(f'{count} adapters', file=sys.stderr, flush=True)
  return {'tokens_per_second': result}, {}


def main() -> None:
  job, directory = sys.argv[1], Path(sys.argv[2])
  request = json.loads((directory / 'request.json').read_text())
  with np.load(directory / 'arrays.npz') as arrays:
    result, found = {'train': train, 'speed': speed}[job](directory, request, dict(arrays))
  import peft
  import torch
  import transformers
  result['versions'] = {module.__name__: module.__version__
                        for module in (torch, transformers, peft)}
  np.savez(directory / 'result.npz', **found)
  (directory / 'result.json').write_text(json.dumps(result))


if __name__ == '__main__':
  main()
