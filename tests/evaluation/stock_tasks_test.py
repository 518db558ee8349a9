"""Our task files have the prompts and gold answers of lm-evaluation-harness's own, which load."""

import json

import pytest

pytest.importorskip('lm_eval')

import datasets

from latent_deliberation.errors import MissingError
from latent_deliberation.evaluation import task_catalog
from tests.evaluation import task_examples

LABELS = {'text': ['a dog', 'a cat', 'rain'], 'label': ['A', 'B', 'C']}
QUESTION = {'question': 'What  falls?', 'choices': LABELS, 'answerKey': 'C'}
SCIQ = {'support': ' It rained.', 'question': 'What fell?', 'distractor1': 'hail',
        'distractor2': 'snow', 'distractor3': 'ash', 'correct_answer': 'rain'}
SOCIAL = {'context': 'Al ran.', 'question': 'Why?', 'answerA': 'x', 'answerB': 'to win',
          'answerC': 'z', 'label': '2'}
# Name -> a document of the hub, and the same as a local one where that has another form.
DOCUMENTS = {
    'arc_easy': (QUESTION, None),
    'arc_challenge': (QUESTION, None),
    'openbookqa': ({'question_stem': 'What falls is', 'choices': LABELS, 'answerKey': 'C'}, None),
    'hellaswag': (
        {'activity_label': 'Running', 'ctx_a': 'A man [step] runs.', 'ctx_b': 'he', 'label': '1',
         'endings': ['stops.', 'goes on.', 'falls.', 'flies.']},
        {'query': 'Running: A man  runs. He'.replace('  ', ' '), 'gold': 1,
         'choices': ['stops.', 'goes on.', 'falls.', 'flies.']}),
    'social_iqa': (SOCIAL, None),
    'sciq': (SCIQ, None),
    'nq_open': ({'question': 'who fell', 'answer': ['Al', 'Albert']}, None),
    'lambada': ({'text': 'He fell into the river'},
                {'context': 'He fell into the', 'continuation': 'river'}),
    'piqa': ({'goal': 'To run', 'sol1': 'go.', 'sol2': 'stop.', 'label': 1}, None),
    'boolq': ({'passage': 'It rained.', 'question': 'did it rain', 'label': 1},
              {'passage': 'It rained.', 'question': 'did it rain', 'answer': True}),
    'winogrande': ({'sentence': 'Al ran since _ was late.', 'option1': 'Al', 'option2': 'Bo',
                    'answer': '2'}, None),
    'triviaqa': ({'question': 'Who fell', 'answer': {'aliases': ['Al', 'Albert']}},
                 {'context': 'Question: Who fell?\nAnswer:', 'answer': 'Al',
                  'aliases': ['Al', 'Albert']}),
    'gsm8k': ({'question': 'How many?', 'answer': 'It is 2.\n#### 2'}, None)}


def requests_of(name, data):
  return [(instance.args[:1] if task.OUTPUT_TYPE == 'generate_until' else instance.args, gold)
          for task, instance, gold in task_catalog.requests_of(name, data, None, 0)]


@pytest.mark.parametrize('name', DOCUMENTS)
def test_equals_stock(tmp_path, monkeypatch, name):
  """A document has the same contexts, continuations and gold answer by both."""
  hub, local = DOCUMENTS[name]
  splits = {split: datasets.Dataset.from_list([hub]) for split in ('train', 'validation', 'test')}
  monkeypatch.setattr(datasets, 'load_dataset', lambda *given, **named: splits)
  stock = requests_of(name, '')
  given = task_catalog.task_file(f'{name}.yaml')['dataset_kwargs']
  (tmp_path / given['folder']).mkdir()
  for file in given['files'].values():
    (tmp_path / given['folder'] / f'{file}.jsonl').write_text(json.dumps(local or hub))
  assert requests_of(name, str(tmp_path)) == stock


