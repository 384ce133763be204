"What has to hold for `readl_explain` as a user runs it: killed or left by its server, it goes on and asks nothing twice; bad input is one sentence."
import json, shutil, subprocess, sys, threading, time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from PIL import Image
from readl_nb.anomaly_commands import readl_explain
from readl_nb.explanations import read_explanations

CODE = 'import sys; from readl_nb.anomaly_commands import readl_explain; sys.exit(readl_explain())'
SLOW = f"""
import time, readl_nb.explanations as module
whole = module.verify
def slow(*a, **k): time.sleep(.3); return whole(*a, **k)
module.verify = slow
{CODE}"""

@pytest.fixture(scope='module')
def data(tmp_path_factory, root):
    "Two categories with normal and defective images and masks."
    folder = tmp_path_factory.mktemp('images')/'data'
    for category in ('brick', 'leather'): shutil.copytree(root/'sample_data'/category, folder/category)
    return folder

@pytest.fixture(scope='module')
def made(data):
    "The texts that nobody disturbed."
    assert readl_explain(['--data', str(data), '--out', str(data.parent/'texts')]) == 0
    return data.parent/'texts'

def here(capsys, *arguments):
    "Exit code and what was said, in this process, without the bar."
    capsys.readouterr(); code = readl_explain(list(map(str, arguments)))
    return code, '\n'.join(line for line in capsys.readouterr().err.replace('\r', '\n').split('\n') if line.startswith('readl_explain'))

def lines(out): return (out/'explanations.jsonl').read_text().splitlines()
def contents(folder): return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file() and not path.name.startswith('.')}

def test_every_image_gets_a_verified_text(data, made):
    rows = read_explanations(made)
    assert len(rows) == 26 and Counter(rows['label']) == {0: 12, 1: 14}
    for row in rows:
        assert Path(row['path']).is_file() and Path(row['reference']).is_file() and row['reference'] != row['path']
        assert (row['text'].endswith('<answer>No</answer>')) == (row['label'] == 0) and bool(row['boxes']) == bool(row['label'])
    statistics = json.loads((made/'statistics.json').read_text())
    assert (statistics['verified'], statistics['images'], statistics['rejected']) == (26, 26, 0)

def test_killed_it_goes_on_and_ends_with_the_same_texts(data, made, tmp_path, capsys):
    out = tmp_path/'texts'
    process = subprocess.Popen([sys.executable, '-c', SLOW, '--data', str(data), '--out', str(out)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not ((out/'explanations.jsonl').exists() and len(lines(out)) >= 5) and process.poll() is None and time.time() < deadline: time.sleep(.02)
    process.kill(); assert process.wait() == -9
    before = lines(out); assert 5 <= len(before) < 26
    with open(out/'explanations.jsonl', 'a') as file: file.write(before[0][:50])   # as if it had been killed within a line
    code, said = here(capsys, '--data', data, '--out', out)
    assert code == 0 and '26 of 26' in said, said
    assert lines(out)[:len(before)] == before and len(lines(out)) == 26                    # nothing lost, nothing twice
    assert sorted(lines(out)) == sorted(lines(made))

def test_finished_texts_are_left_as_they_are(data, made, capsys):
    before = contents(made)
    code, said = here(capsys, '--data', data, '--out', made)
    assert code == 0 and '26 of 26' in said and contents(made) == before

# --- a server that fails halfway ---

@contextmanager
def serving(answer):
    "Address of a server; `answer(number, body)` gives a status and a text for each request."
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length']))); asked.append(body)
            status, text = answer(len(asked), body)
            reply = json.dumps(dict(choices=[dict(message=dict(role='assistant', content=text), finish_reason='stop')]) if status == 200 else dict(error=dict(message=text))).encode()
            self.send_response(status); self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(reply))); self.end_headers(); self.wfile.write(reply)
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/v1', asked
    finally: server.shutdown(); server.server_close()

NORMAL = '<think>Both images show the same even surface. There is no defect.</think>\n<answer>No</answer>'
def endpoint(data, out, url): return ['--data', data, '--out', out, '--endpoint', url, '--model', 'served', '--key-variable', 'none', '--per-minute', 0, '--categories', 'brick', '--max-tries', 2]

