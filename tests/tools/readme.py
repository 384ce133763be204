"""Render README.md from nbs/index.ipynb.

`python tests/tools/readme.py` writes README.md and its pictures, `--check` only says what differs.
Nothing is executed: what the notebook stores is what the README shows, so no Quarto and no model are needed.
"""
import argparse, posixpath, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = 'nbs/index.ipynb'
PICTURES = 'nbs/images'  # with the notebook, so that the site finds them too
LOCAL_LINK = re.compile(r'(?P<before>\]\(|src=")(?![a-z]+:|#|/)(?P<target>[^)"\s]+)')
HIDDEN = re.compile(r'^#\|\s*(hide|default_exp)\b', re.M)
ALTERNATIVE = re.compile(r'^#\|\s*fig-alt:\s*"(.*)"$', re.M)
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)

def from_root(markdown):
    "`markdown` written in nbs/, its links to local files rewritten for a reader at the root."
    return LOCAL_LINK.sub(lambda m: m['before'] + posixpath.normpath(f'nbs/{m["target"]}'), markdown)

def render(root=ROOT):
    "The files README.md is made of: path below `root` -> bytes."
    notebook = nbformat.read(Path(root)/NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not HIDDEN.search(cell.source)]
    pictures = []   # the text of each, in order
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': cell.source = from_root(cell.source)
        else:
            # What is alive on the site (the viewer) is left out: a README runs no scripts.
            cell.outputs = [output for output in cell.outputs if 'text/html' not in output.get('data', {})]
            pictures += [(ALTERNATIVE.findall(cell.source) or ['output of the code above'])[0] for output in cell.outputs if 'image/png' in output.get('data', {})]
            cell.source = DIRECTIVE.sub('', cell.source)
    notebook.metadata['language_info'] = {'name': 'python'}  # cleaned away by nbdev; colours the fences
    text, extras = MarkdownExporter().from_notebook_node(notebook, {'unique_key': 'index', 'output_files_dir': PICTURES})
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M)).strip()
    for words in pictures: text = text.replace('![png](', f'![{words}](', 1)
    head = f'<!-- Rendered from {NOTEBOOK} by tests/tools/readme.py: change it there. -->\n\n'
    return {'README.md': f'{head}{text}\n'.encode(), **extras['outputs']}

def differing(files, root=ROOT):
    "The paths below `root` that lack what `files` says, and pictures of earlier renderings."
    held = lambda path: (Path(root)/path).read_bytes() if (Path(root)/path).is_file() else None
    left = [f'{PICTURES}/{path.name}' for path in (Path(root)/PICTURES).glob('index_*')]
    return [path for path in {**files, **dict.fromkeys(left)} if held(path) != files.get(path)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 when README.md or a picture is out of date')
    check = parser.parse_args().check
    files = render()
    stale = differing(files)
    if check and stale: sys.exit(f'{", ".join(stale)} differ from {NOTEBOOK}: run python tests/tools/readme.py')
    for path in stale:
        (ROOT/path).parent.mkdir(parents=True, exist_ok=True)
        if path in files: (ROOT/path).write_bytes(files[path])
        else: (ROOT/path).unlink()
        print('wrote' if path in files else 'removed', path)

if __name__ == '__main__': main()
