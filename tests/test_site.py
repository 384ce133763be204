"""What a reader of the site meets: links, anchors, pictures, and what opens the notebooks elsewhere.

Nothing is rendered (that needs Quarto); what Quarto would read is checked instead."""
import json, os, posixpath, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in PAGES.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(PAGES).parts))
name_of = lambda path: path.relative_to(PAGES).as_posix()
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
FENCE = re.compile(r'^(```|~~~).*?^\1', re.M | re.S)
MARKDOWN_LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)')

def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def text_of(lines): return ''.join(lines)
def is_hidden(cell): return re.search(r'^#\|\s*hide\b', text_of(cell['source']), re.M)

def outputs(path, kind):
    "(cell, what it stores as `kind`) of every output that the site shows."
    for cell in cells(path):
        for output in cell.get('outputs', []):
            if kind in output.get('data', {}) and not is_hidden(cell): yield cell, text_of(output['data'][kind])

def prose(path):
    "The Markdown of a notebook without code: cells and outputs."
    texts = [text_of(cell['source']) for cell in cells(path) if cell['cell_type'] == 'markdown'] + [text for _, text in outputs(path, 'text/markdown')]
    return re.sub(r'(`+)[^`\n]+\1', '', FENCE.sub('', '\n\n'.join(texts)))

def anchor(heading):
    "The identifier that Pandoc, and so Quarto, gives to a heading."
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '').replace('*', '').replace('$', '')
    kept = re.sub(r'[^\w\s.-]', '', plain).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', kept)) or 'section'

def anchors(path):
    "All anchors of a notebook's page; a repeated heading gets a number."
    found = {}
    for cell in cells(path):
        if cell['cell_type'] != 'markdown': continue
        for line in FENCE.sub('', text_of(cell['source'])).splitlines():
            if heading := re.match(r'#{1,6} +(.*)', line):
                name = anchor(heading[1]); found[name] = found.get(name, 0) + 1
    return {name if not n else f'{name}-{n}' for name, times in found.items() for n in range(times)}

class Tags(HTMLParser):
    "Links and pictures of an HTML output."
    def __init__(self, text):
        super().__init__(); self.links, self.images = [], []; self.feed(text)
    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        if tag == 'a' and held.get('href'): self.links.append(held['href'])
        if tag == 'img': self.images.append(held)
    handle_startendtag = handle_starttag

def links(path):
    "Every target that a notebook's prose and outputs link to or show."
    text = prose(path)
    yield from (target for _, _, target in MARKDOWN_LINK.findall(text))
    for html in (text, *(html for _, html in outputs(path, 'text/html'))):
        tags = Tags(html)
        yield from tags.links
        yield from (image.get('src', '') for image in tags.images)

def problem(path, target):
    "Why a link of a notebook leads nowhere on the site, or ''."
    if re.match(r'(https?|mailto|data|blob):', target) or target == '': return ''
    if ':' in target.split('/')[0]: return 'an address that a browser should not open'
    name, _, part = target.partition('#')
    file = path if not name else PAGES/posixpath.normpath(posixpath.join(path.parent.relative_to(PAGES).as_posix(), unquote(name)))
    if posixpath.relpath(file, PAGES).startswith('..'): return 'it leaves nbs/, so the site lacks it: link to the repository instead'
    if not file.is_file(): return 'no such file'
    if part and (file.suffix != '.ipynb' or unquote(part) not in anchors(file)): return f'no such heading; there are {sorted(anchors(file))}'
    return ''

@each_notebook
def test_links_and_anchors_lead_somewhere(path):
    dead = {target: why for target in links(path) if (why := problem(path, target))}
    assert not dead, dead

def test_dead_links_are_found(tmp_path):
    index = PAGES/'index.ipynb'
    assert problem(index, '04_scoring.ipynb#spatial-entropy-does-the-token-look-at-one-place') == '' == problem(index, 'https://example.org/x')
    assert 'no such file' in problem(index, '04_scoringg.ipynb') and 'no such heading' in problem(index, '04_scoring.ipynb#nowhere')
    assert 'leaves nbs/' in problem(index, '../LICENSE') and 'should not' in problem(index, 'javascript:alert(1)')
    assert anchor('`sample_data/`: what\'s in it, 1.5 times') == 'sample_data-whats-in-it-1.5-times' and anchor('### 3. Advantages'[4:]) == 'advantages'
    assert MARKDOWN_LINK.findall('[a [b] c](d.ipynb#e) ![f](g.png "h")') == [('', 'a [b] c', 'd.ipynb#e'), ('!', 'f', 'g.png')]

