"The command `readl_inspect` as a user runs it, over every kind of bad input: exit codes, messages, files, the page."
import json, os, re, shutil, struct, subprocess, sys, zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import numpy as np
import pytest
from PIL import Image

KEYS = ['path', 'answer', 'log_odds', 'reasoning', 'well_formed', 'grid', 'tokens', 'map_path', 'map_max_xy', 'peak_box', 'seconds']
ATTACK = '<img src=x onerror=alert(1)>'
WIDTH, HEIGHT = 96, 64

# --- the inputs ---

def png_header(width, height):
    "A PNG of a few bytes that claims a size."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')

def write_good(folder):
    "Files that are unusual and yet readable; [name] -> (width, height) as a viewer shows them."
    grey = Image.effect_noise((WIDTH, HEIGHT), 50); color = Image.merge('RGB', (grey, grey.rotate(180), grey)); clear = color.copy(); clear.putalpha(grey)
    exif = Image.Exif(); exif[0x0112] = 6
    for name in ('a', 'b'): (folder/name).mkdir()
    Image.fromarray((np.asarray(grey).astype(np.uint16) * 257)).save(folder/'deep.png')
    color.convert('P', palette=Image.Palette.ADAPTIVE).save(folder/'palette.png', transparency=0)
    color.convert('CMYK').save(folder/'cmyk.jpg'); clear.save(folder/'rgba.png'); color.save(folder/'rotated.jpg', exif=exif)
    color.save(folder/'a/same.png'); grey.save(folder/'b/same.png'); grey.save(folder/'a/same.jpg'); color.save(folder/f'{ATTACK}.png')
    sizes = {name: (WIDTH, HEIGHT) for name in ('deep.png', 'palette.png', 'cmyk.jpg', 'rgba.png', 'a/same.png', 'b/same.png', 'a/same.jpg', f'{ATTACK}.png')}
    return sizes | {'rotated.jpg': (HEIGHT, WIDTH)}

