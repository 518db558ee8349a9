"""Reachability: which of two nodes do the arrows lead to, and over how many arrows?

  python launch/study.py --config=configs/study/graphs.py --workdir=runs/graphs
  python launch/study.py --config=configs/study/graphs.py:full --workdir=runs/graphs --overwrite
  python launch/study.py --config=configs/study/graphs.py:prosqa --workdir=runs/prosqa
  python launch/study.py --config=configs/study/graphs.py:prosqa --workdir=runs/prosqa \\
      --config.questions.options.asked=prosqa_test.json --overwrite

Decoder and arms are those of pointer_chasing.py:quick, or of another size of it as in the second
command, which keeps what the first has trained and replaces its report. The arms train on long
paths as often as on short ones; the decoder reads mostly short ones. An answer is one of two nodes,
and guessing is right half of the time.

Every document also has links among its questions, each of one arrow. Without them the decoder
guesses even where one arrow leads to the answer.

The third command has graphs of 26 nodes and 42 arrows, as large as those of ProsQA. After as many
steps its decoder still guesses: a null result. The fourth command asks ProsQA's own questions of
the same trained arms; results.json is then about these. prosqa_test.json is a file of the ProsQA
release (github.com/facebookresearch/coconut, data/), which you download.
"""

from dataclasses import asdict, replace

from configs.study import pointer_chasing
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import Study
from latent_deliberation.studies.synthetic.graphs import Graphs

QUESTIONS = 12  # in a training document, and as many links
TASKS = {'small': Graphs(nodes=10, steps=3, skew=1.5, links=QUESTIONS),
         'prosqa': Graphs(nodes=26, steps=3, skew=1.5, links=QUESTIONS)}


def get_config(choice='quick'):
  """Returns the study; `choice` is a size of pointer_chasing.py, 'prosqa' or as 'prosqa_full'."""
  name, size = pointer_chasing.read_choice('graphs.py', choice, tuple(TASKS))
  study = bind(pointer_chasing.get_config(size), Study)
  task, start = TASKS[name], study.experiment
  options = asdict(task)
  asked = {'asked': options.pop('asked')}  # changes the questions, not the text
  arrows = 2 * (task.nodes - task.steps - 2)
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='graphs', vocabulary='byte', documents=30_000,
          options=options, questions=QUESTIONS,
          length=3 + 2 * arrows + 2 * task.links + 5 * QUESTIONS, validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=4000)),
      training=replace(start.training, loop=replace(start.training.loop, num_steps=1500)),
      deliberation=replace(start.deliberation, num_traces=QUESTIONS,
                           anchor_tokens=pointer_chasing.anchor_tokens(task.anchors)),
      evaluation=replace(start.evaluation, num_traces=QUESTIONS))
  return as_config(replace(
      study, name=f'reachability, {name} graphs', experiment=experiment,
      arm_data_options={'skew': 0.0}, questions=replace(study.questions, options=asked)))
