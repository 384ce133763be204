"What the browser tests and measure_viewer.py share: Chromium, pages that may not reach the network, JupyterLab, axe-core, made-up inspections."
import base64, hashlib, json, os, shutil, socket, subprocess, sys, tarfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
AXE = '4.14.1'   # and the sha256 of its axe.min.js, so that a changed package is noticed
AXE_SHA256 = '29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c'
ARGUMENTS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']   # no sandbox and little shared memory: root, in a container

def chromium(): return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

def missing():
    "One sentence when there is no browser to drive, else ''."
    if not chromium(): return 'no Chromium: install it (Debian: apt-get install chromium) to run the browser tests'
    try: import playwright.sync_api
    except ImportError: return 'no playwright: install the extra `dev` to run the browser tests'
    return ''

def axe_source():
    "axe-core as one script, from npm, kept outside the checkout.\n\nRaises `RuntimeError`, one sentence, when it cannot be had."
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'readl_nb'
    file = folder/f'axe-core-{AXE}.min.js'
    if not file.is_file():
        if not shutil.which('npm'): raise RuntimeError('no npm: install it (Debian: apt-get install npm) to check accessibility')
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(['npm', 'pack', f'axe-core@{AXE}', '--silent', '--pack-destination', folder], cwd=folder, capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f'npm gave no axe-core {AXE}: {" ".join(done.stderr.split())[:300]}')
        with tarfile.open(folder/f'axe-core-{AXE}.tgz') as package: source = package.extractfile('package/axe.min.js').read()
        file.with_suffix('.part').write_bytes(source); file.with_suffix('.part').replace(file); (folder/f'axe-core-{AXE}.tgz').unlink()
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != AXE_SHA256: raise RuntimeError(f'{file} is not axe-core {AXE}: delete it and run again')
    return file.read_text(encoding='utf8')

# --- pages ---

@contextmanager
def browser():
    "Chromium, headless."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as started:
        window = started.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try: yield window
        finally: window.close()

@contextmanager
def watched(window, local=None, width=1280, height=900, scheme='light', scripts=(), harmless=(), **options):
    """A context whose pages may ask for nothing but files, data and blobs (or `local`, the address of a server here); on leaving, what went wrong fails.

    Dialogs, uncaught errors, console errors and violations of the page's own policy are wrong; messages that hold a text of `harmless` are not."""
    context = window.new_context(viewport=dict(width=width, height=height), color_scheme=scheme, accept_downloads=True, reduced_motion='reduce', **options)
    context.set_default_timeout(20_000)
    if local is None: context.set_offline(True)
    for script in scripts: context.add_init_script(script)
    wrong = []
    def asked(request):
        fine = request.url.startswith(('file:', 'data:', 'blob:', 'about:')) or (local and request.url.startswith((local, local.replace('http:', 'ws:'))))
        if not fine: wrong.append(f'request of {request.url[:200]}')
    def note(text): wrong.append(text[:1500]) if not any(each in text for each in harmless) else None
    def dialog(each): wrong.append(f'dialog: {each.message}'); each.dismiss()
    context.on('request', asked); context.on('dialog', dialog)
    context.on('console', lambda message: note(f'console: {message.text}') if message.type == 'error' else None)
    context.on('weberror', lambda error: note(f'error: {error.error} {error.error.stack or ""}'))
    try:
        context.wrong = wrong   # a test may look at it earlier
        yield context
        assert not wrong, '\n'.join(wrong)
    finally: context.close()

def violations(page, region='.readl-viewer'):
    "What axe-core finds below `region`, a line each; axe itself comes with `watched(scripts=[axe_source()])`."
    found = page.evaluate('region => axe.run(region, {resultTypes: ["violations"]})', region)['violations']
    return [f"{each['id']} ({each['impact']}): {each['help']}: " + ' | '.join(f"{node['html'][:160]} {node['failureSummary'][:240]}" for node in each['nodes'][:3]) for each in found]

def slide(page, name, value):
    "Moves the slider `name` to `value`, as dragging does."
    page.locator(f'.readl-viewer input[type=range][name={name}]').first.evaluate(
        '(input, value) => { input.value = value; for (const kind of ["input", "change"]) input.dispatchEvent(new Event(kind, {bubbles: true})) }', str(value))

def picture(page, view=0):
    "What the stage of a view shows, as a PNG: screenshot of the image area."
    return page.locator(f'section.view[data-view="{view}"] .stage').screenshot()