def alternative(cell):
    "The text that Quarto gives to the pictures of a cell, from its `#| fig-alt:` line."
    found = re.search(r'^#\|\s*fig-alt:(.*)$', text_of(cell['source']), re.M)
    return found and yaml.safe_load(found[1])

@each_notebook
def test_pictures_have_a_text_in_their_place(path):
    kinds = ('image/png', 'image/jpeg', 'image/svg+xml')
    bare = [text_of(cell['source'])[-80:] for kind in kinds for cell, _ in outputs(path, kind) if not isinstance(alternative(cell), str) or len(alternative(cell)) < 15]
    assert not bare, f'no `#| fig-alt: "what the picture shows"` above the code that ends so: {bare}'
    assert all(words for mark, words, _ in MARKDOWN_LINK.findall(prose(path)) if mark), 'a picture in the text needs words: ![what it shows](file)'
    nameless = [text_of(cell['source'])[-80:] for cell, html in outputs(path, 'text/html') for image in Tags(html).images if 'alt' not in image]
    assert not nameless, f'an <img> without alt below the code that ends so: {nameless}'

@each_notebook
def test_figure_texts_stand_where_quarto_reads_them(path):
    for cell in cells(path):
        source = text_of(cell['source'])
        if cell['cell_type'] == 'code' and 'fig-alt:' in source:
            head = re.match(r'(?:(?:#\|.*|%%.*)?\n)*', source)[0]
            assert re.search(r'^#\|\s*fig-alt:', head, re.M), f'`#| fig-alt:` belongs above the first line of code: {source[:80]}'

@each_notebook
def test_frames_say_what_they_are(path):
    for _, html in outputs(path, 'text/html'):
        for frame in re.findall(r'<iframe\b[^>]*', re.sub(r'srcdoc="[^"]*"', '', html)): assert 'title=' in frame, 'an <iframe> without a title'

def test_site_shows_the_viewer_at_work():
    frames = [html for _, html in outputs(PAGES/'index.ipynb', 'text/html') if '<iframe' in html]
    assert len(frames) == 1 and 'srcdoc=' in frames[0] and 'sandbox=' in frames[0] and len(frames[0]) < 600_000

def test_launcher_links_to_every_notebook():
    direct = {target.split('#')[0] for target in links(PAGES/'index.ipynb')}
    assert not [name_of(path) for path in NOTEBOOKS if name_of(path) not in {*direct, 'index.ipynb'}], 'nbs/index.ipynb is the page from which everything is reached'

def test_jupyterlab_opens_the_launcher_in_a_checkout_only(tmp_path):
    "A real server is started twice; what it prints is the page that it would open."
    (tmp_path/'config').mkdir(); (tmp_path/'elsewhere').mkdir()
    settings = {'ServerApp': {'jpserver_extensions': {'readl_nb.launcher': True}}}
    (tmp_path/'config/jupyter_server_config.json').write_text(json.dumps(settings), encoding='utf-8')
    places = {f'JUPYTER_{name}_DIR': str(tmp_path/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    for folder, page in ((ROOT, '/lab/tree/nbs/index.ipynb?'), (tmp_path/'elsewhere', '/lab?')):
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0', '--ServerApp.open_browser=False']
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **places}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try: told = next((line for line in server.stdout if 'token=' in line), '')
        finally: server.terminate(); server.communicate(timeout=60)
        assert page in told, told

def test_devcontainer_opens_the_launcher():
    container = json.loads((ROOT/'.devcontainer/devcontainer.json').read_text(encoding='utf-8'))
    assert '3.11' in container['image'] and '-c constraints.txt' in container['postCreateCommand'] and 'readl_nb.launcher' in container['postCreateCommand']
    assert all((ROOT/name).is_file() for name in container['customizations']['codespaces']['openFiles'])

@pytest.mark.parametrize('name', ['site', 'tests'])
def test_workflows_are_pinned_and_ask_for_little(name):
    flow = yaml.safe_load((ROOT/f'.github/workflows/{name}.yml').read_text(encoding='utf-8'))
    steps = [step for job in flow['jobs'].values() for step in job['steps']]
    assert all(re.search(r'@[0-9a-f]{40}$', step['uses']) for step in steps if 'uses' in step), 'an action is pinned by its full commit'
    assert flow['permissions'] == {'contents': 'read'} and all('timeout-minutes' in job for job in flow['jobs'].values())
    runs = '\n'.join(step.get('run', '') for step in steps)
    assert ('nbdev_docs' in runs) if name == 'site' else ('.ci/run' in runs)
    if name == 'site': assert any('quarto' in step.get('uses', '') and re.fullmatch(r'[\d.]+', step['with']['version']) for step in steps)
