"Endpoints as a user meets them: Hugging Face's own server with readl-tiny behind it, and a server that misbehaves."
import base64, json, os, shutil, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
import httpx2, numpy as np, pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available
from readl_nb.answers import TIERS, Answer, Endpoint, LocalModel, settings, weights_digest
from readl_nb.images import read_image
from readl_nb.inspection import Failure
from readl_nb.models import fitted, model_path

ROOT = Path(__file__).resolve().parents[1]
MODEL = 'readl_nb/readl_tiny'
FILES = [ROOT/'sample_data'/name for name in ('wood/test/good/000.jpg', 'wood/test/crack/000.jpg', 'brick/test/hole/000.jpg', 'leather/test/stain/000.jpg')]
KEY = 'sk-Contract-0123456789abcdef'

@pytest.fixture(scope='module')
def images(): return [read_image(file) for file in FILES]

@pytest.fixture(autouse=True)
def key(monkeypatch): monkeypatch.setenv('CONTRACT_KEY', KEY)

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

# --- the real server ---

@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "Address of `transformers serve` with readl-tiny, and the file that receives what it was asked."
    if not is_serve_available(): pytest.skip('the real server is optional: pip install "transformers[serving]"')
    folder, port = tmp_path_factory.mktemp('served'), free_port()
    with open(folder/'output.txt', 'w') as output:
        process = subprocess.Popen([sys.executable, ROOT/'tests/tools/serve.py', MODEL, str(port), folder/'asked.jsonl'], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   env={name: value for name, value in os.environ.items() if 'KEY' not in name} | {'PYTHONPATH': str(ROOT)})
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < end, f'the server did not start:\n{(folder/"output.txt").read_text()[-3000:]}'
            try:
                if httpx2.get(f'http://127.0.0.1:{port}/health', trust_env=False).status_code == 200: break
            except httpx2.TransportError: time.sleep(.2)
        yield f'http://127.0.0.1:{port}/v1', folder
    finally: process.terminate(); process.wait(30)

def real(served, **options): return Endpoint(served[0], **dict(model=MODEL, key_variable='CONTRACT_KEY', per_minute=None, retries=0) | options)

def test_real_server_says_what_the_model_says_here(served, images):
    there, here = real(served).answers(images), LocalModel().answers(images)
    assert [(a.text, a.answer, a.reasoning, a.problem, a.truncated) for a in there] == [(a.text, a.answer, a.reasoning, a.problem, a.truncated) for a in here]
    assert [(a.answer, a.problem) for a in there] == [('No', '')] + [('Yes', '')] * 3

@pytest.mark.parametrize('tier', [2, 3])
def test_real_server_is_asked_in_the_other_tiers(served, images, tier):
    # readl-tiny writes no prose, and the server's parser sorts what it writes anew: only whether something came, and its length, can be compared
    there, here = real(served, tier=tier).answers(images[:2], max_new_tokens=60), LocalModel(tier=tier).answers(images[:2], max_new_tokens=60)
    assert [(type(a), a.truncated) for a in there] == [(type(a), a.truncated) for a in here]
    asked = json.loads((served[1]/'asked.jsonl').read_text().splitlines()[-1])['messages']
    assert (asked[0]['content'], asked[1]['content'][1]['text']) == (TIERS[tier].system, TIERS[tier].question)

def test_real_server_keeps_the_order_with_several_workers(served, images):
    assert real(served, workers=4).answers(images) == real(served).answers(images)

