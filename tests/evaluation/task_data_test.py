"""Task files read local data, and refuse what cannot be scored."""

import gzip
import json
import zlib

import pytest

pytest.importorskip('lm_eval')

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.evaluation import code_execution, task_catalog, task_data
from latent_deliberation.evaluation.task_data import load
from latent_deliberation.evaluation.task_files import find_file, read_documents
from latent_deliberation.evaluation.task_outcomes import guesses
from tests.evaluation import task_examples


def requests_of(data, name, **values):
  """Contexts and continuations of a task, and its gold answers."""
  found = task_catalog.requests_of(name, str(data), 3, values.get('shots'))
  return found[0][0], [instance.args for _, instance, _ in found]


@pytest.mark.parametrize('name, number, context, continuation', [
    ('piqa', 1, 'Question: How do I read the 0th of the forty\nAnswer:', ' close it, then write'),
    ('boolq', 1, 'Question: is 0 a read?\nAnswer:', ' yes'),
    ('winogrande', 0, 'since the read', ' came first.'),
    ('winogrande', 1, 'since the number', ' came first.'),
    ('mmlu', 2, 'Answer: A\n\nWhich 0?\nA. read\nB. write\nC. open\nD. close\nAnswer:', ' C'),
    ('agieval', 1, 'Q: What is 0? Answer Choices: (A)1 (B)2 (C)3\nA: Among A through C, the answer '
     'is', ' B')])
def test_choices(data, name, number, context, continuation):
  """The last part of a context, and the beginning of a choice."""
  found = requests_of(data, name)[1][number]
  assert found[0].endswith(context) and found[1].startswith(continuation)


def test_shots(data):
  """MMLU's examples are those of its subject, five by default."""
  _, requests = requests_of(data, 'mmlu')
  assert requests[0][0].count('high_school ') == 5 and 'law' not in requests[0][0]
  assert requests[0][0].startswith('The following are multiple choice questions (with answers) '
                                   'about high school.')
  _, requests = requests_of(data, 'mmlu', shots=2)
  assert requests[0][0].count('high_school ') == 2


@pytest.mark.parametrize('name, begins, ends', [
    ('gsm8k', 'Question: What is 0 and 0?\nAnswer: 0 + 0 = 0\n#### 0\n\nQuestion: What is 1',
     'How many are 0 and read?\nAnswer:'),
    ('gsm8k_chain', 'Question: How many are 0', "Let's think step by step."),
    ('math', 'Problem:\nWhat is 0 + 1?\n\nSolution: It is', 'What is 4 + 1?\n\nSolution:'),
    ('bbh', "Add up.\n\nQ: 0 + 1 is\nA: Let's think step by step.\nSo the answer is 1.\n\nQ: 1",
     "Q: 0 + 2 is\nA: Let's think step by step.\n"),
    ('mbpp', 'You are an expert Python programmer, and here is your task: Add 2.',
     'assert add(3) == 14\n[BEGIN]\n'),
    ('humaneval', 'def plus_0(x):\n', 'def plus_0(x):\n'),
    ('triviaqa', 'Question: What is the 0th read?\nAnswer:', 'Answer:')])
def test_written(data, name, begins, ends):
  """The beginning and the end of a prompt."""
  prompt = requests_of(data, name)[1][0][0]
  assert prompt.startswith(begins) and prompt.endswith(ends)


def test_math_examples_are_no_questions(data):
  task, _ = requests_of(data, 'math')
  assert [doc['answer'] for doc in task.eval_docs] == ['5', '6', '7', '8']


def test_paper():
  """All 17 tasks of the paper have a task file, with its shots."""
  assert len(task_catalog.PAPER) == 17 and set(task_catalog.PAPER) <= set(
      task_catalog.local_names())
  assert task_catalog.expand(['paper', 'piqa', 'sciq']) == [*task_catalog.PAPER, 'sciq']


@pytest.mark.parametrize('tasks, options, said', [
    (['pica'], {}, 'did you mean piqa'), (['drop'], {}, 'drop/train.jsonl is missing'),
    (['humaneval'], {}, '--run_code'), ([], {}, '--tasks'),
    (['gsm8k_chain'], {'data': ''}, '--data'), (['agieval_math'], {'data': ''}, '--data')])
def test_refused(data, tasks, options, said):
  with pytest.raises(UserError, match=said):
    task_catalog.check_tasks(tasks, **{'data': str(data), 'run_code': False, **options})


def test_math_libraries(monkeypatch):
  """From the hub, the judge of math needs further libraries."""
  monkeypatch.setattr(task_catalog.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'sympy, math_verify, antlr4.*lm_eval\[math\]'):
    task_catalog.check_tasks(['math'], '', run_code=False)


