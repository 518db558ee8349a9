"""Tiny models of transformers, of every family, in which every feature of the architecture shows.

Head counts are odd and caps small. Windows are shorter than the texts. Bases and query scales are
unusual. goldens_test.py checks that each feature, switched off, moves the logits by more than 0.05.
Needs torch and transformers.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import (
  AutoModelForCausalLM,
  Gemma2Config,
  Gemma3Config,
  Gemma3TextConfig,
  GemmaConfig,
  LlamaConfig,
  MistralConfig,
  PreTrainedConfig,
  PreTrainedModel,
  Qwen2Config,
  Qwen3Config,
  SiglipVisionConfig,
)

# For matrices of this size, threads are slower, and their order of sums depends on the machine.
torch.set_num_threads(1)

VOCAB_SIZE = 64
_COMMON = dict(vocab_size=VOCAB_SIZE, max_position_embeddings=128)
_WIDTH = dict(hidden_size=36, intermediate_size=44)


def _rope(base: float, **scaling: float | str) -> dict[str, float | str]:
  return {'rope_type': 'default', 'rope_theta': base, **scaling}


def _gemma3(local_base: float, global_base: float, **sizes: int) -> Gemma3TextConfig:
  """A text model of 5 local layers to each global one, whose positions are divided by 8."""
  return Gemma3TextConfig(
      **_COMMON, **_WIDTH | sizes, sliding_window=4, rope_parameters={
          'sliding_attention': _rope(local_base),
          'full_attention': _rope(global_base, rope_type='linear', factor=8.0)})


# 'gemma3_multimodal' has the defaults of transformers 4 (8 heads, 4 kv heads, both bases). Its
# legacy config.json can leave them out, like those of the published sizes.
CONFIGS: Mapping[str, PreTrainedConfig] = {
    'gemma1': GemmaConfig(
        **_COMMON, hidden_size=40, intermediate_size=44, num_hidden_layers=3,
        num_attention_heads=5, num_key_value_heads=1, head_dim=12,
        rope_parameters=_rope(300.0)),
    'gemma1_multihead': GemmaConfig(
        **_COMMON, **_WIDTH, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
        head_dim=8, rms_norm_eps=0.05, rope_parameters=_rope(10_000.0)),
    'gemma2': Gemma2Config(
        **_COMMON, **_WIDTH, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, rms_norm_eps=0.05, rope_parameters=_rope(700.0), query_pre_attn_scalar=1,
        sliding_window=5, attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    'gemma2_bfloat16': Gemma2Config(
        **_COMMON, **_WIDTH, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=1,
        head_dim=10, rope_parameters=_rope(10_000.0), query_pre_attn_scalar=2, sliding_window=7,
        layer_types=['full_attention' if i in (0, 3) else 'sliding_attention' for i in range(5)],
        attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
    'gemma3': _gemma3(
        50.0, 2000.0, num_hidden_layers=8, num_attention_heads=3, num_key_value_heads=1,
        head_dim=12, query_pre_attn_scalar=9),
    'gemma3_multimodal': Gemma3Config(
        text_config=_gemma3(
            10_000.0, 1_000_000.0, hidden_size=40, num_hidden_layers=7, num_attention_heads=8,
            num_key_value_heads=4, head_dim=6, query_pre_attn_scalar=5),
        vision_config=SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8),
        mm_tokens_per_image=4),
    'llama3': LlamaConfig(
        **_COMMON, **_WIDTH, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, rms_norm_eps=0.05, tie_word_embeddings=False, rope_parameters=_rope(
            500.0, rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)),
    'mistral': MistralConfig(
        **_COMMON, **_WIDTH, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        head_dim=12, sliding_window=5, tie_word_embeddings=True, rope_parameters=_rope(700.0)),
    'qwen2': Qwen2Config(
        **_COMMON, **_WIDTH, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=True, rope_parameters=_rope(900.0)),
    'qwen3': Qwen3Config(
        **_COMMON, **_WIDTH, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        head_dim=10, tie_word_embeddings=True, rope_parameters=_rope(1100.0)),
}
LLAMAS = ('llama3', 'mistral', 'qwen2', 'qwen3')  # whose norms multiply by scale, not 1 + scale


def build(name: str, seed: int) -> PreTrainedModel:
  """A model of CONFIGS with random weights in float32 and plain ('eager') attention.

  Matrices are N(0, 0.1) and norm scales N(0, 0.3). The scale of the final norm is N(-1, 1.5), which
  makes logits of order 4. Its factors have both signs, which keeps a tied head from repeating the
  last token: greedy texts vary.
  """
  model = AutoModelForCausalLM.from_config(
      CONFIGS[name], attn_implementation='eager', dtype=torch.float32).eval()
  with torch.no_grad():
    for path, weight in model.named_parameters():
      random = np.random.default_rng([seed, zlib.crc32(path.encode())])
      drawn = random.standard_normal(tuple(weight.shape), np.float32)
      if path.endswith('model.norm.weight'):
        drawn = 1.5 * drawn - 1
      else:
        drawn = drawn * (0.3 if weight.ndim == 1 else 0.1)
        if name in LLAMAS and path.endswith('norm.weight'):
          drawn = drawn + 1
      weight.copy_(torch.from_numpy(drawn))
  return model


def draw_tokens(seed: int, length: int, batch: int = 2) -> np.ndarray:
  """Texts [batch, length] of random tokens."""
  return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch, length), dtype=np.int32)


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
  """Loads a checkpoint with transformers, in `dtype` and with plain attention.

  model.to(dtype) would round the rotary frequencies, too.
  """
  return AutoModelForCausalLM.from_pretrained(
      directory, attn_implementation='eager', dtype=dtype).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
  """Logits [B, T, V] of tokens [B, T], in float32 for any dtype of the model."""
  return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def continue_greedily(model: PreTrainedModel, prompts: np.ndarray, steps: int,
                      ) -> tuple[np.ndarray, float]:
  """The most likely next tokens [B, steps], and the smallest lead over a second choice."""
  texts, lead = prompts, np.inf
  for _ in range(steps):
    last = logits_of(model, texts)[:, -1]
    second, first = np.sort(last, axis=-1)[:, -2:].T
    lead = min(lead, float((first - second).min()))
    texts = np.concatenate([texts, last.argmax(axis=-1, keepdims=True).astype(np.int32)], axis=1)
  return texts[:, prompts.shape[1]:], lead