def test_real_server_receives_image_and_prompt_and_nothing_else(served, tmp_path):
    exif = Image.Exif(); exif[0x010e], exif[0x0112] = 'Contract secret', 6
    named = tmp_path/'Contract name.jpg'; Image.open(FILES[1]).save(named, exif=exif, comment=b'Contract comment')
    answer, = real(served, tier=3).answers([named], max_new_tokens=8, seed=5)
    asked = json.loads((served[1]/'asked.jsonl').read_text().splitlines()[-1])
    url = asked['messages'][1]['content'][0]['image_url'].pop('url')
    assert asked == dict(model=MODEL, max_tokens=8, temperature=0., seed=5, messages=[
        dict(role='system', content=TIERS[3].system), dict(role='user', content=[dict(type='image_url', image_url={}), dict(type='text', text=TIERS[3].question)])])
    sent = base64.b64decode(url.removeprefix('data:image/png;base64,'))
    with Image.open(BytesIO(sent)) as image:
        assert (image.format, image.info, dict(image.getexif())) == ('PNG', {}, {})
        assert np.array_equal(np.asarray(image), np.asarray(fitted(read_image(named), 420)))   # upright, not a pixel lost
    assert b'Contract' not in sent and isinstance(answer, Answer)

def test_real_server_stops_at_the_limit(served, images):
    answer, = real(served).answers(images[:1], max_new_tokens=5)
    assert (answer.answer, answer.truncated, answer.problem) == (None, True, 'truncated at the token limit')

def test_real_server_without_the_model(served, images):
    failures = real(served, model='no-such-model').answers(images[:2])
    assert [type(f) for f in failures] == [Failure] * 2 and 'no-such-model' in failures[0].reason and '(400)' in failures[0].reason
    failure, = Endpoint(served[0] + '/wrong', MODEL, key_variable=None).answers(images[:1])
    assert 'knows no such address or model (404)' in failure.reason

def test_key_is_never_written(served, images, tmp_path):
    endpoint = real(served)
    answers = endpoint.answers(images[:1]) + real(served, model='no-such-model').answers(images[:1])
    (tmp_path/'settings.json').write_text(json.dumps(settings(endpoint)))
    (tmp_path/'answers.txt').write_text('\n'.join(map(str, [*answers, endpoint, vars(endpoint)])))
    for folder in (tmp_path, served[1]):
        for file in folder.iterdir(): assert KEY not in file.read_text() and KEY[3:] not in file.read_text(), file.name

def test_settings_hold_no_key_that_stands_in_fields():
    fields = dict(user=f'me-{KEY}', metadata=[dict(note=f'Bearer {KEY}', api_key='another-0123456789')], top_p=.9, max_tokens=None, max_completion_tokens=7, logit_bias={5: -1})
    endpoint = Endpoint('http://127.0.0.1:9/v1', 'some-model', key_variable='CONTRACT_KEY', fields=fields)
    said = json.dumps(settings(endpoint))
    assert KEY not in said and KEY[3:] not in said and 'another-0123456789' not in said and KEY not in repr(endpoint)
    assert json.loads(said) == settings(endpoint), 'a run could not go on: its settings differ from those it wrote'
    assert settings(endpoint)['fields'] == dict(user='me-[key]', metadata=[dict(note='Bearer [key]', api_key='[key]')], top_p=.9, max_tokens=None, max_completion_tokens=7, logit_bias={'5': -1})
    assert endpoint.fields is fields and fields['user'] == f'me-{KEY}', 'what is sent was changed'

def test_settings_of_a_folder_name_it_and_its_weights(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(model_path('readl-tiny'), tmp_path/'other'))
    monkeypatch.chdir(tmp_path)
    said, same = settings(LocalModel('other', 'cpu')), settings(LocalModel(str(folder), 'cpu'))
    assert said == same and said['model'] == str(folder) and said['weights'] == weights_digest(folder) == settings(LocalModel(device='cpu'))['weights']
    assert settings(LocalModel(device='cpu'))['model'] == 'readl-tiny'
    with open(folder/'model.safetensors', 'r+b') as file: file.seek(-4, 2); file.write(b'\1\2\3\4')
    assert weights_digest(folder) != said['weights']

# --- a server that misbehaves ---

FINE = 200, {}, json.dumps(dict(choices=[dict(message=dict(content='The grain is even.\nNo'), finish_reason='stop')]))
NOW = {'Retry-After': '0'}