def test_server_that_fails_halfway_keeps_what_is_there_and_goes_on(data, tmp_path, capsys):
    out = tmp_path/'texts'
    with serving(lambda n, body: (200, NORMAL) if n <= 4 else (404, 'gone')) as (url, asked): code, said = here(capsys, *endpoint(data, out, url))
    assert code == 1 and said.count('readl_explain:') == 1 and 'the same call goes on' in said and 'Traceback' not in said, said
    finished = lines(out) if (out/'explanations.jsonl').exists() else []
    with serving(lambda n, body: (200, NORMAL)) as (url, asked): code, said = here(capsys, *endpoint(data, out, url))
    assert code == 0 and '6 of 13 images have a verified text, 7 were given up' in said, said      # it says No to every image
    assert lines(out)[:len(finished)] == finished and len(lines(out)) == 6
    with serving(lambda n, body: (200, NORMAL)) as (url, asked): assert here(capsys, *endpoint(data, out, url))[0] == 0 and not asked   # given up is given up
    statistics = json.loads((out/'statistics.json').read_text()); assert statistics['reasons']['answer'] == 14 and statistics['given_up'] == 7

def test_server_gets_both_pictures_and_never_the_key_in_a_file(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('CONTRACT_KEY', 'sk-Contract-0123456789abcdef')
    with serving(lambda n, body: (200, NORMAL)) as (url, asked): code, _ = here(capsys, *endpoint(data, tmp_path/'texts', url), '--key-variable', 'CONTRACT_KEY', '--limit', 2)
    assert asked and all(json.dumps(body).count('data:image/png;base64,') == 2 for body in asked)
    assert b'sk-Contract' not in b''.join(contents(tmp_path).values())

# --- bad input ---

def no_normals(folder):
    for kind in (folder/'data'/'brick').glob('t*/good'): shutil.rmtree(kind)

def test_category_without_a_normal_image_is_counted(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path/'data'); no_normals(tmp_path)
    code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts')
    assert code == 0 and '7 times: there is no normal image of the category' in said and '7 skipped' in said, said

def test_unreadable_image_is_counted_and_the_others_go_on(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path/'data'); bad = tmp_path/'data'/'brick'/'test'/'hole'/'000.jpg'; bad.write_bytes(bad.read_bytes()[:999])
    code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts')
    assert code == 0 and '25 of 26' in said and '1 skipped' in said, said

def test_reference_of_another_size_is_shown_at_the_size_of_the_model(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path/'data')
    for path in (tmp_path/'data').glob('*/t*/good/*.jpg'): Image.open(path).resize((300, 200)).save(path)
    assert here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts')[0] == 0
    from readl_nb.explanations import pictures_of
    row = next(row for row in read_explanations(tmp_path/'texts') if row['label'])
    assert [picture.size for picture in pictures_of(row)] == [(420, 420)] * 2

@pytest.mark.parametrize('more, sentence', [
    (('--data', 'nothing'), 'nothing'), (('--categories', 'marble'), 'marble'), (('--endpoint', 'http://127.0.0.1:9/v1'), 'name the model'), (('--endpoint', 'ftp://host', '--model', 'm'), 'is no address'),
    (('--model', 'no/such/model'), 'no/such/model'), (('--split', 'holiday'), 'holiday'), (('--normals', 'nowhere'), 'nowhere')])
def test_bad_input_is_one_sentence_and_nothing_is_written(data, tmp_path, capsys, more, sentence):
    code, said = here(capsys, '--data', data, '--out', tmp_path/'texts', *more)
    assert code == 1 and sentence in said and said.count('readl_explain:') == 1, said
    assert not list(tmp_path.rglob('*.jsonl')) or not (tmp_path/'texts'/'explanations.jsonl').read_text()

def test_folder_with_something_else(data, made, tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    code, said = here(capsys, '--data', data, '--out', tmp_path); assert code == 1 and 'choose another folder' in said
    before = contents(made)
    code, said = here(capsys, '--data', data, '--out', made, '--image-size', 224); assert code == 1 and 'made in another way' in said and contents(made) == before

def test_wrong_usage_ends_with_2(capsys):
    for wrong in ([], ['--data', 'd'], ['--data', 'd', '--out', 'o', '--limit', '0'], ['--data', 'd', '--out', 'o', '--key-variable', 'a key']):
        with pytest.raises(SystemExit) as stop: readl_explain(wrong)
        assert stop.value.code == 2 and 'usage: readl_explain' in capsys.readouterr().err