def write_bad(folder):
    "Files that cannot be inspected; [name] -> what the message must say."
    noise = folder/'noise.jpg'; Image.effect_noise((256, 256), 60).save(noise); whole = noise.read_bytes(); noise.unlink()
    for name, data in {'truncated.jpg': whole[:len(whole) // 2], 'header.png': png_header(64, 64)[:20], 'empty.png': b'', 'notes.png': b'hello',
                       'huge.png': png_header(30_000, 30_000), 'hostile\n\x1b[31m.png': b'x'}.items(): (folder/name).write_bytes(data)
    Image.new('RGB', (1, 1)).save(folder/'dot.png'); Image.new('RGB', (28, 6000)).save(folder/'long.png')
    return {'truncated.jpg': 'cut off', 'header.png': 'cut off', 'empty.png': 'empty', 'notes.png': 'not an image', 'huge.png': '900,000,000 pixels',
            r'hostile\n\x1b[31m.png': 'not an image', 'dot.png': '1 x 1 pixels are too small', 'long.png': 'too long'}

# --- the processes, all started at once ---

COMMAND = shutil.which('readl_inspect', path=str(Path(sys.executable).parent))
COMMAND = [COMMAND] if COMMAND else [sys.executable, '-c', 'import sys; from readl_nb.commands import readl_inspect; sys.exit(readl_inspect())']

# The command with a model that writes what it is told, image by image: responses that no trained model can be asked for.
SCRIPTED = '''
import json, sys
from readl_nb import commands, inspection, models
texts = iter(json.load(open(sys.argv.pop(1))))
def look(vlm, images, config, prompt, generation):
    said = [next(texts) for _ in images]
    ids = [tuple(vlm.tokenizer(text, add_special_tokens=False).input_ids) for text, _ in said]
    responses = [models.Response(text, tokens, None, truncated) for (text, truncated), tokens in zip(said, ids)]
    return list(zip(responses, inspection.read_again(vlm, images, responses, config, prompt)))
inspection.look = look
sys.exit(commands.readl_inspect())
'''
EVIL = '<script>alert(1)</script>'
RESPONSES = {   # name of the image -> response, truncated, problem, has reasoning tokens
    'open': ('A crack is at the top.</think><answer>Yes</answer>', False, 'no <think>', None),
    'close': ('<think>A crack is at the top.<answer>Yes</answer>', False, 'no </think>', None),
    'none': ('There is nothing to see.', False, 'no <think>', False),
    'empty': ('<think></think><answer>No</answer>', False, 'empty reasoning', False),
    'nothing': ('', False, 'no <think>', False),
    'cut': ('<think>A crack is at', True, 'truncated', None),
    'html': (f'<think>A crack {EVIL} is at the top.</think><answer>Yes</answer>', False, '', True),
    'fine': ('<think>A crack is at the top.</think><answer>Yes</answer>', False, '', True)}

BOXES = {   # name of the image -> response with a reference, boxes in pixels of the image (the model sees a square of 420), what is wrong with them
    'found': (f"<think>The second has a crack.</think><answer>Yes. {{'bbox_2d': [0, 210, 420, 420], 'label': '{EVIL}'}}</answer>", [[0, HEIGHT // 2, WIDTH, HEIGHT]], ''),
    'normal': ('<think>Both are even.</think><answer>No</answer>', [], ''),
    'odd': ("<think>A crack.</think><answer>Yes. {'bbox_2d': [1, 2, 3]}, {'bbox_2d': [400, 0, 900, 420], 'label': 'hole'}</answer>", [[round(400 / 420 * WIDTH), 0, WIDTH, HEIGHT]], 'box 1 cannot be read'),
    'own': ('<think>Both are even.</think><answer>Yes</answer>', [], 'the answer is Yes and has no box')}

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    "Every process of this file, [name] -> (Popen, folder); they load the model side by side."
    folder = tmp_path_factory.mktemp('inspect'); inputs = {}
    for name in ('good', 'bad', 'only', 'said', 'nothing', 'bert', 'pairs', 'normals'): (folder/name).mkdir(); inputs[name] = folder/name
    sizes, reasons = write_good(inputs['good']), write_bad(inputs['bad']); write_bad(inputs['only'])
    for name in RESPONSES: Image.effect_noise((WIDTH, HEIGHT), 50).save(inputs['said']/f'{name}.png')
    (folder/'texts.json').write_text(json.dumps([RESPONSES[name][:2] for name in sorted(RESPONSES)]))
    for name in BOXES: Image.effect_noise((WIDTH, HEIGHT), 50).save(inputs['pairs']/f'{name}.png')
    Image.effect_noise((131, 77), 50).save(inputs['normals']/'one.png'); shutil.copy(inputs['pairs']/'own.png', inputs['normals']); (inputs['normals']/'broken.png').write_text('hello')
    (folder/'boxes.json').write_text(json.dumps([(BOXES[name][0], False) for name in sorted(BOXES)]))
    (inputs['bert']/'config.json').write_text('{"model_type": "bert"}'); (inputs['nothing']/'readme.txt').touch()
    one = str(inputs['said']/'fine.png')
    arguments = {
        'mixed': [*COMMAND, 'good', 'bad', 'nothing', 'missing.png', 'good/*.gif', 'good/deep.png', '--json', '--max-new-tokens', '8', '--batch-size', '3'],
        'bad': [*COMMAND, 'only'],
        'model': [*COMMAND, one, '--model', 'bert'],
        'question': [*COMMAND, one, '--question', 'What is in this picture?'],
        'scripted': [sys.executable, '-c', SCRIPTED, 'texts.json', 'said', '--json', '--batch-size', '3'],
        'compared': [sys.executable, '-c', SCRIPTED, 'boxes.json', 'pairs', 'bad', '--reference', 'normals', '--json', '--batch-size', '3']}
    environment = os.environ | {'PYTHONIOENCODING': 'utf8'}
    processes = {name: subprocess.Popen([*words, '--out', f'out_{name}'], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf8')
                 for name, words in arguments.items()}
    finished = {name: (*process.communicate(timeout=600), process.returncode) for name, process in processes.items()}
    return dict(folder=folder, sizes=sizes, reasons=reasons, **finished)

def messages(error):
    "The lines of the command on standard error, without the progress bar."
    return [line[line.index('readl_inspect: ') + 15:].strip() for line in re.split(r'[\r\n]', error) if 'readl_inspect: ' in line]

class Page(HTMLParser):
    "What a browser would load and run."
    def __init__(self, text): self.tags, self.addresses, self.handlers, self.text = [], [], [], ''; super().__init__(); self.feed(text)
    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ('src', 'href'): self.addresses.append(value)
            if name.startswith('on'): self.handlers.append(name)
    def handle_data(self, data): self.text += data

# --- a folder of everything ---

def test_batch_goes_on_after_every_bad_file(runs):
    out, error, code = runs['mixed']
    assert code == 0, error
    records = [json.loads(line) for line in out.splitlines()]
    assert sorted(r['path'] for r in records) == sorted(f'good/{name}' for name in runs['sizes'])   # each once, also the one named twice
    assert 'Traceback' not in error and 'Warning' not in error

def test_each_bad_input_gets_one_line_with_file_reason_and_mend(runs):
    said = messages(runs['mixed'][1])
    reasons = {f'bad/{name}': reason for name, reason in runs['reasons'].items()} | {'nothing': 'no image in this folder', 'missing.png': 'no such file', 'good/*.gif': 'matches no image'}
    for name, reason in reasons.items():
        lines = [line for line in said if line.startswith(f'{name}: ')]
        assert len(lines) == 1 and reason in lines[0] and '; ' in lines[0], (name, lines)
    assert f'{len(runs["sizes"])} of {len(runs["sizes"]) + len(reasons)} inspected' in said[-1]

def test_json_lines_have_exactly_the_promised_keys(runs):
    for line in runs['mixed'][0].splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
        assert list(record) == KEYS
        assert record['answer'] in ('Yes', 'No', None) and isinstance(record['reasoning'], str) and isinstance(record['well_formed'], bool)
        assert record['grid'] == [15, 15] and record['seconds'] > 0
        for token in record['tokens']: assert list(token) == ['text', 'semantic', 'entropy', 'weight', 'kept']

def test_maps_have_the_size_of_the_image_as_it_is_shown(runs):
    for line in runs['mixed'][0].splitlines():
        record = json.loads(line); saved = np.load(runs['folder']/record['map_path'])
        width, height = runs['sizes'][record['path'].removeprefix('good/')]
        assert saved.shape == (height, width) and saved.dtype == np.float32 and np.isfinite(saved).all()

def test_every_image_has_files_of_its_own(runs):
    out, folder = runs['mixed'][0], runs['folder']
    stems = [Path(json.loads(line)['map_path']).stem for line in out.splitlines()]
    assert len({stem.lower() for stem in stems}) == len(runs['sizes'])
    for line, stem in zip(out.splitlines(), stems):
        assert Image.open(folder/'out_mixed'/f'{stem}.png').size[0] > 300
        saved = json.loads((folder/'out_mixed'/f'{stem}.json').read_text())
        assert {key: saved[key] for key in KEYS} == json.loads(line)
    assert not [p.name for p in (folder/'out_mixed').rglob('.*')], 'temporary files are left'

def test_page_is_complete_escaped_and_needs_no_network(runs):
    for name in ('mixed', 'scripted'):
        folder = runs['folder']/f'out_{name}'; page = Page((folder/'index.html').read_text(encoding='utf8'))
        assert not page.handlers and not {'script', 'iframe', 'object', 'link', 'base', 'form'} & set(page.tags)
        assert page.tags.count('article') == (len(runs['sizes']) if name == 'mixed' else len(RESPONSES))
        for address in page.addresses:
            assert not re.match(r'[a-z]+:|/', address) and (folder/unquote(address)).is_file(), address
    assert ATTACK in Page((runs['folder']/'out_mixed/index.html').read_text(encoding='utf8')).text
    assert EVIL in page.text and 'url(' not in (folder/'index.html').read_text(encoding='utf8')

def test_progress_goes_to_standard_error(runs):
    out, error, _ = runs['mixed']
    assert '%|' in error and all(line.startswith('{') for line in out.splitlines())

# --- responses of every form ---

def test_malformed_responses_are_inspected_and_named(runs):
    out, error, code = runs['scripted']
    assert code == 0, error
    records = {Path(record['path']).stem: record for record in map(json.loads, out.splitlines())}
    assert set(records) == set(RESPONSES)
    for name, (text, _, problem, tokens) in RESPONSES.items():
        record = records[name]; saved = json.loads((runs['folder']/record['map_path']).with_suffix('.json').read_text())
        assert record['well_formed'] == (not problem) and problem in saved['problem'] and saved['response'] == text
        said = [line for line in messages(error) if line.startswith(f'said/{name}.png: ')]
        assert len(said) == bool(problem) and all(problem in line and '; ' in line for line in said)
        if tokens is not None: assert bool(record['tokens']) == tokens
        if not record['tokens']:
            assert not np.load(runs['folder']/record['map_path']).any() and record['map_max_xy'] is record['peak_box'] is None
            assert any('no reasoning tokens' in note for note in saved['notes'])

def test_predicted_normal_keeps_its_map_and_is_flagged(runs):
    record = json.loads((runs['folder']/'out_scripted/empty.json').read_text())
    assert record['answer'] == 'No' and any('predicted normal' in note for note in record['notes'])

def test_tokens_of_a_good_response(runs):
    record = json.loads((runs['folder']/'out_scripted/fine.json').read_text())
    assert ''.join(token['text'] for token in record['tokens']) == record['reasoning'] == 'A crack is at the top.'
    assert any(token['kept'] and token['weight'] > 0 for token in record['tokens'])
    left, top, right, bottom = record['peak_box']; x, y = record['map_max_xy']
    assert 0 <= left <= x < right <= WIDTH and 0 <= top <= y < bottom <= HEIGHT

# --- nothing to inspect, nothing to inspect with ---

def test_only_bad_files_end_with_1(runs):
    out, error, code = runs['bad']
    assert code == 1 and 'Traceback' not in error and len(messages(error)) == len(runs['reasons']) + 1

@pytest.mark.parametrize('name, sentence', [('model', "is of type 'bert', not a Qwen2.5-VL"), ('question', 'none of the anomaly words')])
def test_unusable_model_or_question_is_one_sentence(runs, name, sentence):
    out, error, code = runs[name]
    assert code == 1 and out == '' and len(error.strip().splitlines()) == 1 and sentence in error, error

def quick(*arguments, cwd=None):
    "A run that must end before anything heavy is imported, and does not take long."
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)

@pytest.mark.parametrize('arguments', [[], ['x.png', '--batch-size', '0'], ['x.png', '--batch-size', 'two'], ['x.png', '--no-such-option'], ['x.png', '--temperature', '-1']])
def test_wrong_usage_ends_with_2(arguments): assert quick(*arguments).returncode == 2

def test_paths_without_images_end_with_1(tmp_path):
    (tmp_path/'notes.txt').touch()
    done = quick('.', 'missing', '*.png', cwd=tmp_path)
    assert done.returncode == 1 and len(messages(done.stderr)) == 3 and not (tmp_path/'readl_out').exists()

def test_a_page_of_somebody_else_is_not_overwritten(tmp_path):
    Image.effect_noise((64, 64), 9).save(tmp_path/'a.png'); (tmp_path/'index.html').write_text('my site')
    done = quick('a.png', '--out', '.', cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and (tmp_path/'index.html').read_text() == 'my site'

def test_help_and_mistakes_import_nothing_heavy():
    for arguments in (['--help'], [], ['no/such/file.png']):
        code = ('import sys\nfrom readl_nb.commands import readl_inspect\ntry: readl_inspect(sys.argv[1:])\nexcept SystemExit: pass\n'
                'print([name for name in ("torch", "transformers", "matplotlib", "scipy") if name in sys.modules])')
        assert subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True).stdout.splitlines()[-1] == '[]'

# --- with a reference ---

def test_each_image_beside_the_best_aligned_normal_image_but_never_itself(runs):
    out, error, code = runs['compared']
    assert code == 0, error
    records = {Path(record['path']).stem: record for record in map(json.loads, out.splitlines())}
    assert set(records) == set(BOXES) and 'Traceback' not in error and 'Warning' not in error
    assert {Path(record['reference']).name for record in records.values()} <= {'one.png', 'own.png'} and Path(records['own']['reference']).name == 'one.png'
    for name, (_, boxes, problem) in BOXES.items():
        record = records[name]
        assert list(record) == KEYS + ['reference', 'boxes', 'box_problems'] and [box['bbox_2d'] for box in record['boxes']] == boxes
        assert problem in ' '.join(record['box_problems']) and bool(record['box_problems']) == bool(problem or name == 'odd')
        assert np.load(runs['folder']/record['map_path']).shape == (HEIGHT, WIDTH), 'the map lies over the image, not over the reference'
    said = messages(error)
    assert sum('broken.png' in line and 'no reference' in line for line in said) == 1
    assert all(any(line.startswith(f'bad/{name}: ') for line in said) for name in runs['reasons'])

def test_page_with_references_is_complete_and_escaped(runs):
    folder = runs['folder']/'out_compared'; page = Page((folder/'index.html').read_text(encoding='utf8'))
    assert not page.handlers and 'script' not in page.tags and page.tags.count('article') == len(BOXES) and EVIL in page.text
    pictures = [address for address in page.addresses if address.endswith('.jpg')]
    assert len(pictures) == 3 * len(BOXES) and all((folder/unquote(address)).is_file() for address in page.addresses)
    plain, drawn = (np.asarray(Image.open(folder/'pictures'/f'{name}_image.jpg').convert('RGB')).astype(int) for name in ('normal', 'found'))
    assert (drawn[..., 0] - drawn[..., 1]).max() > 150 > 60 > (plain[..., 0] - plain[..., 1]).max(), 'the box is drawn in red'

@pytest.mark.parametrize('reference, sentence', [('missing', 'no such file'), ('nothing', 'no image in this folder'), ('bad', 'can be read'), ('bad/notes.png', 'not an image')])
def test_references_that_cannot_be_used_are_one_sentence(runs, tmp_path, reference, sentence):
    shutil.copytree(runs['folder']/'bad', tmp_path/'bad'); shutil.copytree(runs['folder']/'nothing', tmp_path/'nothing'); shutil.copy(runs['folder']/'said'/'fine.png', tmp_path)
    if reference == 'bad':
        for name in ('dot.png', 'long.png'): (tmp_path/'bad'/name).write_text('hello')   # only too small or too long for the model
    done = subprocess.run([*COMMAND, 'fine.png', '--reference', reference], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == '' and len(messages(done.stderr)) == 1 and sentence in messages(done.stderr)[0] and 'Traceback' not in done.stderr, done.stderr

def test_a_labelled_folder_gives_only_its_normal_images(tmp_path):
    from readl_nb.commands import references_for
    folder = Path(__file__).parent.parent/'sample_data'/'brick'
    found = references_for(sorted(map(str, folder.glob('test/*/*.jpg'))), str(folder), tmp_path)
    assert len(found) >= 5 and {Path(path).parent.name for path in found} == {'good'}

def test_wrong_sampling_ends_with_2():
    assert quick('x.png', '--min-p', '1').returncode == quick('x.png', '--min-p', '-.1').returncode == 2