@contextmanager
def playing(*script, port=0):
    "A server that replies with `script`, one (status, headers, body) or function of the handler a request, the last for ever; yields address and what it saw."
    script, seen, lock = list(script), [], threading.Lock()
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length']))
            with lock: seen.append((time.monotonic(), dict(self.headers), body)); reply = script.pop(0) if len(script) > 1 else script[0]
            if callable(reply): return reply(self)
            status, headers, text = reply
            text = text.replace('HEADERS', json.dumps(str(dict(self.headers)))[1:-1]).encode()
            self.send_response(status)
            for name, value in {**headers, 'Content-Length': len(text)}.items(): self.send_header(name, str(value))
            self.end_headers(); self.wfile.write(text)
        def log_message(self, *words): pass
    server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/v1', seen
    finally: server.shutdown(); server.server_close()

def ask(url, images, **options):
    return Endpoint(url, 'some-model', **dict(tier=2, key_variable='CONTRACT_KEY', per_minute=None, retries=3) | options).answers(images)

def one_sentence(result, *words):
    "The result is a failure of one line without the key that says `words`."
    assert isinstance(result, Failure) and result.path == '' and '\n' not in result.reason and len(result.reason) < 500
    assert KEY not in result.reason and KEY[:11] not in result.reason
    for word in words: assert word in result.reason

