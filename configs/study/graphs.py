"""Reachability: which of two nodes lies down the arrows, and how many arrows on?

  python launch/study.py --config=configs/study/graphs.py --workdir=runs/graphs

Decoder and arms are those of hops.py:quick, but for what the arms train on: long paths as often as
short ones, unlike the decoder's text. Answers are one of two, so that guessing is right half of
the time. Few questions a graph: candidates that came before can be answered without the graph.

The decoder still guesses after these 3,000 steps (docs/results.md): a task to be solved yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from latent_deliberation.data.config import DataConfig
from latent_deliberation.data.synthetic.graphs import Graphs
from latent_deliberation.jobs.experiment import as_config, bind
from latent_deliberation.jobs.study_config import Study

HOPS = runpy.run_path(str(Path(__file__).with_name('hops.py')))
QUESTIONS, DOCUMENTS = 5, 3  # of a training document, and of a row
TASK = Graphs(nodes=10, steps=3, skew=1.5)


def get_config():
  """A coprocessor and constant soft tokens beside the frozen decoder."""
  study = bind(HOPS['get_config']('quick'), Study)
  start = study.experiment
  experiment = replace(
      start,
      data=DataConfig(
          source='synthetic', name='graphs', vocabulary='byte', documents=30_000,
          options={'nodes': TASK.nodes, 'steps': TASK.steps, 'skew': TASK.skew},
          questions=QUESTIONS, length=DOCUMENTS * (23 + 4 * QUESTIONS),  # 10 arrows of 2 letters
          validation_percent=2),
      pretraining=replace(start.pretraining, loop=replace(start.pretraining.loop, num_steps=3000)),
      training=replace(start.training, loop=replace(start.training.loop, num_steps=2000)),
      deliberation=replace(start.deliberation, num_traces=QUESTIONS * DOCUMENTS,
                           anchor_tokens=HOPS['ids'](TASK.anchors)),
      evaluation=replace(start.evaluation, num_traces=QUESTIONS * DOCUMENTS))
  return as_config(replace(
      study, name='reachability', experiment=experiment, lessons={'skew': 0.0}))
