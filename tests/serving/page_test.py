"""The page in a real browser: both texts stream, tokens are shaded, keys work, phones too."""

import json
import os
import shutil
import time

import pytest

from tests.serving import small_server
from tests.serving.faults import Fixed
from tests.serving.http_api_test import FaultyServer

selenium = pytest.importorskip('selenium')
CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='needs chromium and chromium-driver')]

from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

PICTURES = os.environ.get('LATENT_DELIBERATION_PICTURES')  # directory to keep screenshots in


@pytest.fixture(scope='module')
def browser():
  options = ChromeOptions()
  options.binary_location = CHROMIUM
  for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'):
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  driver = Chrome(options, ChromeService(DRIVER))
  driver.set_page_load_timeout(120)
  yield driver
  driver.quit()


@pytest.fixture(scope='module')
def server():
  attached = small_server.experts(router=Fixed(['stars', 'law'], -1.0, 0.5))
  with small_server.serving(attached, rows=4) as running:
    yield running


def opened(browser, server, width=1280, height=900):
  """Opens the page and waits until it knows the experts."""
  browser.set_window_size(width, height)
  browser.get(f'http://127.0.0.1:{server.port}/')
  until(lambda: 'expert' in find(browser, 'server').text)
  return browser


def find(browser, name):
  return browser.find_element(By.ID, name)


def run(browser):
  """Continues the prompt, and waits for the end."""
  browser.execute_script("document.body.dataset.state = ''")
  find(browser, 'prompt').send_keys(Keys.CONTROL, Keys.ENTER)
  until(lambda: browser.find_element(By.TAG_NAME, 'body').get_dom_attribute('data-state') == 'done')


def tokens(browser, side):
  """Text and colour of each token of a side."""
  return browser.execute_script(
      "return [...document.querySelectorAll('#' + arguments[0] + ' .token')]"
      '.map(node => [node.textContent, getComputedStyle(node).backgroundColor])', side)


def keep(browser, name):
  if PICTURES:
    browser.save_screenshot(f'{PICTURES}/{name}.png')