def test_all_at_once(data):
  """Everything that is wrong is said at once."""
  with pytest.raises(UserError) as raised:
    task_catalog.check_tasks(['pica', 'drop', 'mbpp'], str(data), run_code=False)
  assert len(str(raised.value).splitlines()) == 4


def test_no_isolation(data, monkeypatch):
  """Where programs cannot be isolated, a task with programs is refused."""
  monkeypatch.setattr(code_execution, '_SCRIPT', code_execution._SCRIPT.with_name('no_such.py'))
  with pytest.raises(UserError, match='--run_code'):
    task_catalog.check_tasks(['humaneval'], str(data), run_code=True)


def test_no_isolation_in_scores(monkeypatch):
  """Nor is a program judged there, as by lm_eval's own command."""
  monkeypatch.setattr(code_execution, '_SCRIPT', code_execution._SCRIPT.with_name('no_such.py'))
  task_data._check_isolation.cache_clear()
  for score in (task_data.score_humaneval, task_data.score_mbpp):
    with pytest.raises(UserError, match='--run_code'):
      score({'prompt': '', 'test': '', 'entry_point': 'print', 'checks': ''}, [''])


def test_several_directories(data, tmp_path):
  """A file is looked for in each directory; a whole one goes before a sample."""
  task_examples.write(tmp_path, 'piqa')
  both = f'{tmp_path}:{data}'
  assert find_file(both, 'piqa', 'validation').is_relative_to(tmp_path)
  assert find_file(both, 'triviaqa', 'validation').name == 'validation_6.jsonl.gz'
  whole = tmp_path / 'triviaqa' / 'validation.jsonl'
  whole.parent.mkdir()
  whole.write_text('{}\n')
  assert find_file(both, 'triviaqa', 'validation') == whole
  with pytest.raises(MissingError, match='no data directory'):
    load(folder='piqa', files={'validation': 'validation'})


def test_largest_sample(tmp_path):
  """Of several samples, the one with the largest number is read."""
  for name in ('validation_200.jsonl', 'validation_1000.jsonl.gz', 'validation_30.jsonl'):
    (tmp_path / name).touch()
  assert find_file(str(tmp_path), '', 'validation').name == 'validation_1000.jsonl.gz'


@pytest.mark.parametrize('content, said', [
    (b'', 'no document'), (b'{"a": 1}\n[]\n', 'line 2'), (b'{"a": \n', 'cannot be read')])
def test_damage(tmp_path, content, said):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError, match=said):
    read_documents(path)


@pytest.mark.parametrize('label', [-1, None, ''])
def test_hidden_labels(tmp_path, label):
  """A test set without labels is refused."""
  (tmp_path / 'piqa').mkdir()
  (tmp_path / 'piqa' / 'validation.jsonl').write_text(json.dumps({'goal': 'x', 'label': label}))
  with pytest.raises(UserError, match='no gold answer'):
    load(folder='piqa', files={'validation': 'validation'}, data=str(tmp_path), prepare='label')


@pytest.mark.parametrize('file, name, removed', [
    ('piqa/validation', 'piqa', 'sol2'), ('hellaswag/validation', 'hellaswag', 'query'),
    ('mmlu/test', 'mmlu', 'choices'), ('gsm8k/test', 'gsm8k', 'question')])
