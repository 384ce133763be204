"""Measure the viewer: bytes of a page, first paint, and the time from a click to the picture it changes.

`python tests/tools/measure_viewer.py` prints a table; the pages are saved without a network and opened in headless Chromium.
"""
import statistics, sys, tempfile
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from browser import ROOT, browser, made_up, missing, watched
import numpy as np
from PIL import Image

PHOTO = ROOT/'sample_data/metal/test/contamination/000.jpg'
CLICK = '''number => new Promise(done => { const token = document.querySelector(`button.token[data-token="${number}"]`);
    token.scrollIntoView({block: "center"});
    requestAnimationFrame(() => { const began = performance.now(); token.click(); requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))) }) })'''
SLIDE = '''value => new Promise(done => { const slider = document.querySelector("input[name=tau_t]");
    requestAnimationFrame(() => { const began = performance.now(); slider.value = value; slider.dispatchEvent(new Event("input", {bubbles: true}));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))) }) })'''
PAINT = '() => performance.getEntriesByName("first-contentful-paint")[0]?.startTime'

def measure(window, file, times=20):
    "Bytes; medians in milliseconds of the first paint (5 openings), of a selection and of a move of tau_t (`times` each, to the frame after)."
    with watched(window) as context:
        paints = []
        for _ in range(5):
            page = context.new_page(); page.goto(file.as_uri()); page.wait_for_selector('button.token')
            page.wait_for_function(PAINT); paints.append(page.evaluate(PAINT))
            if len(paints) < 5: page.close()
        count = page.locator('button.token').count()
        clicks = [page.evaluate(CLICK, int(number)) for number in np.linspace(0, count - 1, times)]
        slides = [page.evaluate(SLIDE, str(value)) for value in np.linspace(.05, .9, times)]
    return file.stat().st_size, *map(statistics.median, (paints, clicks, slides))

def main():
    if missing(): sys.exit(missing())
    from readl_nb.viewer import save_page
    image = Image.open(PHOTO).convert('RGB'); mask = np.zeros((image.height, image.width), bool); mask[60:180, 90:240] = True
    print(f'{"page":<28}{"kB":>8}{"first paint, ms":>18}{"selection, ms":>16}{"tau_t, ms":>12}')
    with tempfile.TemporaryDirectory() as folder, browser() as window:
        for tokens, grid in ((200, (15, 15)), (512, (15, 15)), (512, (32, 32)), (2048, (15, 15))):
            words = [f' word{number}' for number in range(tokens)]
            file = Path(save_page(Path(folder)/f'{tokens}.html', made_up(words, grid, image=image), masks=[mask]))
            size, *milliseconds = measure(window, file)
            print(f'{f"{tokens} tokens, {grid[0]}x{grid[1]}":<28}{size/1000:>8.0f}{milliseconds[0]:>18.0f}{milliseconds[1]:>16.1f}{milliseconds[2]:>12.1f}')

if __name__ == '__main__': main()