def test_mmlu(tmp_path, monkeypatch):
  """So have questions with letters, after examples of their subject."""
  rows = {split: [{'question': f' {split} {number}?', 'subject': 'high_school_biology',
                   'choices': ['w', 'x', 'y', 'z'], 'answer': number % 4} for number in range(6)]
          for split in ('dev', 'test')}
  splits = {split: datasets.Dataset.from_list(docs) for split, docs in rows.items()}
  monkeypatch.setattr(datasets, 'load_dataset', lambda *given, **named: splits)
  monkeypatch.setitem(task_catalog.HUB, 'mmlu', ('mmlu_high_school_biology',))
  (tmp_path / 'mmlu').mkdir()
  for split, docs in rows.items():
    (tmp_path / f'mmlu/{split}.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  stock, ours = ([(instance.args, gold) for _, instance, gold in task_catalog.requests_of(
      'mmlu', data, None)] for data in ('', str(tmp_path)))
  assert ours == stock and stock[0][0][0].count('Answer: ') == 5


def test_bbh(tmp_path, monkeypatch):
  """So have questions of BBH, after examples with their reasoning."""
  name = 'bbh_cot_fewshot_boolean_expressions'
  rows = [{'input': f'not ( {value} ) is', 'target': str(not value)} for value in (True, False)]
  monkeypatch.setattr(datasets, 'load_dataset', lambda *given, **named: {
      'test': datasets.Dataset.from_list(rows)})
  monkeypatch.setitem(task_catalog.HUB, 'bbh', (name,))
  task, *_ = task_catalog.load_tasks('bbh', '', None).values()
  given = task.config.fewshot_config.samples
  (tmp_path / 'bbh').mkdir()
  examples = ''.join(f"\n\nQ: {each['input']}\nA: Let's think step by step.\n{each['target']}"
                     for each in given)
  for file, docs in (
      ('cot_prompts', [{'prompt': f'x\n-----\n{task.config.description.strip()}{examples}'}]),
      ('test', rows)):
    (tmp_path / f'bbh/{file}.jsonl').write_text('\n'.join(
        json.dumps({'task': 'boolean_expressions', **doc}) for doc in docs))
  (stock, ours) = (task_catalog.requests_of('bbh', data, None) for data in ('', str(tmp_path)))
  assert [(instance.args[0], gold) for _, instance, gold in ours] == [
      (instance.args[0], gold) for _, instance, gold in stock]
  (theirs, *_), (our_task, *_) = stock[0], ours[0]
  assert our_task.config.target_delimiter == theirs.config.target_delimiter
  assert our_task.config.generation_kwargs['until'] == theirs.config.generation_kwargs['until']


@pytest.mark.parametrize('data, shots', [('', 3), ('local', 0)])
def test_shots_of_agieval(data, shots):
  """Only our own file of AGIEval has no examples."""
  assert task_catalog.shots_shown('agieval', data, 3) == shots


DATE = {'day': '1', 'month': 'May', 'year': ''}
DROP = [{'passage': f'{number} came.', 'question': 'How many?', 'query_id': str(number),
         'section_id': 's', 'answer': {'number': str(number), 'date': DATE, 'spans': []},
         'validated_answers': {'number': [''], 'date': [DATE], 'spans': [[]]}}
        for number in range(4)]


@pytest.mark.parametrize('name', task_catalog.OURS)
def test_documents_of_the_hub(tmp_path, monkeypatch, name):
  """The documents of the hub are those of the same local files, in our own form."""
  docs = task_examples.documents()
  files = {'drop': {'train': DROP, 'validation': DROP[2:]},
           'humaneval': {'test': docs['humaneval/test']}, 'mbpp': {'all': docs['mbpp/all']}}[name]
  # On the hub, MBPP's examples are a split of their own.
  hub = {'prompt': files['all'][:9], 'test': files['all'][9:]} if name == 'mbpp' else files
  asked = []
  monkeypatch.setattr(datasets, 'load_dataset', lambda **given: asked.append(given['path']) or {
      split: datasets.Dataset.from_list(rows) for split, rows in hub.items()})
  (tmp_path / name).mkdir()
  for split, rows in files.items():
    (tmp_path / f'{name}/{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  found, local = ([(instance.args, gold) for _, instance, gold in task_catalog.requests_of(
      name, data, None)] for data in ('', str(tmp_path)))
  assert found == local and len(set(asked)) == 1
  task_catalog.check_tasks(['drop'], '', run_code=False)


def test_no_hub(monkeypatch):
  """Where nothing can be downloaded, local data is the remedy."""

  def refuse(**given):
    raise ConnectionError('offline')

  monkeypatch.setattr(datasets, 'load_dataset', refuse)
  with pytest.raises(MissingError, match='EleutherAI/drop.*offline.*--data'):
    task_catalog.requests_of('drop', '', None)