def test_missing_field(tmp_path, file, name, removed):
  """A document without a field is refused, and is named with its file and the field."""
  task_examples.write(tmp_path, file.split('/')[0])
  docs = task_examples.documents().get(file) or [
      {'query': 'x', 'choices': ['a', 'b'], 'gold': 0} for _ in range(6)]
  del docs[4][removed]
  (tmp_path / file).parent.mkdir(exist_ok=True)
  (tmp_path / f'{file}.jsonl.gz').unlink(missing_ok=True)
  (tmp_path / f'{file}.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  with pytest.raises(UserError, match=f'document 4 of .*{file}.jsonl has no {removed!r}'):
    task_catalog.requests_of(name, str(tmp_path), None)


def test_damaged_compression(tmp_path):
  """A damaged file is named, whatever part of it is damaged."""
  whole, refused = gzip.compress(b'{"a": 1}\n' * 40 + bytes(range(65, 91))), set()
  for place in range(12, len(whole) - 8):
    path = tmp_path / 'test.jsonl.gz'
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
    with pytest.raises(UserError, match='test.jsonl.gz cannot be read') as caught:
      read_documents(path)
    refused.add(type(caught.value.__cause__))
  assert zlib.error in refused


def test_missing_inner_field(tmp_path):
  """So is one whose field has not the inner field that a prompt needs."""
  (tmp_path / 'arc_easy').mkdir()
  for split in ('train', 'validation', 'test'):
    (tmp_path / f'arc_easy/{split}.jsonl').write_text(json.dumps(
        {'question': 'Why', 'choices': {'label': ['A']}, 'answerKey': 'A'}))
  with pytest.raises(UserError, match='task arc_easy .*text'):
    task_catalog.requests_of('arc_easy', str(tmp_path), None)


LABELS = {'text': list('wxyz'), 'label': list('ABCD')}


@pytest.mark.parametrize('name, folder, doc, said', [
    ('openbookqa', 'openbookqa', {'question_stem': 'Why', 'choices': LABELS, 'answerKey': 'E'},
     "answerKey = 'E': give one of .*'D'"),
    ('openbookqa', 'openbookqa', {'question_stem': 'Why', 'choices': ['w'], 'answerKey': 'A'},
     "answerKey = 'A'"),
    ('boolq', 'boolq', {'passage': 'x', 'question': 'y', 'answer': 'yes'},
     "answer = 'yes': give one of .False, True"),
    ('hellaswag', 'hellaswag', {'query': 'x', 'choices': ['y', 'z'], 'gold': 'B'}, "gold = 'B'"),
    ('hellaswag', 'hellaswag', {'query': 'x', 'choices': ['y', 'z'], 'gold': 2}, 'gold = 2'),
    ('sciq', 'sciq', {'support': '', 'question': 'x', 'distractor1': 'a', 'distractor2': 'b',
                      'distractor3': 'c', 'correct_answer': ''}, "correct_answer = ''"),
    ('winogrande', 'winogrande', {'sentence': 'a _ b', 'option1': 'x', 'option2': 'y',
                                  'answer': 'x'}, 'none of its choices')])
def test_bad_gold(tmp_path, name, folder, doc, said):
  """A gold answer that is no choice is refused, and not read as the first one."""
  (tmp_path / folder).mkdir()
  (tmp_path / f'{folder}/validation.jsonl').write_text(json.dumps(doc))
  with pytest.raises(UserError, match=said):
    task_catalog.requests_of(name, str(tmp_path), None)


@pytest.mark.parametrize('file, number, field, value, said', [
    ('agieval/test', 1, 'label', 'F', "document 1 of .*label = 'F'.*3 choices"),
    ('agieval/test', 1, 'label', 'AB', "label = 'AB'"),
    ('mmlu/dev', 2, 'answer', None, 'dev has answer = None'),
    ('mmlu/dev', 2, 'answer', 4, 'document 2 of .*answer = 4'),
    ('mmlu/test', 2, 'answer', 'E', "document 2 of .*answer = 'E'"),
    ('mmlu/dev', 2, 'answer', 'C', '')])
def test_letters(tmp_path, file, number, field, value, said):
  """A gold choice is a letter or a number of the choices, in examples, too."""
  docs = task_examples.documents()
  docs[file][number][field] = value
  folder = file.split('/')[0]
  (tmp_path / folder).mkdir()
  for each in (name for name in docs if name.startswith(folder)):
    (tmp_path / f'{each}.jsonl').write_text('\n'.join(map(json.dumps, docs[each])))
  if said:
    with pytest.raises(UserError, match=said):
      task_catalog.requests_of(folder, str(tmp_path), None)
  else:
    assert 'high_school 2?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n' in task_catalog.requests_of(
        folder, str(tmp_path), None)[0][1].args[0]


def test_no_document_of_the_task(tmp_path):
  """A file without questions of the kind that a task takes is refused."""
  (tmp_path / 'agieval').mkdir()
  docs = [doc for doc in task_examples.documents()['agieval/test'] if not doc['options']]
  (tmp_path / 'agieval/test.jsonl').write_text('\n'.join(map(json.dumps, docs)))
  with pytest.raises(UserError, match='test.jsonl holds no document of the task agieval'):
    task_catalog.requests_of('agieval', str(tmp_path), None)
  assert len(task_catalog.requests_of('agieval_math', str(tmp_path), None)) == 6


@pytest.mark.parametrize('name, shots', [('agieval', 2), ('gsm8k', 11), ('piqa', 6), ('mmlu', 6)])
def test_refused_shots(data, name, shots):
  """More examples than a task has are refused."""
  with pytest.raises(UserError, match='--num_fewshot'):
    task_catalog.requests_of(name, str(data), None, shots)


def test_hub():
  """From the hub, AGIEval has its nine English tasks with choices."""
  names = task_catalog.names_of('agieval', '')
  assert len(names) == 9 and 'agieval_sat_en_without_passage' in names
  assert 'agieval_math' not in names and task_catalog.names_of('agieval', 'data') == ['agieval']
  assert task_catalog.names_of('math', '') == ['minerva_math']


@pytest.mark.parametrize('name, expected', [
    ('gsm8k', 2 / 3), ('math', 1 / 2), ('sciq', None), ('boolq', 2 / 3)])
def test_majority(tmp_path, name, expected):
  """Majority counts what is judged, and says nothing where the right choice never moves."""
  docs = task_examples.documents()
  docs['gsm8k/test'] = [{'question': f'Why {n}', 'answer': f'It is {n}.\n#### {max(n, 3)}'}
                        for n in range(6)]
  docs['math/test'] = [{'context': f'What is {n}?', 'answer': '7' if n > 5 else str(n),
                        'chain_of_thought': f'{n} and $\\boxed{{7}}$.'} for n in range(8)]
  docs['sciq/validation'] = [
      {'support': '', 'question': 'Why', 'distractor1': 'a', 'distractor2': 'b',
       'distractor3': 'c', 'correct_answer': 'd'} for _ in range(3)]
  for file, each in docs.items():
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / f'{file}.jsonl').write_text('\n'.join(map(json.dumps, each)))
  found = task_catalog.requests_of(name, str(tmp_path), None)
  golds = {instance.doc_id: gold for _, instance, gold in found}
  assert guesses(list(golds.values()))[1] == expected


