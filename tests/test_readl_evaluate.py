"What has to hold for `readl_evaluate` and `readl_datasets` as a user runs them: killed, started on two processes, given broken images or the folder of another model, the numbers are the same or one sentence says why not."
import json, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pandas as pd
import pytest
from helpers import kill_when
from readl_nb.commands import answerer_of, evaluate_parser, readl_datasets, readl_evaluate
from readl_nb.evaluation import load_results
from readl_nb.scaling import launch_file

CODE = 'import sys; from readl_nb.commands import readl_evaluate; sys.exit(readl_evaluate())'
COMMAND = [sys.executable, '-c', CODE]
IMAGES = {'brick': ('good', 'hole', 'crack'), 'leather': ('good', 'stain', 'scratch')}
NUMBERS = {'image_auroc', 'image_aupr', 'image_acc', 'log_odds_auroc', 'log_odds_aupr', 'pixel_auroc', 'pixel_aupr', 'pixel_acc', 'pixel_f1', 'pixel_pro', 'rouge_l'}

@pytest.fixture(scope='module')
def made(tmp_path_factory, root):
    "A folder with six sample images in MVTec's layout, and their evaluation that nobody disturbed: `run`, what it printed: `said.json`, `told.txt`."
    folder = tmp_path_factory.mktemp('evaluate')
    for category, kinds in IMAGES.items():
        for kind in kinds:
            for file in (Path('test', kind, '000.jpg'), Path('ground_truth', kind, '000_mask.png')):
                if not (root/'sample_data'/category/file).exists(): continue
                place = folder/'data'/category/file; place.parent.mkdir(parents=True, exist_ok=True); shutil.copy(root/'sample_data'/category/file, place)
    done = subprocess.run(command(folder, folder/'run', '--json'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'said.json').write_text(done.stdout); (folder/'told.txt').write_text(done.stderr)
    return folder

def command(made, out, *more, start=COMMAND, data='data'):
    return [*start, str(made/data), '--out', str(out), '--device', 'cpu', '--batch-size', '2', *map(str, more)]

def here(capsys, made, out, *more, **options):
    "Exit code, standard output and standard error of the command, in this process."
    capsys.readouterr(); code = readl_evaluate(command(made, out, *more, start=[], **options))
    return code, *capsys.readouterr()

def strict(text): return json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
def stamps(out): return {path.name: path.stat().st_mtime_ns for path in (out/'images').glob('*.safetensors')}
def sentence(error): return [line for line in error.splitlines() if line.startswith('readl_evaluate: ')]

def close(one, two):
    "Whether two summaries are the same; numbers to 1e-4."
    if isinstance(one, dict): return one.keys() == two.keys() and all(close(one[name], two[name]) for name in one)
    if isinstance(one, list): return len(one) == len(two) and all(map(close, one, two))
    return abs(one - two) < 1e-4 if isinstance(one, float) and isinstance(two, float) else one == two

def test_json_is_strict_and_holds_the_full_table(made):
    summary = strict((made/'said.json').read_text())
    assert (made/'said.json').read_text().count('\n') == 1, 'one line, and nothing else on standard output'
    assert summary == strict((made/'run'/'summary.json').read_text())
    counts = summary['counts']
    assert (counts['images'], counts['evaluated'], counts['failed'], counts['normal'], counts['anomalous']) == (6, 6, 0, 2, 4)
    table = {row['method']: row for row in summary['table']}
    assert {'all normal', 'all anomalous', 'centre Gaussian', 'random'} < table.keys()
    first = summary['table'][0]
    assert all(0 <= first[name] <= 1 for name in NUMBERS) and first['pixel_auroc'] > .8
    assert table['all normal']['pixel_auroc'] == .5 and table['all normal']['image_auroc'] == .5
    assert [row['method'] for row in summary['categories']] == ['brick', 'leather'] and len(summary['pooled']) == len(table)

def test_files_hold_every_image(made):
    out = made/'run'
    table = pd.read_parquet(out/'results.parquet')
    assert len(table) == 6 and set(table['label']) == {0, 1} and (table['failure'] == '').all()
    page = (out/'report'/'index.html').read_text(encoding='utf8')
    assert 'readl-tiny' in page and '../summary.json' in page and 'http' not in page.replace('http-equiv', '')
    assert 'images/' not in (made/'told.txt').read_text().splitlines()[-1] and 'open' in sentence((made/'told.txt').read_text())[-1]

def test_again_nothing_is_asked_and_the_numbers_are_the_same(made, capsys, monkeypatch):
    before = stamps(made/'run')
    monkeypatch.setattr('readl_nb.evaluation.load_vlm', lambda *a, **k: pytest.fail('the model was loaded'))
    code, out, error = here(capsys, made, made/'run', '--json')
    assert code == 0 and strict(out) == strict((made/'said.json').read_text()) and stamps(made/'run') == before

def test_killed_it_goes_on_nothing_lost_and_nothing_twice(made, tmp_path, capsys):
    out = tmp_path/'run'
    kill_when(lambda: len(stamps(out)) >= 2, command(made, out, '--batch-size', 1))
    before = stamps(out)
    assert 2 <= len(before) < 6, 'it was not killed in the middle'
    code, said, error = here(capsys, made, out, '--json')
    after = stamps(out)
    assert code == 0 and len(after) == 6 and {name: after[name] for name in before} == before, 'a finished image was done again'
    assert close(strict(said), strict((made/'said.json').read_text()))
    assert not list(out.rglob('.*.part'))

def test_half_a_file_is_done_again(made, tmp_path, capsys):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); file = sorted((out/'images').iterdir())[0]
    file.write_bytes(file.read_bytes()[:1000]); before = stamps(out)
    code, said, error = here(capsys, made, out, '--json')
    assert code == 0 and close(strict(said), strict((made/'said.json').read_text()))
    assert [name for name, stamp in stamps(out).items() if before[name] != stamp] == [file.name]

