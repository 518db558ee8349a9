"""lm_eval's own command, with the model 'latent_deliberation' registered; see harness.py.

  python -m latent_deliberation.evaluation --model latent_deliberation --tasks piqa \\
      --model_args decoder=gemma3-270m,coprocessor=runs/gemma/coprocessor,arm=own
"""

from latent_deliberation.cli.app import settled_jax
from latent_deliberation.evaluation import harness

if __name__ == '__main__':
  with settled_jax():
    harness.run_command()