def annotated(*numbers):
  """Answers of annotators, as EleutherAI/drop has them."""
  date = {'day': '', 'month': '', 'year': ''}
  first, *others = ({'number': number, 'date': date, 'spans': [] if number else ['two', 'men']}
                    for number in numbers)
  return {'answer': first, 'validated_answers': {
      key: [other[key] for other in others] for key in ('number', 'date', 'spans')}}


def write_drop(directory, train, validation):
  (directory / 'drop').mkdir()
  for split, docs in (('train', train), ('validation', validation)):
    (directory / 'drop' / f'{split}.jsonl').write_text('\n'.join(
        json.dumps({'passage': 'Two came.', 'question': 'Who?', **doc}) for doc in docs))


def test_drop(tmp_path):
  """DROP is read in the form of its task file and in those of the hub; its metric judges it."""
  shown = [{'answers_spans': {'spans': ['two', 'men']}}, annotated('2'), annotated('')]
  write_drop(tmp_path, shown,
             [{'answers': [['2'], ['two']]}, annotated('2', '2'), annotated('2', ''),
              {'answers': ['two men']}])
  found = task_catalog.requests_of('drop', str(tmp_path), None)
  task, requests = found[0][0], [instance.args for _, instance, _ in found]
  assert requests[0][0].startswith('Two came. Who? two, men\n\nTwo came. Who? 2\n\nTwo came. '
                                   'Who? two, men\n\n')
  assert [gold.text for *_, gold in found] == ['2', '2', '2', 'two men']
  judged = lambda number, text: task.process_results(task.eval_docs[number], [text])  # noqa: E731
  assert judged(0, ' two') == judged(1, ' 2') == judged(2, '2') == {'em': 1, 'f1': 1}
  assert judged(2, 'two men')['f1'] == 0.33 and judged(1, 'three')['em'] == 0


@pytest.mark.parametrize('doc, said', [
    ({'answers_spans': {'spans': ['2', '2']}}, 'which annotator'),
    ({'answers': []}, 'no gold answer'), ({'answers': [['']]}, 'no gold answer'), ({}, 'answers'),
    ({'answer': '2', 'validated_answers': {}}, 'not known'), ({'answers': 2}, 'not known')])
def test_drop_refused(tmp_path, doc, said):
  """Answers of all annotators in one list are no right answer, and neither is none."""
  write_drop(tmp_path, [annotated('2')] * 3, [{'answers': [['2']]}, doc])
  with pytest.raises(UserError, match=f'document 1 of .*{said}'):
    task_catalog.requests_of('drop', str(tmp_path), None)


@pytest.mark.parametrize('text, right', [
    ('so it is $\\boxed{\\frac{1}{2}}$', True), ('The answer is \\frac12.', True),
    ('The final answer is $\\frac{1}{3}$.', False), ('I do not know', False),
    ('\\fbox{3}', False), ('The answer is \\frac12. \\boxed\n{3}', False),
    ('\\boxed(3)', False), ('\\boxed{1} or \\fbox{2}', False)])
def test_math_results(text, right):
  found = task_data.score_math({'answer': '\\frac{1}{2}'}, [text])
  assert found == {'exact_match': float(right)}


def test_reasoning_results():
  score = lambda text: task_data.score_reasoning({'target': '(A)'}, [text])['exact_match']  # noqa: E731
  assert score('It follows. So the answer is (A).\n') == 1 and score('the answer is (B).') == 0


def test_programs(data):
  """Programs count as right if they pass their tests."""
  try:
    code_execution.check_isolation()
  except UserError:
    pytest.skip('this machine allows no namespaces')
  for name, score, good in (('humaneval', task_data.score_humaneval, '  return x + 1'),
                            ('mbpp', task_data.score_mbpp, 'def add(x): return x + 12')):
    doc = requests_of(data, name)[0].eval_docs[1]
    assert score(doc, [good])['pass_at_1'] == 1
    assert score(doc, [good.replace('+', '-')])['pass_at_1'] == 0
