"""Reachability: which of two nodes lies down the arrows, and how many arrows on?

  python launch/study.py --config=configs/study/graphs.py --workdir=runs/graphs
  python launch/study.py --config=configs/study/graphs.py:full --workdir=runs/graphs

Decoder and arms are those of hops.py:quick, or of another size of it as in the second command, but
for what the arms train on: long paths as often as short ones, unlike the decoder's text. Answers
are one of two, so that guessing is right half of the time. Among its questions every document has
links, an arrow each: without them the decoder guesses even where one arrow leads to the answer
(docs/results.md).
"""

import runpy
from dataclasses import asdict, replace
from pathlib import Path

from latent_deliberation.data.config import DataConfig
from latent_deliberation.data.synthetic.graphs import Graphs
from latent_deliberation.jobs.binding import as_config, bind
from latent_deliberation.jobs.study_config import Study

HOPS = runpy.run_path(str(Path(__file__).with_name('hops.py')))
QUESTIONS = 12  # of a training document, and as many links
TASK = Graphs(nodes=10, steps=3, skew=1.5, links=QUESTIONS)


def get_config(size='quick'):
  """A coprocessor and constant soft tokens beside the frozen decoder, or a size of hops.py."""
  study = bind(HOPS['get_config'](size), Study)
  start = study.experiment
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='graphs', vocabulary='byte', documents=30_000,
          options=asdict(TASK), questions=QUESTIONS,
          length=3 + 2 * 10 + (2 + 5) * QUESTIONS,  # 10 arrows, then links, questions and answers
          validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=4000)),
      training=replace(start.training, loop=replace(start.training.loop, num_steps=1500)),
      deliberation=replace(start.deliberation, num_traces=QUESTIONS,
                           anchor_tokens=HOPS['ids'](TASK.anchors)),
      evaluation=replace(start.evaluation, num_traces=QUESTIONS))
  return as_config(replace(
      study, name='reachability', experiment=experiment, lessons={'skew': 0.0}))