def test_results_of_another_model_are_one_sentence(made, tmp_path, capsys):
    from readl_nb.models import model_path
    other = shutil.copytree(model_path('readl-tiny'), tmp_path/'other')
    before = {path: path.read_bytes() for path in (made/'run').rglob('*') if path.is_file()}
    for more in (['--model', other], ['--max-new-tokens', 7], ['--tier', 2]):
        code, out, error = here(capsys, made, made/'run', *more)
        assert (code, out) == (1, '') and len(error.strip().splitlines()) == 1 and 'another model or prompt' in error and 'choose another folder' in error, error
    assert before == {path: path.read_bytes() for path in (made/'run').rglob('*') if path.is_file()}

def test_a_broken_image_is_listed_and_counted(made, tmp_path, capsys):
    shutil.copytree(made/'data', tmp_path/'data'); out = Path(shutil.copytree(made/'run', tmp_path/'run'))
    (tmp_path/'data'/'brick'/'test'/'good'/'<b>.png').write_text('hello')
    code, said, error = here(capsys, tmp_path, out, '--json')
    summary = strict(said)
    assert code == 0 and [summary['counts'][name] for name in ('images', 'evaluated', 'failed')] == [7, 6, 1]
    assert len(summary['problems']) == 1 and '<b>.png' in summary['problems'][0] and any('<b>.png' in line for line in sentence(error))
    page = (out/'report'/'index.html').read_text(encoding='utf8')
    assert '1 failed' in page and '&lt;b&gt;.png' in page and '<b>.png' not in page
    table = pd.read_parquet(out/'results.parquet')
    assert len(table) == 7 and (table['failure'] != '').sum() == 1
    assert close(summary['table'], strict((made/'said.json').read_text())['table']), 'a broken image is in no number'
    shutil.copy(made/'data'/'brick'/'test'/'good'/'000.jpg', tmp_path/'data'/'brick'/'test'/'good'/'<b>.png')   # mended
    code, said, error = here(capsys, tmp_path, out, '--json')
    assert [strict(said)['counts'][name] for name in ('images', 'evaluated', 'failed')] == [7, 7, 0]

def test_nothing_but_broken_images(tmp_path, capsys):
    place = tmp_path/'data'/'brick'/'test'/'good'; place.mkdir(parents=True); (place/'a.png').write_text('hello')
    code, said, error = here(capsys, tmp_path, tmp_path/'run', '--json')
    assert code == 1 and strict(said)['counts']['failed'] == 1 and (tmp_path/'run'/'report'/'index.html').is_file()

