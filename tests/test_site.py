"""What a reader of the site meets: links, anchors, pictures, and what opens the notebooks elsewhere.

Nothing is rendered (that needs Quarto); what Quarto would read is checked instead."""
import json, os, posixpath, re, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import nbformat, pytest, yaml
from nbclient import NotebookClient

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

def documented_start():
    "The two commands under `Open it` on the start page, as words."
    text = next(text_of(cell['source']) for cell in cells(PAGES/'index.ipynb') if text_of(cell['source']).startswith('## Open it'))
    return [line.split('#')[0].split() for line in re.search(r'^```bash\n(.*?)^```$', text, re.M | re.S)[1].splitlines()]

def test_jupyterlab_opens_the_launcher_in_a_checkout_only(tmp_path):
    "A real server is started twice; what it prints is the page that it would open."
    (tmp_path/'config').mkdir(); (tmp_path/'elsewhere').mkdir()
    places = {f'JUPYTER_{name}_DIR': str(tmp_path/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    enable, start = documented_start()
    assert enable == ['python', '-m', 'readl_nb.launcher'] and start == ['jupyter', 'lab']
    subprocess.run([sys.executable, *enable[1:], tmp_path/'config'], check=True, timeout=120)   # not into the environment of the tests
    for folder, page in ((ROOT, '/lab/tree/nbs/index.ipynb?'), (tmp_path/'elsewhere', '/lab?')):
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0', '--ServerApp.open_browser=False']
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **places}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        limit = threading.Timer(120, server.kill); limit.start()   # reading ends with the server, whatever it prints
        try: told = next((line for line in server.stdout if 'token=' in line), '')
        finally: limit.cancel(); server.terminate(); server.communicate(timeout=60)
        assert page in told, told or 'JupyterLab ended, or printed no address within two minutes'

TUTORIALS = [path for path in NOTEBOOKS if path.parent.name == 'tutorials']

@pytest.mark.parametrize('path', TUTORIALS, ids=name_of)
def test_tutorials_keep_their_form(path):
    source = [text_of(cell['source']) for cell in cells(path)]
    kind = [cell['cell_type'] for cell in cells(path)]
    text = '\n\n'.join(words for words, of in zip(source, kind) if of == 'markdown')
    badge = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/readl-nb/readl_nb/blob/main/nbs/{name_of(path)})'
    assert badge in source[1], 'the second cell has a badge that opens this very notebook in Colab'
    headings = re.findall(r'^## +(.*)', FENCE.sub('', text), re.M)
    assert headings[0] == 'The question' and headings[-1] == 'Remember', f'the question first, what to remember last: {headings}'
    assert len(re.findall(r'^\*\*Predict', text, re.M)) >= 2, 'at least two predictions'
    numbers = [int(number) for number in re.findall(r'^### Exercise (\d+)', text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and 3 <= len(numbers) <= 5, f'three to five exercises, numbered: {numbers}'
    for number, here in zip(numbers, [n for n, words in enumerate(source) if kind[n] == 'markdown' and re.search(r'^### Exercise', words, re.M)], strict=True):
        ends = next((n for n in range(here + 1, len(source)) if kind[n] == 'markdown'), len(source))
        code = range(here + 1, ends)
        solved = [n for n in code if '#| code-summary: "Solution"' in source[n]]
        asked = [n for n in code if re.search(rf'^(answer_{number} =|    return) \.\.\. *(#.*)?$', source[n], re.M) and n not in solved]
        checked = [n for n in code if re.search(r'^check\(', source[n], re.M) and n not in solved]
        assert len(asked) == len(checked) == len(solved) == 1 and asked < checked < solved, f'exercise {number}: a cell in which ... waits to be replaced, a cell that ends in check(...), a solution, in this order'
        solution = cells(path)[solved[0]]
        assert solution['metadata'].get('jupyter', {}).get('source_hidden') is True and '#| code-fold: true' in source[solved[0]], f'exercise {number}: the solution is hidden in JupyterLab and folded on the site'
        assert re.search(r'^\s*assert check\(.*\.right', source[solved[0]], re.M | re.S), f'exercise {number}: the solution is not checked'

@pytest.mark.parametrize('path', sorted((PAGES/'pages').glob('*.ipynb')), ids=name_of)
def test_pages_store_what_they_say_now(path):
    "The site shows stored outputs; the tables of a page are made from the code and from other notebooks, which change."
    shown = lambda page: [[output.get('text') or output['data'].get('text/markdown') for output in cell.outputs if output.output_type != 'display_data' or 'text/markdown' in output.data]
                          for cell in page.cells if cell.cell_type == 'code']
    stored, now = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    if not any(shown(stored)): return   # no code, nothing to go stale
    NotebookClient(now, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    assert shown(stored) == shown(now), f'run {name_of(path)} again and save it'

def test_devcontainer_opens_the_launcher():
    container = json.loads((ROOT/'.devcontainer/devcontainer.json').read_text(encoding='utf-8'))
    assert '3.11' in container['image'] and '-c constraints.txt' in container['postCreateCommand'] and ' '.join(documented_start()[0]) in container['postCreateCommand']
    assert all((ROOT/name).is_file() for name in container['customizations']['codespaces']['openFiles'])

@pytest.mark.parametrize('name', ['site', 'tests'])
def test_workflows_are_pinned_and_ask_for_little(name):
    flow = yaml.safe_load((ROOT/f'.github/workflows/{name}.yml').read_text(encoding='utf-8'))
    steps = [step for job in flow['jobs'].values() for step in job['steps']]
    assert all(re.search(r'@[0-9a-f]{40}$', step['uses']) for step in steps if 'uses' in step), 'an action is pinned by its full commit'
    if name == 'site': assert flow['concurrency']['cancel-in-progress'] == "${{ github.event_name == 'pull_request' }}", 'a publication that has begun is let finish'
    assert flow['permissions'] == {'contents': 'read'} and all('timeout-minutes' in job for job in flow['jobs'].values())
    runs = '\n'.join(step.get('run', '') for step in steps)
    assert ('nbdev_docs' in runs) if name == 'site' else ('.ci/run' in runs)
    if name == 'site': assert any('quarto' in step.get('uses', '') and re.fullmatch(r'[\d.]+', step['with']['version']) for step in steps)