def until(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it never came true'
    time.sleep(0.05)


def test_texts_stream_side_by_side(browser, server):
  """Both texts are those of the API, shaded by nats, with the router's scores and the card."""
  opened(browser, server)
  run(browser)
  prompt = find(browser, 'prompt').get_attribute('value')
  for side, model, other in (('plain', 'tiny', 'tiny+auto'), ('augmented', 'tiny+auto', 'tiny')):
    answer = small_server.complete(server, model=model, score_with=other, prompt=prompt,
                                   max_tokens=48, logprobs=0)['choices'][0]
    shown = tokens(browser, side)
    assert ''.join(text for text, _ in shown) == answer['text']
    own, second = answer['logprobs']['token_logprobs'], answer['logprobs']['score_with']
    for (_, colour), one, two in zip(shown, own, second, strict=True):
      gain = two - one if side == 'plain' else one - two
      if abs(gain) > 0.05:
        assert colour.startswith('rgba(0, 114' if gain > 0 else 'rgba(213, 94'), (colour, gain)
    assert 'with latents' in find(browser, f'{side}-facts').text
  assert 'law' in find(browser, 'augmented-title').text
  scores = find(browser, 'scores').text.split('\n')
  assert scores[0].startswith('law') and '+0.500' in scores[0] and '−1.000' in scores[1]
  assert 'Stars and planets' in find(browser, 'cards').text
  keep(browser, 'wide')
  assert not [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']


def test_several_experts_and_none(browser, server):
  """Chosen experts are mixed by their weights, and none leaves the right side empty."""
  opened(browser, server)
  boxes = browser.find_elements(By.CSS_SELECTOR, '#experts input[type=checkbox]')
  assert [box.get_attribute('value') for box in boxes] == ['stars', 'law']
  for box in boxes:
    box.click()
  weight = browser.find_elements(By.CSS_SELECTOR, '#experts input[type=number]')[1]
  weight.clear()
  weight.send_keys('0.5')
  run(browser)
  title = find(browser, 'augmented-title').text
  assert 'stars' in title and 'law (0.5)' in title
  assert len(browser.find_elements(By.CLASS_NAME, 'card')) == 2
  keep(browser, 'several')
  browser.find_element(By.CSS_SELECTOR, 'input[value=none]').click()
  run(browser)
  assert tokens(browser, 'plain') and not tokens(browser, 'augmented')
  assert 'No expert' in find(browser, 'augmented-facts').text


def test_keyboard_alone(browser, server):
  """Tab reaches everything in order, arrows walk through tokens, and Esc stops."""
  opened(browser, server)
  run(browser)
  browser.execute_script('document.activeElement.blur(); window.scrollTo(0, 0)')
  reached = []
  for _ in range(16):
    active = browser.switch_to.active_element
    active.send_keys(Keys.TAB)
    active = browser.switch_to.active_element
    reached.append(active.get_attribute('id') or active.get_attribute('value'))
  for name in ('prompt', 'auto', 'stars', 'go', 'plain', 'augmented'):
    assert name in reached, reached
  order = [reached.index(name) for name in ('auto', 'stars', 'go', 'plain', 'augmented')]
  assert order == sorted(order)
  plain = find(browser, 'plain')
  plain.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert len(browser.find_elements(By.CSS_SELECTOR, '#plain .chosen')) == 1
  assert 'with latents' in find(browser, 'plain-token').text
  keep(browser, 'chosen')


def test_narrow_screen(browser, server):
  """On a phone the sides are above each other, and nothing is wider than the screen."""
  opened(browser, server, 390, 844)
  # A headless window has a least width of its own, so the page is put into a frame.
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
      'width': 360, 'height': 780, 'deviceScaleFactor': 2, 'mobile': True})
  try:
    run(browser)
    width, inner = browser.execute_script(
        'return [document.documentElement.scrollWidth, window.innerWidth]')
    assert width <= inner == 360
    plain, augmented = (find(browser, side).rect for side in ('plain', 'augmented'))
    assert augmented['y'] > plain['y'] + plain['height'] and plain['width'] > 250
    keep(browser, 'narrow')
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_text_is_no_markup(browser, server):
  """What a prompt says is shown, and never run."""
  opened(browser, server)
  prompt = find(browser, 'prompt')
  prompt.clear()
  prompt.send_keys('<img src=x onerror="window.ran=1"><b>bold')
  run(browser)
  assert browser.execute_script('return window.ran') is None
  assert '<b>bold' in find(browser, 'plain').text


def test_faults_and_errors_are_shown(browser):
  """A faulty expert leaves the plain text and a line that says so; a refusal is shown, too."""
  with small_server.serving(FaultyServer(stars='fails'), rows=4) as server:
    opened(browser, server)
    browser.find_element(By.CSS_SELECTOR, '#experts input[value=stars]').click()
    run(browser)
    assert "the expert 'stars' failed" in find(browser, 'fault').text
    assert [text for text, _ in tokens(browser, 'plain')] == [
        text for text, _ in tokens(browser, 'augmented')]
    keep(browser, 'fault')
    prompt = find(browser, 'prompt')
    prompt.clear()
    prompt.send_keys('x' * 200)
    run(browser)
    assert 'room for 96' in find(browser, 'error').text


def test_key_is_asked_for(browser):
  with small_server.serving(small_server.experts(), key='secret-of-16-letters') as server:
    browser.get(f'http://127.0.0.1:{server.port}/')
    until(lambda: find(browser, 'key').is_displayed())
    find(browser, 'key').send_keys('secret-of-16-letters', Keys.TAB)
    until(lambda: 'expert' in find(browser, 'server').text)
    browser.find_element(By.CSS_SELECTOR, 'input[value=none]').click()
    run(browser)
    assert tokens(browser, 'plain')
    status, body, _ = small_server.send(server, 'GET', '/health')
    assert status == 200 and json.loads(body)['status'] == 'ok'