@pytest.mark.parametrize('status', [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(images, status):
    with playing((status, NOW, 'wait'), (status, NOW, 'wait'), FINE) as (url, seen):
        answer, = ask(url, images[:1])
        assert answer.answer == 'No' and len(seen) == 3 and len({body for _, _, body in seen}) == 1

def test_retry_after_is_obeyed_by_all_workers(images):
    with playing((429, {'Retry-After': '1'}, ''), FINE) as (url, seen):
        assert [a.answer for a in ask(url, images[:1])] == ['No']
        assert seen[1][0] - seen[0][0] >= 1

def test_requests_keep_their_pace(images):
    with playing(FINE) as (url, seen):
        ask(url, images * 2, per_minute=1200, workers=4)
        assert len(seen) == 8 and seen[-1][0] - seen[0][0] >= 7 * .05 - .03

@pytest.mark.parametrize('reply, attempts, words', [
    ((429, NOW, '{"error": {"message": "slow down"}}'), 4, ['no more requests after 4 attempts (429)', 'slow down']),
    ((429, {'Retry-After': '90000'}, ''), 1, ['it asks to wait 90,000 seconds']),
    ((429, NOW, '{"error": {"code": "insufficient_quota", "message": "pay first"}}'), 1, ['pay first']),
    ((500, NOW, '<html>oops</html>'), 4, ['fails after 4 attempts (500)']),
    ((401, {}, '{"error": {"message": "HEADERS"}}'), 1, ['refuses access (401); check the key in CONTRACT_KEY', '[key]']),
    ((400, {}, 'Incorrect key sk-Contr***************cdef HEADERS'), 1, ['(400)', '[key]']),
    ((404, {}, '{"detail": "HEADERS"}'), 1, ["'some-model'", '(404)']),
    ((302, {'Location': 'http://127.0.0.1:9/'}, ''), 1, ['redirects (302)']),
    ((200, {}, '{"choices": ['), 1, ['not a chat completion']),
    ((200, {}, '{"error": "HEADERS"}'), 1, ['not a chat completion', '[key]']),
    ((200, {}, ''), 1, ['not a chat completion']),
    ((200, {}, '[' * 100_000), 1, ['not a chat completion']),
    ((200, {'Content-Encoding': 'gzip'}, 'no gzip'), 1, ['cannot be read']),
], ids=str)
def test_failure_is_one_sentence(images, reply, attempts, words):
    with playing(reply) as (url, seen):
        one_sentence(ask(url, images[:1])[0], *words)
        assert len(seen) == attempts

def test_failure_does_not_stop_the_others(images, tmp_path):
    (tmp_path/'broken.png').write_bytes(b'no image')
    with playing(FINE, (400, {}, 'no'), FINE) as (url, seen):
        results = ask(url, [images[0], tmp_path/'broken.png', images[1], images[2]])
        assert [type(r) for r in results] == [Answer, Failure, Failure, Answer] and len(seen) == 3
        assert results[1].path.endswith('broken.png')

def test_wrong_key_is_not_tried_with_every_image(images):
    with playing((401, {}, '')) as (url, seen):
        assert {type(r) for r in ask(url, images)} == {Failure} and len(seen) == 1

def test_missing_key_is_named(images):
    with playing((401, {}, '')) as (url, seen):
        one_sentence(ask(url, images[:1], key_variable='NO_SUCH_KEY')[0], 'NO_SUCH_KEY holds no key')
        one_sentence(ask(url, images[:1], key_variable=None)[0], 'it wants a key')
        assert not any('Authorization' in headers for _, headers, _ in seen)

def test_headers_say_nothing_about_the_user(images):
    with playing(FINE) as (url, seen):
        ask(url, images[:1])
        assert {name.lower() for name in seen[0][1]} == {'host', 'accept', 'accept-encoding', 'connection', 'user-agent', 'content-length', 'content-type', 'authorization'}
        assert seen[0][1]['User-Agent'] == 'readl_nb' and KEY not in seen[0][2].decode()

def test_key_in_an_answer_is_taken_out(images):
    with playing((200, {}, '{"choices": [{"message": {"content": "You sent HEADERS\\nNo"}}]}')) as (url, _):
        answer, = ask(url, images[:1])
        assert KEY not in str(asdict(answer)) and '[key]' in answer.text and answer.answer == 'No'

def slow(handler): time.sleep(3)
def drip(handler):
    handler.send_response(200); handler.send_header('Content-Length', '1000'); handler.end_headers()
    try:
        for _ in range(40): handler.wfile.write(b' '); time.sleep(.1)
    except OSError: pass
def cut(handler): handler.send_response(200); handler.send_header('Content-Length', '1000'); handler.end_headers(); handler.wfile.write(b'{'); handler.close_connection = True
def flood(handler):
    handler.send_response(200); handler.end_headers()
    try:
        for _ in range(400): handler.wfile.write(b'x' * 100_000)
    except OSError: pass

@pytest.mark.parametrize('reply, words', [(slow, ['no reply within 1 seconds']), (drip, ['no reply within 1 seconds']), (cut, ['the connection broke'])], ids=['slow', 'drip', 'cut'])
def test_lost_connections_are_tried_again(images, reply, words):
    with playing(reply, FINE) as (url, seen): assert ask(url, images[:1], timeout=1)[0].answer == 'No' and len(seen) == 2
    with playing(reply) as (url, seen): one_sentence(ask(url, images[:1], timeout=1, retries=0)[0], *words)

def test_endless_reply_is_cut(images):
    with playing(flood) as (url, _): one_sentence(ask(url, images[:1], timeout=60)[0], 'not a chat completion')

def test_server_that_goes_and_comes_back(images):
    port = free_port()
    endpoint = Endpoint(f'http://127.0.0.1:{port}/v1', 'some-model', tier=2, key_variable=None, per_minute=None, retries=1)
    first, second = endpoint.answers(images[:2])
    one_sentence(first, 'cannot be reached', 'after 2 attempts'); one_sentence(second, 'after one attempt')
    with playing((500, NOW, ''), FINE, port=port): assert endpoint.answers(images[:1])[0] != first
    with playing((500, NOW, ''), FINE, port=port): assert endpoint.answers(images[:1])[0].answer == 'No'   # all retries again

def test_key_is_not_sent_in_the_open():
    with pytest.raises(ValueError, match='would travel unencrypted to 10.0.0.1') as failure: Endpoint('http://10.0.0.1:8000/v1', 'm', key_variable='CONTRACT_KEY')
    assert KEY not in str(failure.value)

def test_proxies_are_not_asked_for_this_machine(images, monkeypatch):
    for name in ('HTTP_PROXY', 'http_proxy', 'ALL_PROXY'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    with playing(FINE) as (url, _): assert ask(url, images[:1])[0].answer == 'No'
