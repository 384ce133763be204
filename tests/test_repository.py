"What has to hold for the repository as a whole: notebooks, exported package, README, site, commands."
import ast, configparser, json, os, re, stat, subprocess, sys, zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest, yaml
sys.path.insert(0, str(Path(__file__).parent/'tools'))
import readme

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT/'readl_nb').glob('*.py'))
MODULES = [path for path in PACKAGE if not path.name.startswith('_')]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))
name_of = lambda path: path.relative_to(ROOT).as_posix()
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
each_module = pytest.mark.parametrize('path', MODULES, ids=name_of)

settings = configparser.ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

def cells(path, kind=None):
    "The sources of the notebook's cells, of one `kind` or all."
    return [''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if kind in (None, cell['cell_type'])]

def exports(path):
    "The notebook's sources that end up in the package."
    return [source for source in cells(path, 'code') if re.search(r'^#\|\s*exports?\b', source, re.M)]

def module_of(path):
    "The module a notebook exports to, or None."
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells(path, 'code')), re.M)
    return found and found[1]

def imports(source):
    "The dotted names that `source` imports anywhere, also inside functions."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level: yield from (f'readl_nb.{node.module or alias.name}' for alias in node.names)
            elif node.module == 'readl_nb': yield from (f'readl_nb.{alias.name}' for alias in node.names)
            else: yield node.module

def run(*command, cwd=ROOT, **environment):
    "Runs a command; the test fails with what it printed when it fails."
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f'{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout

def nbdev(tool, *arguments, cwd, **environment):
    "Runs an nbdev command of the running Python's environment on the checkout `cwd`."
    return run(Path(sys.executable).parent/tool, *arguments, cwd=cwd, PYTHONPATH=str(cwd), **environment)

def contents(folder, names):
    "name -> bytes of the files `names` below `folder`, None where there is none."
    return {name.as_posix(): (folder/name).read_bytes() if (folder/name).is_file() else None for name in names}

def changed(before, after): return [name for name in before if before[name] != after.get(name)]

# --- notebooks ---

@each_notebook
def test_notebook_opens_with_module_title_and_purpose(path):
    head, sources = cells(path)[:4], cells(path)
    if path.parent.name == 'ablations': assert sources[0].startswith('# Parameters'), 'an ablation begins with its parameters'
    elif path.parent.name != 'nbs': assert not module_of(path) and sources[0].startswith('# '), 'tutorials and pages begin with their title and export nothing'
    elif path.name != 'index.ipynb': assert sources[0].startswith('#| default_exp '), 'the first cell names the module: #| default_exp NAME'
    assert any(re.match(r'# [^\s#]', source) for source in head), 'no `# Title` within the first four cells'
    purposes = [line for source in head for line in source.splitlines() if line.startswith('> ')]
    assert len(purposes) == 1, 'one line that starts with `> ` and states the purpose belongs within the first four cells'