# --- JupyterLab ---

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@contextmanager
def jupyterlab(folder, seconds=180):
    "Address, token and process of a JupyterLab of its own in `folder` (settings, kernels and sessions below it too), ended with its kernels."
    folder, port, token = Path(folder), free_port(), os.urandom(12).hex()
    settings = folder/'settings'/'@jupyterlab'
    for name, content in {'notebook-extension/tracker': dict(windowingMode='none'),   # cells out of sight stay in the page
                          'apputils-extension/notification': dict(checkForUpdates=False, fetchNews='false')}.items():
        (settings/name).parent.mkdir(parents=True, exist_ok=True)
        (settings/f'{name}.jupyterlab-settings').write_text(json.dumps(content))
    own = {f'JUPYTER_{name}_DIR': str(folder/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')} | dict(
        JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'), IPYTHONDIR=str(folder/'ipython'),
        PYTHONPATH=str(ROOT), JUPYTER_PREFER_ENV_PATH='1', JUPYTER_PLATFORM_DIRS='1')
    (folder/'work').mkdir(exist_ok=True)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder/"work"}', '--LabApp.expose_app_in_browser=True']
    with open(folder/'jupyterlab.txt', 'wb') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | own, cwd=folder)
    address, end = f'http://127.0.0.1:{port}', time.monotonic() + seconds
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            said = (folder/'jupyterlab.txt').read_text(errors='replace')[-3000:]
            assert process.poll() is None and time.monotonic() < end, f'JupyterLab did not start:\n{said}'
            try: direct.open(f'{address}/api/status?token={token}', timeout=10).close(); break
            except OSError: time.sleep(.2)
        yield address, token
    finally:
        process.terminate()   # it ends its kernels
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill(); process.wait()

class Notebook:
    "A notebook open in JupyterLab: its cells can be run, and what they show be asked."
    def __init__(self, page, address, token, name):
        self.page = page
        page.goto(f'{address}/lab/tree/{name}?token={token}&reset')
        page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
        page.wait_for_function('() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === "idle"', timeout=120_000)

    def cell(self, number): return self.page.locator('.jp-Notebook .jp-Cell').nth(number)
    def output(self, number): return self.cell(number).locator('.jp-Cell-outputArea')

    def run(self, number, timeout=120):
        "Runs the cell as Ctrl+Enter does and waits for its end; the text of its output. An error in the cell fails."
        self.page.evaluate('''async number => { const panel = window.jupyterapp.shell.currentWidget;
            panel.content.activeCellIndex = number; panel.content.deselectAll();
            await window.jupyterapp.commands.execute('notebook:run-cell') }''', number)
        self.page.wait_for_function('''number => { const panel = window.jupyterapp.shell.currentWidget;
            return panel.content.widgets[number].model.executionCount !== null && panel.sessionContext.session.kernel.status === 'idle' }''', arg=number, timeout=timeout * 1000)
        outputs = self.page.evaluate('number => window.jupyterapp.shell.currentWidget.content.widgets[number].model.outputs.toJSON()', number)
        errors = [f"{each['ename']}: {each['evalue']}" for each in outputs if each['output_type'] == 'error']
        assert not errors, f'cell {number}: {errors}'
        return ''.join(''.join(each.get('text', '')) for each in outputs if each['output_type'] == 'stream' and each['name'] == 'stdout')

def write_notebook(file, *sources):
    "A notebook of the code cells `sources`."
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id=f'cell{number}') for number, source in enumerate(sources)],
                                        metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    nbformat.write(notebook, file)

# --- made-up inspections ---

def made_up(tokens, grid=(15, 15), size=(300, 300), seed=0, image=None, config=None, log_odds=2.5):
    "An `Inspection` of a made-up response: `tokens` are its texts in order (strange ones too), maps and relevance are random, with a peak each."
    import torch
    from PIL import Image
    from readl_nb.attention import TokenAttention
    from readl_nb.inspection import ReALConfig, assemble
    from readl_nb.models import Response
    made, (H, W), T = np.random.default_rng(seed), grid, len(tokens)
    maps = made.gamma(.4, 1, (T, H, W))
    maps[np.arange(T), made.integers(H, size=T), made.integers(W, size=T)] += 12
    maps *= made.uniform(.02, .3, (T, 1, 1)) / maps.sum((1, 2), keepdims=True)
    starts = np.cumsum([len('<think>'), *map(len, tokens)])
    text = '<think>' + ''.join(tokens) + '</think><answer>Yes</answer>'
    attention = TokenAttention(tokens=list(tokens), spans=[(int(a), int(b)) for a, b in zip(starts, starts[1:])], token_ids=list(range(T)),
        maps=torch.from_numpy(maps.astype(np.float32)), relevance_to=[' defect', ' anomaly'], text=torch.from_numpy(made.beta(1, 40, (T, 2)).astype(np.float32)),
        flagged=[not any(letter.isalnum() for letter in token) for token in tokens])
    if image is None: image = Image.fromarray(made.integers(90, 160, (size[1]//4 + 1, size[0]//4 + 1, 3), dtype=np.uint8)).resize(size)
    return assemble('made-up.png', image, Response(text, tuple(range(T)), log_odds), attention, config or ReALConfig())
