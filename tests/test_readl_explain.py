"What has to hold for `readl_explain` as a user runs it: killed or left by its server, it goes on and asks nothing twice; bad input is one sentence."
import gc, json, re, shutil, sys, threading, warnings
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from PIL import Image
from helpers import kill_when
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

def test_tables_lie_beside_the_texts(made):
    tables = json.loads((made/'tables.json').read_text())
    assert [(row['category'], row['images'], row['anomalous']) for row in tables['table_1']] == [('brick', 13, 7), ('leather', 13, 7), ('SUM', 26, 14)]
    assert tables['table_3'][-1]['images'] == 26 and tables['table_3'][-1]['text tokens'] == sum(read_explanations(made)['tokens']) == tables['table_1'][-1]['text_tokens']

def test_killed_it_goes_on_and_ends_with_the_same_texts(data, made, tmp_path, capsys):
    out = tmp_path/'texts'
    kill_when(lambda: (out/'explanations.jsonl').exists() and len(lines(out)) >= 5, [sys.executable, '-c', SLOW, '--data', str(data), '--out', str(out)])
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

def test_refused_requests_get_one_more_turn_and_then_stay_open(data, tmp_path, capsys):
    out = tmp_path/'texts'
    refuse = lambda n, body: (400, 'no such picture') if n in (2, 7) else (200, NORMAL)   # the second image, and once more in its second turn
    with serving(refuse) as (url, asked): code, said = here(capsys, *endpoint(data, out, url), '--max-tries', 1, '--limit', 6)
    assert code == 1 and '1 is open; the same command goes on' in said and '2 requests failed: ' in said and 'no such picture' in said and len(asked) == 7, said
    assert 'rejected: answer (Yes for a normal image, or No for a defective one), see rejected.jsonl' in said
    assert [json.loads(line)['reason'].count('(400)') for line in (out/'failed.jsonl').read_text().splitlines()] == [1, 1] and json.loads((out/'statistics.json').read_text())['open'] == 1
    with serving(lambda n, body: (200, NORMAL)) as (url, asked): code, said = here(capsys, *endpoint(data, out, url), '--max-tries', 1, '--limit', 6)
    assert code == 0 and len(asked) == 1 and 'open' not in said, said

def test_pictures_that_the_server_never_takes_do_not_hold_up_the_others(data, tmp_path, capsys):
    out, refused = tmp_path/'texts', []
    def answer(n, body):
        picture = body['messages'][-1]['content'][1]['image_url']['url']
        if len(refused) < 4 and picture not in refused: refused.append(picture)
        return (400, 'no such picture') if picture in refused else (200, NORMAL)
    with serving(answer) as (url, asked): code, said = here(capsys, *endpoint(data, out, url), '--max-tries', 1, '--limit', 7)
    counted = json.loads((out/'statistics.json').read_text())
    assert code == 1 and '4 are open; the same command goes on' in said and (counted['open'], counted['texts']) == (4, 3) and len(asked) == 11, said

def test_counts_are_of_the_images_asked_for(data, tmp_path, capsys):
    out = tmp_path/'texts'
    with serving(lambda n, body: (200, NORMAL)) as (url, asked):
        for limit in (8, 2):
            here(capsys, *endpoint(data, out, url), '--max-tries', 1, '--limit', limit)
            counted = json.loads((out/'statistics.json').read_text())
            assert counted['images'] == limit == counted['texts'] == counted['verified'] + counted['given_up'] and counted['rejected'] == counted['given_up'] == counted['reasons']['answer']

def truth(n, body):
    "What the strong model would say that is told the truth: the boxes of its hint."
    marks = [dict(bbox_2d=[int(value) for value in found[2].split(',')], label=found[1]) for found in re.finditer(r'([a-z ]+) at \[([\d, ]+)\]', body['messages'][-1]['content'][-1]['text'].partition(': ')[2])]
    if not marks: return 200, NORMAL
    return 200, f"<think>In the second image something is wrong at {' and '.join(str(mark['bbox_2d']) for mark in marks)}.</think>\n<answer>Yes. {', '.join(str(mark | dict(label=mark['label'].strip())) for mark in marks)}</answer>"

def test_defect_in_the_last_column_and_row(data, tmp_path, capsys):
    "Its box ends at the edge of the square, from the masks and through a server."
    shutil.copytree(data/'brick', tmp_path/'data'/'brick')
    for number, path in enumerate(sorted((tmp_path/'data').rglob('*mask*.png'))):
        size = Image.open(path).size; mask = Image.new('L', size)
        mask.paste(255, (size[0] - 1, 0, size[0], 9) if number % 2 else (0, size[1] - 1, 9, size[1])); mask.save(path)
    with serving(truth) as (url, asked):
        for out, more in (('masks', ()), ('served', endpoint('', '', url)[4:])):
            code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/out, *more, '--image-size', 84); assert code == 0 and '13 of 13' in said, said
            ends = {max(row['boxes'][0]['bbox_2d']) for row in read_explanations(tmp_path/out) if row['label']}; assert ends == {84}

# --- bad input ---

def no_normals(folder):
    for kind in (folder/'data'/'brick').glob('t*/good'): shutil.rmtree(kind)