@each_notebook
def test_notebook_stores_outputs_but_no_errors(path):
    code = [cell for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
    errors = [number for number, cell in enumerate(code) if any(o['output_type'] == 'error' for o in cell['outputs'])]
    assert not errors, f'code cells {errors} store an error'
    assert not code or any(cell['outputs'] for cell in code), 'no cell stores an output: run it top to bottom and save'

@each_notebook
def test_notebook_export_cells_are_short_and_tested(path):
    longest = max((len(source.splitlines()) for source in exports(path)), default=0)
    assert longest <= 45, f'an export cell has {longest} lines: longer than a screen is two ideas'
    lessons = [source for source in cells(path, 'code') if source not in exports(path)]
    assert not exports(path) or any(re.search(r'\b(assert|test_\w+|raises)\b', source) for source in lessons), 'it exports and tests nothing'

def test_notebooks_import_only_from_smaller_numbers():
    order = {module_of(path): path.name for path in NOTEBOOKS if module_of(path)}  # names sort by their number, `benchmarks` last
    for path in NOTEBOOKS:
        used = {name.split('.')[1] for source in exports(path) for name in imports(re.sub(r'^[%!].*$', '', source, flags=re.M))
                if name.startswith('readl_nb.')}
        backward = [name for name in used if name in order and order[name] >= path.name]
        assert not backward, f'{path.name} imports {backward}, which come later'
        assert used <= {*order, '_modidx'}, f'{path.name} imports {used - {*order}}, which no notebook exports'

def test_pictures_in_notebooks_are_small():
    sizes = {name_of(path): path.stat().st_size for path in (ROOT/'nbs').rglob('images/*') if path.is_file()}
    for path in NOTEBOOKS:
        outputs = [output for cell in json.loads(path.read_text(encoding='utf-8'))['cells'] for output in cell.get('outputs', [])]
        for kind in ('image/png', 'image/jpeg'):
            sizes |= {f'{name_of(path)}, output {n}': len(''.join(output['data'][kind])) * 3 // 4 for n, output in enumerate(outputs) if kind in output.get('data', {})}
    large = {name: size for name, size in sizes.items() if size >= 250_000}
    assert len(sizes) > 40 and not large, f'pictures of 250 kB and more: {large}'

# --- the package is what the notebooks say ---

def test_package_is_exactly_what_the_notebooks_export(checkout, tracked):
    names = [name for name in tracked if name.parts[0] in ('readl_nb', 'pyproject.toml')]
    before = contents(checkout, names)
    for name in names:
        if name.suffix == '.py' and name.name != '__init__.py': (checkout/name).unlink()
    nbdev('nbdev_export', cwd=checkout)
    assert not changed(before, contents(checkout, names)), 'run nbdev_export, and change notebooks instead of readl_nb/*.py'
    new = [path.name for path in (checkout/'readl_nb').glob('*.py') if path.relative_to(checkout) not in names]
    assert not new, f'{new} are exported but not in the repository: run nbdev_export'

def test_notebooks_are_clean(checkout):
    names = [path.relative_to(ROOT) for path in NOTEBOOKS]
    before = contents(checkout, names)
    nbdev('nbdev_clean', cwd=checkout)
    assert not changed(before, contents(checkout, names)), 'run nbdev_clean'

def test_hooks_find_what_they_would_write(checkout, tmp_path):
    run('git', 'init', '-q', cwd=checkout)
    before = contents(checkout, [Path('.gitattributes')])
    nbdev('nbdev_install_hooks', cwd=checkout, HOME=str(tmp_path))
    assert not changed(before, contents(checkout, [Path('.gitattributes')]))
    assert run('git', 'check-attr', 'merge', 'nbs/index.ipynb', cwd=checkout).strip().endswith('nbdev-merge')

@each_module
def test_module_imports_only_what_the_settings_require(path):
    canonical = lambda name: re.sub(r'[-_.]+', '-', name).lower()
    names = lambda lines: {canonical(re.split(r'[<>=!~\[; ]', line)[0]) for line in lines.split()}
    required = names(settings['requirements'])
    optional = set().union(*(names(lines) for extra, lines in settings.items() if extra.endswith('_requirements') and not extra.startswith('dev')))
    known = packages_distributions()
    for name in {name.split('.')[0] for name in imports(path.read_text(encoding='utf-8'))} - set(sys.stdlib_module_names) - {'readl_nb', '__future__'}:
        distributions = {canonical(found) for found in known.get(name, [name])}
        # IPython's display functions come with ipywidgets and jupyterlab.
        assert distributions & (required | optional | {'ipython'}), f'{path.name} imports {name}, which settings.ini does not require'

@each_module
def test_module_reads_weights_as_safetensors_only_and_runs_no_foreign_code(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword): assert node.arg != 'trust_remote_code', f'{path.name} uses trust_remote_code'
        if not isinstance(node, ast.Call): continue
        called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == 'torch.load': assert given.get('weights_only') == 'True', f'{path.name}:{node.lineno} loads a pickle without weights_only=True'
        if called in ('np.load', 'numpy.load'): assert given.get('allow_pickle', 'False') == 'False', f'{path.name}:{node.lineno} allows pickles'
        assert called not in ('eval', 'exec'), f'{path.name}:{node.lineno} calls {called}'
    pickles = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}
    assert not pickles & {name.split('.')[0] for name in imports(path.read_text(encoding='utf-8'))}, f'{path.name} imports a pickle library'

# --- README ---

def test_readme_is_what_index_renders():
    stale = readme.differing(readme.render())
    assert not stale, f'{stale} differ from nbs/index.ipynb: run python tests/tools/readme.py'

def test_readme_has_both_commands_and_ci_takes_them_from_there():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    found = dict(re.findall(r'^<!-- command: (\w+) -->\n```bash\n(.*?)^```$', text, re.M | re.S))
    assert list(found) == ['run', 'test']
    assert 'readl_inspect sample_data' in found['run'] and 'nbdev_test' in found['test'] and 'pytest tests' in found['test']
    script = ROOT/'.ci/run'
    run('bash', '-n', script)
    assert script.stat().st_mode & stat.S_IXUSR, '.ci/run is not executable'
    assert not re.search(r'readl_inspect|nbdev_test|pytest tests|pip install', script.read_text()), '.ci/run repeats a command instead of reading it'

def test_readme_has_no_number_left_to_fill():
    assert 'TODO' not in (ROOT/'README.md').read_text(encoding='utf-8')

def test_readme_shows_the_numbers_that_the_pretraining_notebook_measured():
    cells_of = json.loads((ROOT/'nbs/13_pretraining.ipynb').read_text(encoding='utf-8'))['cells']
    printed = next(''.join(output['text']) for cell in cells_of if 'samples = evaluation_samples()' in ''.join(cell['source']) for output in cell['outputs'])
    measured = {name.strip(): float(value) for name, value in re.findall(r'^(\S.*?) {2,}([\d.]+)$', printed, re.M)}
    row = re.search(r'^\| 100 % \|(.*)\|$', (ROOT/'README.md').read_text(encoding='utf-8'), re.M)
    assert measured['well formed'] == 1, 'the README says that every response is well formed'
    assert [float(value) for value in row[1].split('|')] == [measured[name] for name in ('balanced accuracy', 'kind named', 'place named', 'pixel AUROC')]

def local_links(text, folder):
    "The local files that Markdown `text`, read in `folder`, points to."
    text = re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.M | re.S)
    text = re.sub(r'`[^`\n]*`', '', text)
    for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
        target = next(filter(None, target)).split('#')[0]
        if target and not re.match(r'[a-z]+:', target): yield folder/target