def test_two_processes_merge_to_the_same_numbers(made, tmp_path):
    (tmp_path/'evaluate.py').write_text(CODE)
    start = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', launch_file('cpu'), '--num_processes', '2', str(tmp_path/'evaluate.py')]
    done = subprocess.run(command(made, tmp_path/'run', '--json', start=start), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert close(strict(done.stdout), strict((made/'said.json').read_text())), 'two processes give other numbers than one'
    for one, two in zip(load_results(made/'run'), load_results(tmp_path/'run')):
        assert (one['path'], one['text'], one['answer']) == (two['path'], two['text'], two['answer'])
        assert abs(one.grid_map - two.grid_map).max() < 1e-4 * abs(one.grid_map).max() + 1e-6
    assert len(sentence(done.stderr)) == 1, 'the second process speaks too'

@pytest.fixture
def server():
    "Address of a server that always says No, and the Authorization of each request."
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length'])); seen.append(self.headers.get('Authorization'))
            said = json.dumps(dict(choices=[dict(message=dict(content='No, it is even.'), finish_reason='stop')])).encode()
            self.send_response(200); self.send_header('Content-Length', str(len(said))); self.end_headers(); self.wfile.write(said)
        def log_message(self, *words): pass
    found = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{found.server_port}/v1', seen
    found.shutdown(); found.server_close()

@pytest.mark.parametrize('name', ['OPENAI_API_KEY', 'CONTRACT_KEY', 'none'])
def test_endpoint_gets_the_key_that_was_named_and_no_file_does(made, tmp_path, capsys, monkeypatch, server, name):
    keys = dict(OPENAI_API_KEY='sk-Usual-0123456789', CONTRACT_KEY='sk-Named-0123456789')
    for variable, key in keys.items(): monkeypatch.setenv(variable, key)
    more = ['--endpoint', server[0], '--model', 'NAME', '--tier', 3, '--per-minute', 0, '--json', *(['--key-variable', name] if name != 'OPENAI_API_KEY' else [])]
    code, said, error = here(capsys, made, tmp_path/'run', *more)
    assert code == 0 and strict(said)['counts']['evaluated'] == 6
    assert server[1] == [f'Bearer {keys[name]}' if name in keys else None] * 6
    written = b''.join(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()) + (said + error).encode()
    assert not any(key[3:].encode() in written for key in keys.values())
    code, again, _ = here(capsys, made, tmp_path/'run', *more, '--per-minute', 30)
    assert code == 0 and len(server[1]) == 6 and strict(again) == strict(said), 'another pace is no other model, and nothing is asked twice'

def test_processes_share_the_pace_and_each_takes_its_own_device(monkeypatch):
    asked = lambda *more: answerer_of(evaluate_parser().parse_args(['DATASET', '--tier', '3', *more]))
    monkeypatch.setenv('WORLD_SIZE', '4')
    endpoint = asked('--endpoint', 'http://127.0.0.1:9/v1', '--model', 'NAME', '--per-minute', '120')
    assert endpoint.per_minute == 30 and endpoint.workers == 1
    monkeypatch.setattr('readl_nb.training.device_of', lambda device: f'the own one of {device}')
    monkeypatch.setattr('readl_nb.answers.LocalModel', lambda name, device, **more: (name, device, more['tier']))
    assert asked() == ('readl-tiny', 'the own one of None', 3)

@pytest.mark.parametrize('name', ['sk-proj-0123456789', '', 'A B'])
def test_a_key_in_place_of_its_name_is_not_repeated(made, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stop: readl_evaluate(command(made, tmp_path/'run', '--endpoint', 'http://127.0.0.1:9/v1', '--key-variable', name, start=[]))
    assert stop.value.code == 2 and 'never the key' in (error := capsys.readouterr().err) and '0123456789' not in error and not (tmp_path/'run').exists()

@pytest.mark.parametrize('more', [[], ['--categories', 'marble'], ['--layout', 'mvtek'], ['--split', 'validation']])
def test_what_cannot_begin_is_one_sentence(made, tmp_path, capsys, more):
    data = 'data' if more else 'nothing'
    code, out, error = here(capsys, made, tmp_path/'run', *more, data=data)
    assert (code, out) == (1, '') and len(error.strip().splitlines()) == 1 and error.startswith('readl_evaluate: ') and not (tmp_path/'run').exists(), error

def test_a_folder_of_somebody_else_is_left_alone(made, tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    code, out, error = here(capsys, made, tmp_path)
    assert code == 1 and len(error.strip().splitlines()) == 1 and [path.name for path in tmp_path.iterdir()] == ['notes.txt']

def test_subset_is_a_beginning_of_the_whole(made, tmp_path, capsys):
    code, said, _ = here(capsys, made, tmp_path/'run', '--subset', 2, '--json')
    assert code == 0 and strict(said)['counts']['images'] == 2
    before = stamps(tmp_path/'run')
    code, said, _ = here(capsys, made, tmp_path/'run', '--json')
    after = stamps(tmp_path/'run')
    assert {name: after[name] for name in before} == before and close(strict(said), strict((made/'said.json').read_text()))

@pytest.mark.parametrize('program', ['readl_evaluate', 'readl_datasets'])
def test_help_is_instant_and_wrong_usage_ends_with_2(program):
    code = f'import sys; from readl_nb.commands import {program} as run\ntry: run()\nexcept SystemExit as stop: print([m for m in ("torch", "numpy", "pandas", "PIL") if m in sys.modules]); sys.exit(stop.code)'
    helped, wrong = (subprocess.run([sys.executable, '-c', code, *more], capture_output=True, text=True, timeout=60) for more in (['--help'], ['--nonsense']))
    assert helped.returncode == 0 and 'usage' in helped.stdout and helped.stdout.splitlines()[-1] == '[]' and 'Exit code' in helped.stdout
    assert wrong.returncode == 2 and 'usage' in wrong.stderr

def test_datasets_checks_the_samples_and_a_folder_that_is_no_dataset(root, tmp_path, capsys):
    assert readl_datasets(['check', str(root/'sample_data')]) == 0
    said = capsys.readouterr().out
    assert 'no problem was found' in said and 'licence' in said
    (tmp_path/'notes.txt').write_text('hello')
    assert readl_datasets(['check', str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out == '' and len(error.strip().splitlines()) == 1 and error.startswith('readl_datasets: ')
    assert readl_datasets(['list']) == 0 and 'mvtec_ad: ' in capsys.readouterr().out

def test_datasets_manifest_tells_what_changed(made, tmp_path, capsys):
    data = Path(shutil.copytree(made/'data', tmp_path/'data')); file = str(tmp_path/'data.jsonl')
    assert readl_datasets(['manifest', str(data), file]) == 0 and readl_datasets(['verify', str(data), file]) == 0
    capsys.readouterr()
    (data/'brick'/'test'/'good'/'000.jpg').write_bytes(b'other'); (data/'brick'/'new.png').write_bytes(b'new')
    assert readl_datasets(['verify', str(data), file]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and 'changed' in lines[0] and 'not in the manifest' in lines[1]

# --- with references and boxes ---

ASKED = ['--reference', '--max-new-tokens', 24, '--temperature', 1.5, '--min-p', .1, '--batch-size', 2, '--json']   # sampled: it has to go on with the same random numbers

@pytest.fixture(scope='module')
def paired(made, root, tmp_path_factory):
    "A folder with `made`'s images and normal images of brick to learn from, none of leather but its test image, and an evaluation with references that nobody disturbed."
    folder = tmp_path_factory.mktemp('paired'); shutil.copytree(made/'data', folder/'data')
    place = folder/'data'/'brick'/'train'/'good'; place.mkdir(parents=True)
    for n in range(2): shutil.copy(root/'sample_data'/'brick'/'train'/'good'/f'00{n}.jpg', place)
    from PIL import Image
    Image.open(place/'001.jpg').resize((97, 60)).save(place/'001.jpg')   # of another size
    done = subprocess.run(command(folder, folder/'run', *ASKED), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'said.json').write_text(done.stdout); (folder/'told.txt').write_text(done.stderr)
    return folder

def test_references_are_kept_and_an_image_without_one_fails_alone(paired):
    summary, told = strict((paired/'said.json').read_text()), (paired/'told.txt').read_text()
    assert [summary['counts'][name] for name in ('images', 'evaluated', 'failed')] == [6, 5, 1] and 'Traceback' not in told
    results = {r['path']: r for r in load_results(paired/'run')}
    assert {r['reference'] for path, r in results.items() if path.startswith('brick')} <= {'brick/train/good/000.jpg', 'brick/train/good/001.jpg'}
    assert results['leather/test/stain/000.jpg']['reference'] == 'leather/test/good/000.jpg' and results['leather/test/stain/000.jpg'].reference().size == (420, 420)
    alone = results['leather/test/good/000.jpg']   # the only normal leather: never beside itself
    assert alone['reference'] == '' and 'no reference image' in alone['failure'] and alone['failure'] in ' '.join(summary['problems'])
    assert any('1 of 3' in line and 'leather' in line for line in sentence(told))

def test_table_4_style_rows(paired):
    level = strict((paired/'said.json').read_text())['boxes']
    assert level['at'] == .1 and [row['method'] for row in level['table']] == ['boxes', 'map'] and level['counts']['true_boxes'] >= 4
    for row in level['table']:
        numbers = [row[f'{part}_{name}'] for part in ('detection', 'localisation') for name in ('accuracy', 'recall', 'precision')]
        assert all(number is None or 0 <= number <= 1 for number in numbers) and numbers[3] is not None
    assert '<h2>Boxes</h2>' in (paired/'run'/'report'/'index.html').read_text(encoding='utf8')

def test_killed_with_references_it_goes_on_with_the_same_samples(paired, tmp_path, capsys):
    out = tmp_path/'run'
    kill_when(lambda: stamps(out), command(paired, out, *ASKED), limit=600)
    before = stamps(out)
    assert 1 <= len(before) < 5, 'it was not killed in the middle'
    code, said, error = here(capsys, paired, out, *ASKED)
    after = stamps(out)
    assert code == 0 and len(after) == 5 and {name: after[name] for name in before} == before, 'a finished image was done again'
    assert [r.record.get('text') for r in load_results(out)] == [r.record.get('text') for r in load_results(paired/'run')], 'other answers than without the interruption'
    assert close(strict(said), strict((paired/'said.json').read_text()))

def test_again_with_references_nothing_is_asked_but_beside_a_changed_one(paired, tmp_path, capsys, monkeypatch):
    import readl_nb.evaluation as evaluation
    from PIL import Image
    shutil.copytree(paired/'data', tmp_path/'data'); out = Path(shutil.copytree(paired/'run', tmp_path/'run')); before = stamps(out)
    monkeypatch.setattr(evaluation, 'load_vlm', lambda *a, **k: None); calls = []
    def asked(rows, *rest): calls.extend(row['path'] for row in rows); yield from ((row, 'asked again') for row in rows)
    monkeypatch.setattr(evaluation, 'asked', asked)
    code, said, _ = here(capsys, tmp_path, out, *ASKED)
    assert code == 0 and stamps(out) == before and 'leather/test/good/000.jpg' in calls and len(calls) <= 2, calls   # the failed one, in the batch it belongs to
    Image.new('RGB', (50, 40), 'grey').save(tmp_path/'data'/'leather'/'test'/'good'/'000.jpg')   # the reference of two images
    here(capsys, tmp_path, out, *ASKED)
    failed = {r['path'] for r in load_results(out) if r['failure'] == 'asked again'}
    assert failed == {f'leather/test/{kind}/000.jpg' for kind in ('good', 'stain', 'scratch')}

def test_unreadable_references_of_a_folder_are_told_and_others_taken(paired, tmp_path, capsys, monkeypatch):
    import readl_nb.evaluation as evaluation
    monkeypatch.setattr(evaluation, 'load_vlm', lambda *a, **k: None)
    monkeypatch.setattr(evaluation, 'asked', lambda rows, *rest: ((row, 'not asked') for row in rows))
    normals = tmp_path/'normals'; normals.mkdir(); shutil.copy(paired/'data'/'brick'/'train'/'good'/'000.jpg', normals); (normals/'bad.png').write_text('hello')
    code, said, error = here(capsys, paired, tmp_path/'run', '--reference', normals, '--json')
    assert code == 1 and 'bad.png' in error and {r['reference'] for r in load_results(tmp_path/'run')} == {str(normals/'000.jpg')}

@pytest.mark.parametrize('more, said', [(['--reference', 'no/such/folder'], 'no such folder of normal images'), (['--min-p', .1], 'give a temperature too'), (['--tier', 2, '--boxes'], 'go with tier 1'),
                                        (['--endpoint', 'http://127.0.0.1:9/v1', '--model', 'NAME', '--reference'], 'go with tier 1')])
def test_references_and_sampling_that_cannot_be_are_one_sentence(made, tmp_path, capsys, more, said):
    code, out, error = here(capsys, made, tmp_path/'run', *more)
    assert (code, out) == (1, '') and len(error.strip().splitlines()) == 1 and said in error and not (tmp_path/'run').exists(), error

def test_other_sampling_or_question_needs_another_folder(paired, capsys):
    before = stamps(paired/'run')
    for more in ([*ASKED, '--seed', 5], [*ASKED, '--min-p', .2], ['--max-new-tokens', 24], ['--max-new-tokens', 24, '--boxes']):
        code, out, error = here(capsys, paired, paired/'run', *more)
        assert code == 1 and 'another model or prompt' in error and out == '', error
    assert stamps(paired/'run') == before

def test_results_from_before_sampling_and_references_go_on(made, tmp_path, capsys):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); about = json.loads((out/'settings.json').read_text())
    for name in ('temperature', 'min_p', 'seed'): del about['made_by'][name]
    (out/'settings.json').write_text(json.dumps(about)); before = stamps(out)
    code, said, _ = here(capsys, made, out, '--json')
    assert code == 0 and stamps(out) == before and all(r.reference() is None for r in load_results(out))
