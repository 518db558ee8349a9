"""Questions with one right answer: how likely it is, and whether it would be given.

Every row of a batch is one question. It is read as a text with a single trace, whose ahead tokens
end with the answer, so that what is scored is the very forward pass that training knows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_deliberation.array_types import Array, Params
from latent_deliberation.batch import Batch
from latent_deliberation.deliberation.forward import Deliberator, ahead_nll
from latent_deliberation.deliberation.loss import likeliest
from latent_deliberation.deliberation.traces import gather_traces
from latent_deliberation.evaluation.perplexity import arm_states
from latent_deliberation.studies.outcomes import Outcomes


@struct.dataclass
class Questions:
  """B questions, each with its answer.

  Attributes:
    text: one document a row, [B, T]; padding behind it.
    anchors: int32 [B] index of the last token before the latents.
    start: int32 [B] index of the first token of the answer.
    end: int32 [B] index behind its last.
    span: A, ahead tokens that reach from any anchor to the end of its answer.
  """
  text: Batch
  anchors: Array
  start: Array
  end: Array
  span: int = struct.field(pytree_node=False)


def batch_questions(parts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
                    batch_size: int, offline: bool = False) -> list[Questions]:
  """Batches of one shape for questions given as ids of context, question and answer.

  Args:
    batch_size: B. The last batch is filled up with questions from the start, so that the controls
      of its own are as in the others; whoever scores has the number of questions.
    offline: latents come behind the context, before the question is known; otherwise behind it.

  Raises:
    ValueError: there is no question, or one whose latents would come before any token.
  """
  if not parts:
    raise ValueError('there are no questions: ask for at least 1 of each difficulty')
  lengths = np.array([[len(part) for part in question] for question in parts])
  start, end = lengths[:, :2].sum(axis=1), lengths.sum(axis=1)
  anchors = (lengths[:, 0] if offline else start) - 1
  if anchors.min() < 0 or (end <= start).any():
    wrong = int(np.argmax((anchors < 0) | (end <= start)))
    raise ValueError(f'question {wrong} has {lengths[wrong].tolist()} tokens of context, question '
                     'and answer: there must be a token before the latents, and an answer')
  tokens = np.zeros((len(parts), end.max()), np.int32)
  for row, question in zip(tokens, parts, strict=True):
    ids = np.concatenate([np.asarray(part, np.int32) for part in question])
    row[:len(ids)] = ids
  span = int((end - 1 - anchors).max())
  batches = []
  for first in range(0, len(parts), batch_size):
    rows = np.arange(first, first + batch_size) % len(parts)
    order = np.arange(tokens.shape[1])
    inside = order < end[rows, None]
    batches.append(Questions(
        Batch(tokens[rows], inside.astype(np.int32), np.where(inside, order, 0).astype(np.int32)),
        anchors[rows].astype(np.int32), start[rows].astype(np.int32), end[rows].astype(np.int32),
        span))
  return batches


# (params, decoder_params, questions) -> {arm: nats of the answers [B], whether they are given [B]}
Scorer = Callable[[Params, Params, Questions], Mapping[str, tuple[Array, Array]]]


def make_question_scorer(deliberator: Deliberator, arms: Sequence[str], *, loss_chunk: int,
                         mesh: Mesh, rules: Mapping[str, Sequence[str]], delay: int = 0) -> Scorer:
  """Compiles the scoring of one batch under several arms.

  An answer counts as given when each of its tokens is the likeliest behind those before it: greedy
  decoding would write it.

  Args:
    arms: 'frozen' (the decoder alone) and names of controls.ARMS.
    delay: ahead tokens that are read before latents join the cache.
  """

  def score(params: Params, decoder_params: Params,
            questions: Questions) -> dict[str, tuple[Array, Array]]:
    with nn.logical_axis_rules(tuple(rules.items())):
      anchors = questions.anchors[:, None]
      traces = gather_traces(questions.text, anchors, anchors >= 0, questions.span)
      traces = traces.replace(delay=jnp.full_like(anchors, delay) if delay else None)
      index = anchors + 1 + jnp.arange(questions.span)
      answer = (index >= questions.start[:, None]) & (index < questions.end[:, None])
      states = arm_states(deliberator, arms, params, decoder_params, questions.text, traces)
      cap, scores = deliberator.decoder.config.final_softcap, {}
      for arm, hidden in states.items():
        nll = ahead_nll(hidden, traces, decoder_params, cap, loss_chunk)[:, 0]
        given = likeliest(hidden[:, 0], traces.ahead_tokens[:, 0],
                          decoder_params['embedder']['table'], cap, loss_chunk)
        scores[arm] = jnp.sum(nll * answer, axis=1), jnp.all(given | ~answer, axis=1)
    return scores

  compiled = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def scorer(params: Params, decoder_params: Params,
             questions: Questions) -> Mapping[str, tuple[Array, Array]]:
    with jax.set_mesh(mesh):
      return compiled(params, decoder_params, questions)

  return scorer


def score_questions(scorer: Scorer, params: Params, decoder_params: Params,
                    batches: Iterable[Questions], count: int) -> dict[str, Outcomes]:
  """What each arm of the scorer did on the first `count` questions of the batches."""
  scored: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
  for questions in batches:
    for arm, outcome in jax.device_get(scorer(params, decoder_params, questions)).items():
      scored.setdefault(arm, []).append(outcome)
  return {arm: Outcomes(np.concatenate([nll for nll, _ in outcomes])[:count].astype(np.float64),
                        np.concatenate([given for _, given in outcomes])[:count])
          for arm, outcomes in scored.items()}