@pytest.mark.parametrize('path', [ROOT/'README.md', *NOTEBOOKS], ids=name_of)
def test_local_links_lead_somewhere(path):
    text = path.read_text(encoding='utf-8') if path.suffix == '.md' else '\n\n'.join(cells(path, 'markdown'))
    missing = [str(link) for link in local_links(text, path.parent) if not link.exists()]
    assert not missing, f'{path.name} links to {missing}'

def test_readme_lists_every_notebook():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    missing = [path.name for path in NOTEBOOKS if path.name != 'index.ipynb' and f'({name_of(path)})' not in text]
    assert not missing, f'the table of notebooks in nbs/index.ipynb lacks {missing}'

# --- the site ---

def test_site_settings():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml'
    site = yaml.safe_load(link.read_text(encoding='utf-8'))
    assert site['metadata-files'] == ['nbdev.yml', 'sidebar.yml'] and site['execute'] == {'enabled': False}
    assert all((ROOT/'nbs'/name).is_file() for name in [*site['metadata-files'], site['format']['html']['css']])
    assert all((ROOT/'nbs'/entry['href']).is_file() for entry in site['website']['navbar']['left']), 'the bar at the top leads to a page that is not there'
    assert 'custom_quarto_yml' not in settings, 'nbdev would delete the link'

def test_sidebar_lists_every_notebook():
    def flat(entries):
        for entry in entries:
            if isinstance(entry, str): yield entry
            else:
                if 'href' in entry: yield entry['href']
                yield from flat(entry.get('contents', []))
    sidebar = yaml.safe_load((ROOT/'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert sorted(flat(sidebar)) == sorted(path.relative_to(ROOT/'nbs').as_posix() for path in NOTEBOOKS), 'edit nbs/sidebar.yml'

def test_site_is_processed_and_settings_stay_as_they_are(checkout, tracked, tmp_path):
    quarto = tmp_path/'quarto'  # nbdev asks only whether there is one; the pages themselves need a real Quarto
    quarto.write_text('#!/bin/sh\nexit 0\n')
    quarto.chmod(0o755)
    names = [name for name in tracked if name.suffix in ('.yml', '.py')]
    before = contents(checkout, names)
    nbdev('nbdev_proc_nbs', '--n_workers', '2', cwd=checkout, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert not changed(before, contents(checkout, names))
    made = {path.relative_to(checkout/'_proc').as_posix() for path in (checkout/'_proc').rglob('*.ipynb')}
    assert made == {path.relative_to(ROOT/'nbs').as_posix() for path in NOTEBOOKS}
    assert yaml.safe_load((checkout/'_proc/_quarto.yml').read_text()) == yaml.safe_load((ROOT/'_quarto.yml').read_text())

# --- installing ---

def test_commands_answer_help_without_heavy_imports():
    for command in settings['console_scripts'].split():
        name, module, function = re.fullmatch(r'(\w+)=([\w.]+):(\w+)', command).groups()
        code = (f'import sys; from {module} import {function}; sys.argv = [{name!r}, "--help"]\n'
                f'try: {function}()\nexcept SystemExit as end: assert not end.code, end.code\n'
                'heavy = {"torch", "transformers", "matplotlib", "numpy", "PIL", "scipy", "skimage"} & set(sys.modules)\nassert not heavy, heavy')
        assert f'usage: {name}' in run(sys.executable, '-c', code)

def test_wheel_holds_the_package_and_the_model(checkout, tracked, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path, '.', cwd=checkout)
    held = set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())
    wanted = {name.as_posix() for name in tracked if name.parts[0] == 'readl_nb'}
    assert wanted <= held, f'the wheel lacks {wanted - held}: see package_data in settings.ini'
    assert 'readl_nb/readl_tiny/model.safetensors' in held, 'the wheel carries no readl-tiny'
    assert not [name for name in held if name.startswith(('tests/', 'nbs/', 'sample_data/'))]

def test_constraints_satisfy_the_requirements():
    from packaging.requirements import Requirement
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    pins = [Requirement(line.split('#')[0]) for line in lines if line.split('#')[0].strip()]
    pins = {pin.name: pin.specifier for pin in pins if pin.marker is None or pin.marker.evaluate()}
    for line in settings['requirements'].split() + settings['dev_requirements'].split():
        wanted = Requirement(line)
        if wanted.name not in pins: continue
        version = next(iter(pins[wanted.name])).version
        assert wanted.specifier.contains(version), f'{wanted} excludes {wanted.name} {version} of constraints.txt'
    assert 'torchvision' not in pins and 'torch' in pins

def test_no_file_is_too_large(tracked):
    large = [f'{name} ({(ROOT/name).stat().st_size >> 20} MiB)' for name in tracked if (ROOT/name).stat().st_size > 16_000_000]
    assert not large, f'{large} are over 16 MB'