def test_category_without_a_normal_image_is_counted(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path/'data'); no_normals(tmp_path)
    code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts')
    assert code == 0 and '7 images were skipped: there is no normal image of the category' in said and '7 of 7 images of' in said and '7 skipped' in said, said

def test_unreadable_image_is_counted_and_the_others_go_on(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path/'data'); bad = tmp_path/'data'/'brick'/'test'/'hole'/'000.jpg'; bad.write_bytes(bad.read_bytes()[:999])
    code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts')
    assert code == 0 and '25 of 26' in said and '1 skipped' in said, said

def test_unreadable_reference_skips_its_rows(data, tmp_path, capsys):
    shutil.copytree(data/'brick', tmp_path/'data'/'brick')
    assert here(capsys, '--data', tmp_path/'data', '--out', tmp_path/'texts', '--limit', 1)[0] == 0   # references are chosen now
    references = sorted((tmp_path/'data').rglob('train/good/*'))
    for path in references[1:]: path.write_bytes(path.read_bytes()[:999])
    for more in ((), ('--endpoint', 'URL', '--model', 'm', '--key-variable', 'none', '--per-minute', 0)):
        with serving(truth) as (url, asked): code, said = here(capsys, '--data', tmp_path/'data', '--out', tmp_path/f'texts{len(more)}', *(url if each == 'URL' else each for each in more))
        assert code == 0 and 'skipped' in said and 'Traceback' not in said, said
    from datasets import Dataset
    from readl_nb.datasets import labelled
    from readl_nb.explanations import explain
    rows = [row | dict(reference=str(references[1])) for row in labelled(tmp_path/'data').to_list() if row['split'] == 'test']
    out = explain(Dataset.from_list(rows), tmp_path/'given', progress=False)
    assert len((out/'skipped.jsonl').read_text().splitlines()) == len(rows) and 'its reference cannot be used' in (out/'skipped.jsonl').read_text()

def test_one_file_of_normals_elsewhere(data, tmp_path, capsys):
    shutil.copy(next((data/'brick').rglob('train/good/*')), tmp_path/'one.jpg')
    code, said = here(capsys, '--data', data, '--out', tmp_path/'texts', '--normals', tmp_path/'one.jpg', '--limit', 6)
    assert code == 0 and '6 of 6' in said, said
    assert set(read_explanations(tmp_path/'texts')['reference']) == {str(tmp_path/'one.jpg')}

def test_an_image_is_not_compared_with_itself(data, tmp_path):
    from datasets import Dataset
    from readl_nb.datasets import labelled
    from readl_nb.explanations import explain
    first, second, *rest = [row for row in labelled(data).to_list() if row['label']]
    shutil.copy(second['path'], tmp_path/'copy.jpg')
    rows = [first | dict(reference=first['path']), second | dict(reference=str(tmp_path/'copy.jpg')), rest[0] | dict(reference=first['path'])]
    out = explain(Dataset.from_list(rows), tmp_path/'texts', progress=False); counted = json.loads((out/'statistics.json').read_text())
    assert (counted['verified'], counted['skipped'], counted['open']) == (1, 2, 0) and list(counted['skipped_because'].values()) == [2] and 'the very same picture' in str(counted['skipped_because'])

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
    assert not (tmp_path/'texts').exists()   # the right command can be given at once

def test_out_is_a_file_and_a_folder_that_is_not_utf8(data, tmp_path, capsys):
    (tmp_path/'file').write_text('x')
    code, said = here(capsys, '--data', data, '--out', tmp_path/'file'); assert code == 1 and 'it is a file; give a folder' in said and said.count('readl_explain:') == 1
    odd = tmp_path/'bad\udcff'; shutil.copytree(data, odd)
    code, said = here(capsys, '--data', odd, '--out', tmp_path/'texts'); assert code == 1 and 'is not UTF-8; rename it' in said and said.count('readl_explain:') == 1, said

def test_folder_that_cannot_be_written_is_free_again(data, tmp_path, capsys):
    out = tmp_path/'texts'; assert here(capsys, '--data', data, '--out', out, '--limit', 1)[0] == 0
    (out/'failed.jsonl').unlink(); (out/'failed.jsonl').mkdir()   # the last of its files cannot be opened
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(2): code, said = here(capsys, '--data', data, '--out', out, '--limit', 2); assert code == 1 and 'no explanations can be written there' in said, said   # not: another process
        gc.collect()
    assert not [each for each in told if 'explanations.jsonl' in str(each.message)]   # what was open is closed
    (out/'failed.jsonl').rmdir(); assert here(capsys, '--data', data, '--out', out, '--limit', 2)[0] == 0

def test_folder_with_something_else(data, made, tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    code, said = here(capsys, '--data', data, '--out', tmp_path); assert code == 1 and 'choose another folder' in said
    before = contents(made)
    code, said = here(capsys, '--data', data, '--out', made, '--image-size', 224); assert code == 1 and 'made in another way' in said and contents(made) == before

def test_wrong_usage_ends_with_2(capsys):
    for wrong in ([], ['--data', 'd'], ['--data', 'd', '--out', 'o', '--limit', '0'], ['--data', 'd', '--out', 'o', '--key-variable', 'a key']):
        with pytest.raises(SystemExit) as stop: readl_explain(wrong)
        assert stop.value.code == 2 and 'usage: readl_explain' in capsys.readouterr().err
