"Viewer and dashboards as their users meet them: a real JupyterLab and saved pages without a network, in headless Chromium, with mouse, keyboard and axe-core."
import base64, json, os, re, sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label
from sklearn.metrics import roc_auc_score
sys.path.insert(0, str(Path(__file__).parent/'tools'))
from browser import Notebook, axe_source, browser, jupyterlab, made_up, missing, picture, slide, violations, watched, write_notebook

REQUIRED = os.environ.get('READL_REQUIRE_BROWSER') == '1'   # set in CI, where no browser is a failure
if missing() and not REQUIRED: pytest.skip(missing(), allow_module_level=True)

from playwright.sync_api import expect
from readl_nb.aggregation import anomaly_map, to_pixels, token_weights
from readl_nb.boxes import Box, iou_matrix, mask_boxes, match
from readl_nb.datasets import read_mask
from readl_nb.inspection import ReALConfig, inspect_image
from readl_nb.models import load_vlm
from readl_nb.scoring import foreground, normalise, spatial_entropy, threshold
from readl_nb.viewer import TokenViewer, capture_heads, save_page
from readl_nb.viewer_page import shares_of, view_of

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT/'sample_data/metal/test/contamination/000.jpg'
MASK = ROOT/'sample_data/metal/ground_truth/contamination/000_mask.png'

@pytest.fixture(scope='module')
def window():
    assert not missing(), missing()
    with browser() as started: yield started

@pytest.fixture(scope='module')
def axe():
    try: return axe_source()
    except RuntimeError as error:
        if REQUIRED: raise
        pytest.skip(str(error))

@pytest.fixture(scope='module')
def inspection(): return inspect_image(PHOTO)

@pytest.fixture(scope='module')
def mask(inspection): return read_mask([str(MASK)], inspection.image.size)

@pytest.fixture(scope='module')
def file(inspection, mask, tmp_path_factory): return Path(save_page(tmp_path_factory.mktemp('pages')/'one.html', inspection, masks=[mask]))

@contextmanager
def opened(window, file, fragment='', **options):
    "The saved page in a context of its own without a network; on leaving, any error, dialog or request fails."
    with watched(window, **options) as context:
        page = context.new_page()
        page.goto(Path(file).as_uri() + fragment)
        page.wait_for_selector('.readl-viewer section.view button.token')
        yield page

# --- what a test does with a page ---

# `page` is a page, a frame of it, or the cell of a notebook in it

SETTLED = '() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))'
SAVED = '() => new Promise(done => setTimeout(done, 200))'   # the viewer reports its state when nothing moved for 100 ms; timers of a page keep their order
def settled(page): getattr(page, 'page', page).evaluate(SETTLED)
def state(page): page.evaluate(SAVED); return page.evaluate('() => globalThis.readlModel.get("state")')
def token(page, number, view=0): return page.locator(f'section.view[data-view="{view}"] button.token[data-token="{number}"]')
def pressed(page, view=0):
    settled(page)
    return page.locator(f'section.view[data-view="{view}"] button.token[aria-pressed="true"]').evaluate_all('all => all.map(each => Number(each.dataset.token))')
def measured(page, name, view=0):
    settled(page)
    return float(page.locator(f'section.view[data-view="{view}"] .measures [data-measure={name}]').first.text_content().replace('\u2212', '-').split()[0])
def looking(page, view=0):
    settled(page)
    return set(page.locator(f'section.view[data-view="{view}"] button.token.looks-here').evaluate_all('all => all.map(each => Number(each.dataset.token))'))
def more(page): page.locator('details.more').first.evaluate('details => { details.open = true }')
def click_cell(page, row, column, grid, view=0):
    stage = page.locator(f'section.view[data-view="{view}"] .stage'); stage.scroll_into_view_if_needed(); box = stage.bounding_box()
    stage.click(position=dict(x=(column + .5) / grid[1] * box['width'], y=(row + .5) / grid[0] * box['height']))

# --- what Python says ---

def weights_of(inspection, tau_t=None, tau_i=None, alpha=None, beta=None):
    scores, config = inspection.scores, inspection.config
    given = lambda value, own: own if value is None else value
    return token_weights(scores.semantic_hat, scores.entropy_hat, given(tau_t, scores.tau_t), given(tau_i, scores.tau_i), given(alpha, config.alpha), given(beta, config.beta), config.fallback_k)

def detected(grid, mask, cut=.5):
    "IoU of the map above `cut` of its maximum, and pixel AUROC, at the size of the mask."
    pixels = to_pixels(grid, mask.shape); found = pixels > cut * pixels.max()
    return (found & mask).sum() / (found | mask).sum(), roc_auc_score(mask.ravel(), pixels.ravel())

def agree(page, inspection, mask, tokens=None, cut=.5, **sliders):
    "The page's numbers are Python's: of the RDAM, or of the mean map of `tokens`."
    weights, kept, _ = weights_of(inspection, **sliders)
    maps = inspection.attention.maps.numpy()
    iou, auroc = detected(anomaly_map(maps, weights) if tokens is None else maps[tokens].mean(0), mask, cut)
    assert measured(page, 'iou') == pytest.approx(iou, abs=1e-3) and measured(page, 'auroc') == pytest.approx(auroc, abs=1e-3)
    assert measured(page, 'kept') == kept.sum()
    settled(page)
    assert page.locator('section.view[data-view="0"] button.token[data-kept="1"]').evaluate_all('all => all.map(each => Number(each.dataset.token))') == np.flatnonzero(kept).tolist()

# --- a saved page, no network ---

def test_tokens_are_locked_extended_and_cleared(window, file, inspection, mask):
    with opened(window, file) as page:
        whole = picture(page)
        token(page, 5).click(); page.mouse.move(0, 0)
        assert pressed(page) == [5] and state(page)['selected'] == [[5]] and picture(page) != whole
        agree(page, inspection, mask, [5])
        assert measured(page, 'entropy') == pytest.approx(inspection.scores.entropy[5], rel=5e-3)   # three digits are shown
        token(page, 8).click(modifiers=['Shift'])
        assert {5, 8} <= set(pressed(page))
        agree(page, inspection, mask, pressed(page))
        page.keyboard.press('Escape')
        assert pressed(page) == []

def test_keyboard_alone_selects_and_looks_up(window, file, inspection):
    with opened(window, file) as page:
        H, W = inspection.grid_map.shape
        for _ in range(30):   # Tab leads to the tokens, once
            page.keyboard.press('Tab')
            if page.evaluate('() => document.activeElement.matches("button.token")'): break
        assert page.evaluate('() => document.activeElement.dataset.token') == '0'
        assert page.locator('button.token[tabindex="0"]').count() == 1, 'one tab stop for all tokens'
        assert page.evaluate('() => { const style = getComputedStyle(document.activeElement); return style.outlineStyle !== "none" || style.boxShadow !== "none" }'), 'focus cannot be seen'
        page.keyboard.press('ArrowRight'); page.keyboard.press('Enter')
        assert pressed(page) == [1]
        for keys in ('Alt+ArrowUp', 'Meta+ArrowDown'): page.keyboard.press(keys)   # the browser's own
        assert page.evaluate('() => document.activeElement.dataset.token') == '1'
        page.keyboard.press('Shift+ArrowRight'); page.keyboard.press('Shift+ArrowRight')
        assert pressed(page) == [1, 2, 3]
        page.keyboard.press('Shift+ArrowLeft')
        assert set(pressed(page)) >= {1, 2}
        page.keyboard.press('Escape')
        assert pressed(page) == []
        page.keyboard.press('ArrowRight'); page.keyboard.press('Space')
        assert len(pressed(page)) == 1
        page.keyboard.press('Escape')
        page.locator('.stage').focus()
        assert page.evaluate('() => document.activeElement.matches(".stage")'), 'the picture takes no focus'
        for key in ('ArrowRight', 'ArrowDown', 'Enter'): page.keyboard.press(key)
        view, row, column = state(page)['cell']
        assert view == 0 and 0 <= row < H and 0 <= column < W and looking(page)
        before = page.locator('input[name=tau_t]').input_value()
        page.locator('input[name=tau_t]').focus(); page.keyboard.press('ArrowRight')
        assert page.locator('input[name=tau_t]').input_value() != before and state(page)['tau_t'] is not None

def test_sliders_recompute_what_python_computes(window, file, inspection, mask):
    with opened(window, file) as page:
        agree(page, inspection, mask)
        assert inspection.map_max_xy and measured(page, 'kept') == inspection.scores.kept.sum()
        before = picture(page)
        given = {}
        for name, value in dict(tau_t=.3, tau_i=.75, alpha=.9, beta=.2).items():
            slide(page, name, value); given[name] = value
            agree(page, inspection, mask, **given)
            assert state(page)[name] == pytest.approx(value)
        assert picture(page) != before
        slide(page, 'tau_t', 1); agree(page, inspection, mask, **given | dict(tau_t=1))   # nothing passes: the heaviest three
        slide(page, 'cut', .25); agree(page, inspection, mask, cut=.25, **given | dict(tau_t=1))
        numbers = [measured(page, name) for name in ('iou', 'auroc')]; before = picture(page)
        slide(page, 'opacity', .2)
        assert picture(page) != before and numbers == [measured(page, name) for name in ('iou', 'auroc')], 'opacity is for the eye only'

def test_presets_combination_and_switches(window, file, inspection, mask):
    with opened(window, file) as page:
        maps, seen = inspection.attention.maps.numpy(), {}
        for preset, grid in dict(all=maps.mean(0), kept=maps[inspection.scores.kept].mean(0), rdam=inspection.grid_map).items():
            page.locator(f'button[data-preset={preset}]').first.click(); page.mouse.move(0, 0)
            assert state(page)['preset'] == preset
            iou, auroc = detected(grid, mask)
            assert measured(page, 'iou') == pytest.approx(iou, abs=1e-3) and measured(page, 'auroc') == pytest.approx(auroc, abs=1e-3), preset
            seen[preset] = picture(page)
        assert len(set(seen.values())) == 3
        more(page); kept = np.flatnonzero(inspection.scores.kept)[:2]
        token(page, kept[0]).click(); token(page, kept[1]).click(modifiers=['Shift'])
        chosen = pressed(page)
        page.locator('select[name=combine]').first.select_option('weighted')
        iou, auroc = detected(np.tensordot(inspection.scores.weights[chosen], maps[chosen], 1), mask)
        assert measured(page, 'iou') == pytest.approx(iou, abs=1e-3) and measured(page, 'auroc') == pytest.approx(auroc, abs=1e-3)
        for name in ('sinks', 'contour', 'components'):
            box = page.locator(f'input[type=checkbox][name={name}]').first
            before, was = picture(page), box.is_checked()
            box.set_checked(not was); page.mouse.move(0, 0)
            assert state(page)[name] is (not was) and picture(page) != before, name
            box.set_checked(was)

def test_hover_tells_and_reverse_look_up_finds_the_tokens(window, file, inspection):
    with opened(window, file) as page:
        grid, maps = inspection.grid_map.shape, inspection.attention.maps.numpy()
        stage = page.locator('.stage'); stage.scroll_into_view_if_needed(); box = stage.bounding_box()
        stage.hover(position=dict(x=2.5 / grid[1] * box['width'], y=4.5 / grid[0] * box['height']))
        settled(page); there = page.locator('.readout').first.text_content()
        stage.hover(position=dict(x=9.5 / grid[1] * box['width'], y=11.5 / grid[0] * box['height']))
        settled(page); assert page.locator('.readout').first.text_content() != there and any(digit.isdigit() for digit in there)
        row, column = np.unravel_index(inspection.grid_map.argmax(), grid)
        click_cell(page, row, column, grid)
        assert state(page)['cell'] == [0, row, column]
        assert looking(page) == set(np.flatnonzero(foreground(maps, inspection.config.binarise)[0][:, row, column]).tolist()) and looking(page)
        click_cell(page, row, column, grid); assert looking(page) == set() and state(page)['cell'] is None

def test_layers_and_heads_where_they_were_kept(window, inspection, mask, tmp_path):
    with opened(window, save_page(tmp_path/'none.html', inspection)) as page:
        more(page)
        assert page.locator('select[name=layer]').count() == 0 and 'not captured' in page.locator('details.more').text_content()
    heads = capture_heads(inspection, load_vlm())
    with opened(window, save_page(tmp_path/'heads.html', heads, masks=[mask], heads=True)) as page:
        more(page); page.locator('button[data-preset=all]').click(); page.mouse.move(0, 0)
        before = picture(page)
        page.locator('select[name=layer]').select_option('1'); page.locator('select[name=head]').select_option('0')
        assert state(page)['layer'] == 1 and state(page)['head'] == 0 and picture(page) != before
        maps = heads.attention.per_head[1, 0].numpy()
        for tokens, choose in (range(len(maps)), None), ([5], token(page, 5)):
            if choose: choose.click(); page.mouse.move(0, 0)
            iou, auroc = detected(maps[list(tokens)].mean(0), mask)
            assert measured(page, 'iou') == pytest.approx(iou, abs=5e-3) and measured(page, 'auroc') == pytest.approx(auroc, abs=5e-3)   # 8 bits a cell
        own = threshold(normalise(heads.attention.text_per_head[1, 0].numpy()), inspection.config.tau_t)
        assert float(page.locator('input[name=tau_t]').input_value()) == pytest.approx(own, abs=.006), "the thumb is not at this head's own threshold"
        page.locator('select[name=head]').focus(); page.keyboard.press('Escape')
        assert pressed(page) == [5], 'Escape in a menu is for the menu'

def test_pictures_download_and_links_restore(window, file, inspection, mask, tmp_path):
    with opened(window, file, permissions=['clipboard-read', 'clipboard-write']) as page:
        token(page, 3).click(); slide(page, 'tau_t', .4); slide(page, 'cut', .3)
        with page.expect_download() as download: page.locator('button[data-action=png]').click()
        assert download.value.suggested_filename.endswith('.png')
        shown = np.asarray(Image.open(download.value.path()).convert('RGB'))
        assert min(shown.shape[:2]) >= 200 and shown.std() > 5 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 500, 'the picture is blank'
        page.locator('button[data-action=code]').click(); settled(page)
        code = page.evaluate('() => navigator.clipboard.readText()'); numbers = [measured(page, name) for name in ('iou', 'auroc', 'kept', 'entropy')]
        page.locator('button[data-action=link]').click(); settled(page)
        link = page.evaluate('() => navigator.clipboard.readText()')
        wanted = state(page)
        with page.expect_download() as download: page.locator('button[data-action=html]').click()
        again = tmp_path/'again.html'; download.value.save_as(again)
    assert 'TokenViewer(' in code and link.startswith(file.as_uri() + '#state=')
    said = eval(code.strip().splitlines()[-1], dict(TokenViewer=TokenViewer, inspections=[inspection], inspection=inspection)).state
    assert said['selected'] == [[3]] == wanted['selected'] and said['tau_t'] == pytest.approx(.4) and said['cut'] == pytest.approx(.3)
    with opened(window, file, link[link.index('#'):]) as page:
        assert pressed(page) == [3] and float(page.locator('input[name=tau_t]').input_value()) == pytest.approx(.4)
        assert [measured(page, name) for name in ('iou', 'auroc', 'kept', 'entropy')] == numbers
        page.keyboard.press('Tab'); slide(page, 'opacity', wanted['opacity']); assert state(page) == wanted
    with opened(window, again) as page: assert pressed(page) == [3] and len(again.read_text()) < 400_000

@pytest.mark.parametrize('fragment', ['#state=', '#state=%7B', '#state=null', '#state=[1]', '#state=%22x%22', '#state=%E0%A4%A', '#other',
    '#state=' + '{"selected":[[99999,-1,"x",null],7],"tau_t":"<img src=x onerror=alert(1)>","cell":[9,9,9],"preset":"<b>","cut":1e999,"opacity":-4,"__proto__":{"x":1},"layer":77}'])
def test_a_wrong_link_harms_nothing(window, file, inspection, mask, fragment):
    with opened(window, file, fragment) as page:
        token(page, 4).click()
        assert pressed(page) == [4] and page.locator('.readl-viewer img[src=x]').count() == 0

HOSTILE = ['<script>alert(1)</script>', ' "><img src=x onerror=alert(2)>', " '; alert(3); //", ' </script><script>alert(4)</script>', ' <!--', ' ]]>', ' \u202ereversed\u202c', ' \u2066\u05e9\u05dc\u05d5\u05dd\u2069',
           ' \u0645\u0631\u062d\u0628\u0627', '\u2028', ' &lt;b&gt;&amp;', ' `${alert(5)}`', ' $x^2$ \\(y\\)', ' \U0001f469\u200d\U0001f52c', ' ' + 'w' * 3000, '\n\n', ' javascript:alert(6)', ' \ufeff\x07', ' {{7*7}}', '.']

def test_hostile_text_is_only_text(window, tmp_path):
    name = '"><img src=x onerror=alert(7)></script><script>alert(8)</script>'
    inspection = made_up(HOSTILE, (6, 6))
    made = save_page(tmp_path/'hostile.html', inspection, inspection, names=[name, '\u202ename'])
    for width in (1280, 360):
        with opened(window, made, width=width) as page:
            view = page.locator('section.view[data-view="0"]')
            text, squeezed = view.text_content(), lambda text: ''.join(text.replace('\ufeff', '').split())
            assert squeezed(inspection.response.text) in squeezed(text), 'the text is not whole'
            assert view.locator('button.token').count() == len(HOSTILE) and name in text
            assert page.locator('.readl-viewer script, .readl-viewer img[src=x], .readl-viewer b:text("x")').count() == 0
            for number in range(len(HOSTILE)): token(page, number).click(); settled(page)
            assert pressed(page) == [len(HOSTILE) - 1] and page.evaluate('() => document.documentElement.scrollWidth <= innerWidth'), width
            with page.expect_download() as download: page.locator('button[data-action=png]').click()
            assert '/' not in download.value.suggested_filename and '<' not in download.value.suggested_filename

@pytest.mark.parametrize('width', [360, 1280])
def test_words_hold_still_under_the_pointer(window, width, tmp_path):
    "A preview that moved the words would change what is under the pointer, and so on for ever."
    made = save_page(tmp_path/'still.html', *[made_up([' quiet', ' wide', ' narrow', ' far', ' near', '.'] * 6, (6, 6), seed=seed) for seed in (0, 1)])
    with opened(window, made, width=width) as page:
        places = lambda: page.locator('section.view[data-view="0"] button.token').evaluate_all('all => all.map(each => each.offsetTop)')
        page.mouse.move(2, 2); settled(page); before = places()
        for number in (0, 9, 17, 30): token(page, number).hover(); settled(page); assert places() == before, number

def test_ten_thousand_tokens(window, tmp_path):
    words = [f' word{number}' for number in range(10_000)]
    made = save_page(tmp_path/'long.html', made_up(words, (4, 4)))
    with opened(window, made) as page:
        text = page.locator('section.view').text_content()
        assert page.locator('button.token').count() == 2048 and all(word.strip() in text for word in words[::97]) and 'word9999' in text
        assert '7952' in text.replace(',', '').replace('\u202f', ''), 'how many are left out is not said'
        token(page, 2047).click(); assert pressed(page) == [2047]
        page.locator('button[data-preset=all]').first.click(); assert state(page)['preset'] == 'all'

def test_a_picture_too_large_to_save_is_said(window, file):
    with opened(window, file) as page:
        page.evaluate('() => { HTMLCanvasElement.prototype.toBlob = done => done(null) }')
        page.locator('button[data-action=png]').click()
        expect(page.locator('.said')).to_have_text('Too large for one picture.')

@pytest.mark.parametrize('words, grid', [([], (3, 4)), ([' one'], (1, 1)), ([' flat', ' too'], (5, 2))])
def test_little_to_show_is_shown(window, words, grid, tmp_path):
    inspection = made_up(words, grid)
    made = save_page(tmp_path/'little.html', inspection, masks=[np.zeros((300, 300), bool)])
    with watched(window) as context:
        page = context.new_page(); page.goto(Path(made).as_uri()); page.wait_for_selector('.readl-viewer section.view')
        assert page.locator('button.token').count() == len(words)
        for preset in ('all', 'kept', 'rdam'): page.locator(f'button[data-preset={preset}]').first.click()
        if words: token(page, 0).click(); assert pressed(page) == [0]
        assert page.locator('.error:visible').count() == 0

def test_a_damaged_page_says_so(window, file, tmp_path):
    (tmp_path/'damaged.html').write_text(file.read_text('utf8').replace('"config":', '"confused":'), 'utf8')
    with watched(window) as context:
        page = context.new_page(); page.goto((tmp_path/'damaged.html').as_uri())
        expect(page.locator('.error')).to_have_text('The viewer cannot show this: a view has no config; make the page again.')

def test_two_side_by_side_share_a_scale(window, inspection, mask, tmp_path):
    made = save_page(tmp_path/'two.html', inspection, made_up([' a', ' b', ' c'], (7, 7), image=inspection.image), masks=[mask, None], names=['base', '+R1'])
    with opened(window, made) as page:
        assert page.locator('section.view').count() == 2
        boxes = [page.locator(f'section.view[data-view="{number}"]').bounding_box() for number in (0, 1)]
        assert boxes[0]['y'] == pytest.approx(boxes[1]['y'], abs=2) and boxes[1]['x'] > boxes[0]['x'], 'not side by side'
        token(page, 1, view=1).click(); token(page, 4).click()
        assert pressed(page, 1) == [1] and pressed(page) == [4] and state(page)['selected'] == [[4], [1]]
    with opened(window, made, width=360) as page: assert page.evaluate('() => document.documentElement.scrollWidth <= 360')

def test_a_page_of_200_tokens_is_small(window, inspection, mask, tmp_path):
    made = Path(save_page(tmp_path/'size.html', made_up([' token'] * 200, (15, 15), image=inspection.image), masks=[mask]))
    assert made.stat().st_size < 400_000

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1280])
def test_axe_finds_nothing_on_a_page(window, file, axe, width, scheme):
    with opened(window, file, width=width, scheme=scheme, scripts=[axe]) as page:
        assert page.evaluate('() => document.documentElement.scrollWidth <= innerWidth'), 'scrolls sideways'
        found = violations(page, 'html')
        token(page, 5).click(); token(page, 7).click(modifiers=['Shift']); slide(page, 'tau_t', .3); page.locator('input[name=components]').first.check()
        found += violations(page)
        assert not found, '\n'.join(found)

# --- reference and boxes ---

@pytest.fixture(scope='module')
def paired(inspection, mask, tmp_path_factory):
    "A page with a reference of another size and boxes of every kind; the true and the predicted boxes."
    true = mask_boxes(mask, 'contamination', gap=.02)   # several specks
    found = [replace(true[1], x1=true[1].x1 + 3, label='contamination'), Box(300, 300, 380, 360, '<img src=x onerror=alert(1)>\u202e')]
    boxes = [*found, *(('true', box) for box in true), ('hint', true[0]), ('map', Box(-20, 390, 60, 500))]
    made = save_page(tmp_path_factory.mktemp('paired')/'paired.html', replace(inspection, reference=Image.new('RGB', (500, 300), 'grey')), masks=[mask], boxes=[boxes])
    return Path(made), true, found

def square(page, name):
    "Where the framed cell stands in the stage or the reference, as shares of it: left, top, right, bottom."
    settled(page)
    return page.evaluate("""name => { const inside = document.querySelector(name).getBoundingClientRect(), path = document.querySelector(name + ' .hover .line').getBoundingClientRect();
        return path.width ? [path.left - inside.left, path.top - inside.top, path.right - inside.left, path.bottom - inside.top].map((value, i) => value / (i % 2 ? inside.height : inside.width)) : null }""", name)

def test_the_reference_frames_the_same_cell(window, paired, inspection):
    H, W = inspection.grid_map.shape
    with opened(window, paired[0]) as page:
        assert square(page, '.twin') is None
        for name in ('.stage', '.twin'):   # pointing at either
            box = page.locator(name).bounding_box()
            page.mouse.move(box['x'] + 9.5 / W * box['width'], box['y'] + 11.5 / H * box['height'])
            for shown in ('.stage', '.twin'): assert square(page, shown) == pytest.approx([9 / W, 11 / H, 10 / W, 12 / H], abs=.02), (name, shown)
            assert 'row 11, column 9' in page.locator('.readout').text_content()
        page.mouse.click(box['x'] + 9.5 / W * box['width'], box['y'] + 11.5 / H * box['height'])
        assert state(page)['cell'] == [0, 11, 9]
        page.locator('.stage').focus(); page.keyboard.press('ArrowRight'); assert square(page, '.twin') is not None
        assert page.locator('.twin img').evaluate('image => image.naturalWidth / image.naturalHeight') == pytest.approx(5 / 3, abs=.02)

def test_boxes_are_drawn_named_switched_and_measured(window, paired):
    made, true, found = paired
    with opened(window, made) as page:
        seen, whole = set(), picture(page)
        for kind in ('predicted', 'true', 'hint', 'map'):
            path = page.locator(f'.stage .boxes.{kind} .line')
            style = path.evaluate('path => { const { stroke, strokeDasharray } = getComputedStyle(path); return stroke + " " + strokeDasharray }'); seen |= set(style.split(') '))
            assert path.get_attribute('d').count('M') == (len(true) if kind == 'true' else 2 if kind == 'predicted' else 1)
            box = page.locator(f'input[name=box_{kind}]'); box.uncheck(); page.mouse.move(0, 0); settled(page)
            assert state(page)[f'box_{kind}'] is False and not path.get_attribute('d') and picture(page) != whole and page.locator(f'.chip.{kind}:visible').count() == 0
            box.check(); settled(page)
        assert len(seen) == 8, 'each kind has a colour and a line of its own'
        assert page.locator('.chip.predicted').all_text_contents() == ['predicted: contamination', 'predicted: <img src=x onerror=alert(1)>\\u202e'] and page.locator('.readl-viewer img[src=x]').count() == 0
        left = page.locator('.stage .boxes.map .line').get_attribute('d'); assert left.startswith('M0 390') and 'V420' in left   # clipped
        overlap = iou_matrix(found, true)
        assert measured(page, 'boxes') == len(match(found, true, .5)) == 1 and measured(page, 'box-iou') == pytest.approx(overlap.max(0).mean(), abs=1e-3)
        assert f'/{len(true)}' in page.locator('.measures').text_content() and 'predicted: contamination' in page.locator('.stage').get_attribute('aria-label')
        x, y = (true[1].x1 + true[1].x2) / 840, (true[1].y1 + true[1].y2) / 840; box = page.locator('.stage').bounding_box()
        page.mouse.move(box['x'] + x * box['width'], box['y'] + y * box['height']); settled(page)
        assert 'true: contamination' in page.locator('.readout').text_content() and page.locator('.chip.true:visible').count() >= 1   # many boxes are named where one points
        with page.expect_download() as download: page.locator('button[data-action=png]').click()
        assert Image.open(download.value.path()).width > 2 * 420 * 1.4   # with the reference

def test_boxes_are_compared_as_in_python(window):
    made = np.random.default_rng(5); cases = []
    for _ in range(200):   # whole corners: equal boxes, boxes without overlap and an IoU of exactly 0.5 occur
        some = [[(*low, *(low + made.integers(1, 6, 2))) for low in made.integers(0, 8, (made.integers(least, 7), 2))] for least in (0, 1)]
        cases.append([[Box(*map(float, corners)) for corners in boxes] for boxes in some])
    source = base64.b64encode((ROOT/'readl_nb/viewer.js').read_bytes()).decode()
    sent = [shares_of([*found, *(('true', box) for box in true)], (14, 14))[0] for found, true in cases]
    with watched(window) as context:
        numbers = json.loads(context.new_page().evaluate("""async ([source, cases]) => { const js = await import('data:text/javascript;base64,' + source)
            return JSON.stringify(JSON.parse(cases).map(all => { const [found, truth] = ['predicted', 'true'].map(kind => js.cleanBoxes(all).filter(one => one.kind === kind).map(one => one.box))
                const { matched, mean } = js.boxMatch(found, truth); return [matched, mean] })) }""", [source, json.dumps(sent)]))
    for (found, true), (matched, mean) in zip(cases, numbers):
        assert matched == len(match(found, true, .5)) and mean == pytest.approx(iou_matrix(found, true).max(0, initial=0).mean(), abs=1e-6)
    assert len({matched for matched, _ in numbers}) > 2

@pytest.mark.parametrize('width, scheme', [(360, 'dark'), (1280, 'light')])
def test_axe_finds_nothing_with_reference_and_boxes(window, paired, axe, width, scheme):
    with opened(window, paired[0], width=width, scheme=scheme, scripts=[axe]) as page:
        assert page.evaluate('() => document.documentElement.scrollWidth <= innerWidth'), 'scrolls sideways'
        token(page, 5).click(); found = violations(page, 'html')
        assert not found, '\n'.join(found)

def test_pages_without_reference_and_boxes_show_nothing_of_them(window, file):
    with opened(window, file) as page: assert page.locator('.twin, .chips, .pair, .boxes, input[name^=box_], [data-measure^=box]').count() == 0

# --- the formulas of viewer.js are those of the notebooks ---

FORMULAS = """async ([source, cases]) => {
  const js = await import('data:text/javascript;base64,' + source), list = values => Array.from(values, value => value === Infinity ? 'inf' : value)
  return JSON.stringify(JSON.parse(cases).map(({maps, H, W, T, binarise, scores, method, inverse, rule, semantic, entropy, taus, shares, k, size, mask, cut}) => {
    const all = Float64Array.from(maps.flat()), shape = [H, W], one = t => all.subarray(t * H * W, (t + 1) * H * W), each = f => [...Array(T).keys()].map(f)
    const {weights, kept, fellBack} = js.tokenWeights(semantic, entropy, ...taus, ...shares, k)
    const grid = js.anomalyMap(all, weights, H * W), pixels = js.toPixels(grid, shape, size)
    return {foreground: each(t => list(js.foreground(one(t), binarise).mask)), entropy: list(each(t => js.spatialEntropy(one(t), shape, binarise))),
      components: each(t => js.components(js.foreground(one(t), binarise).mask, shape).count), normalised: list(js.normalise(scores.map(x => x === 'inf' ? Infinity : x), method, inverse)),
      threshold: js.threshold(scores.map(x => x === 'inf' ? Infinity : x), rule), weights: list(weights), kept: list(kept), fellBack, grid: list(grid), pixels: list(pixels),
      iou: js.iou(pixels, mask, cut), auroc: js.auroc(pixels, mask)} })) }"""

def random_case(made):
    "Maps and scores of a response as it may be: flat maps, equal scores, infinite entropy, one cell, one token included."
    T, H, W = made.integers(1, 12), made.integers(1, 9), made.integers(1, 9)
    maps = made.gamma(.3, 1, (T, H, W)).round(made.integers(1, 8)) * made.choice([1, 1e-5])
    if made.random() < .3: maps[made.integers(T)] = made.choice([0, .1])
    steps = made.choice([3, 1000]); scores = made.integers(0, steps, T) / steps; scores[made.random(T) < made.choice([0, .3])] = np.inf
    size = tuple(int(x) for x in made.integers(1, 60, 2)); mask = made.random(size) < .3
    unit = lambda: made.integers(0, steps + 1, T) / steps
    return dict(maps=maps, binarise=['mean', 'relu_mean', .8][made.integers(3)], scores=scores, method=['minmax', 'rank', 'zscore'][made.integers(3)], inverse=bool(made.integers(2)),
        rule=['max_curvature', 'median', ['quantile', .8], .35][made.integers(4)], semantic=unit(), entropy=unit(), taus=made.integers(0, 5, 2) / 4, shares=made.integers(1, 5, 2) / 4,
        k=int(made.integers(1, 5)), size=size, mask=mask, cut=float(made.choice([.25, .5, .9])))

def test_formulas_in_the_page_are_pythons(window):
    made = np.random.default_rng(20); cases = [random_case(made) for _ in range(300)]
    plain = lambda value: [plain(one) for one in value] if isinstance(value, (list, tuple)) else plain(value.tolist()) if isinstance(value, np.ndarray) else 'inf' if isinstance(value, float) and value == np.inf else value
    source = base64.b64encode((ROOT/'readl_nb/viewer.js').read_bytes()).decode()
    sent = [{name: plain(value) for name, value in case.items()} | dict(maps=case['maps'].reshape(-1).tolist(), mask=case['mask'].ravel().astype(int).tolist(),
            T=len(case['maps']), H=case['maps'].shape[1], W=case['maps'].shape[2]) for case in cases]
    with watched(window) as context:
        found = json.loads(context.new_page().evaluate(FORMULAS, [source, json.dumps(sent)]))
    same = lambda found, wanted, about: np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-4, atol=1e-6, err_msg=about)
    for number, (case, js) in enumerate(zip(cases, found)):
        told = f'case {number}'; maps = case['maps']; on = foreground(maps, case['binarise'])[0]
        assert np.array_equal(np.array(js['foreground'], bool), on.reshape(len(maps), -1)), told
        assert js['components'] == [label(one, np.ones((3, 3)))[1] for one in on], told
        same(js['entropy'], spatial_entropy(maps, case['binarise']), told)
        same(js['normalised'], normalise(case['scores'], case['method'], case['inverse']), told)
        same(js['threshold'], threshold(case['scores'], case['rule']), told)
        weights, kept, fell_back = token_weights(case['semantic'], case['entropy'], *case['taus'], *case['shares'], case['k'])
        same(js['weights'], weights, told); assert np.array_equal(js['kept'], kept) and js['fellBack'] == fell_back, told
        grid = anomaly_map(maps, weights); pixels = to_pixels(grid, case['size']); mask = case['mask']
        same(js['grid'], grid.ravel(), told); same(js['pixels'], pixels.ravel(), told)
        shown = np.asarray(js['pixels'], np.float32).reshape(mask.shape)   # rounding may part what is equal, so the page's own pixels are measured
        if mask.any() or (shown > 0).any(): assert js['iou'] == pytest.approx((lambda found: (found & mask).sum() / max((found | mask).sum(), 1))(shown > case['cut'] * shown.max()), abs=1e-3), told
        if 0 < mask.sum() < mask.size: assert js['auroc'] == pytest.approx(roc_auc_score(mask.ravel(), shown.ravel()), abs=1e-9), told

@pytest.mark.parametrize('sink', [False, True])
def test_auroc_of_maps_as_they_are_shown(window, sink):
    "At the size of the page, also where one cell holds nearly all attention and the rest is a hundred-thousandth of it."
    made = np.random.default_rng(3); grid = made.lognormal(-11, 1, (15, 15)) if sink else made.gamma(.4, 1, (15, 15)); grid[2, 3] = 1
    pixels, mask = to_pixels(grid, (420, 420)).ravel(), np.zeros((420, 420), bool); mask[200:260, 150:260] = True
    source = base64.b64encode((ROOT/'readl_nb/viewer.js').read_bytes()).decode()
    with watched(window) as context:
        found = context.new_page().evaluate("""async ([source, pixels, mask]) => { const js = await import('data:text/javascript;base64,' + source)
            return js.auroc(Float32Array.from(JSON.parse(pixels)), Uint8Array.from(JSON.parse(mask))) }""", [source, json.dumps(pixels.tolist()), json.dumps(mask.ravel().astype(int).tolist())])
    assert found == pytest.approx(roc_auc_score(mask.ravel(), pixels), abs=1e-9)

# --- JupyterLab ---

CELLS = {'setup': """import json, os, sys
sys.path.insert(0, %r)
from browser import made_up
from ipywidgets import VBox
from readl_nb.dashboards import dataset_browser, threshold_lab
from readl_nb.datasets import read_mask
from readl_nb.inspection import inspect_image
from readl_nb.training_dashboards import reward_inspector, training_monitor
from readl_nb.viewer import TokenViewer
inspection = inspect_image(%r)
mask = read_mask([%r], inspection.image.size)
inspection""" % (str(ROOT/'tests/tools'), str(PHOTO), str(MASK)),
'viewer': "viewer = TokenViewer(inspection, masks=[mask])\nviewer",
'again': "viewer",
'state': "print(json.dumps([viewer.state, viewer.selected]))",
'set state': "viewer.state = dict(selected=[[7]], tau_t=.4)",
'hostile': "hostile = TokenViewer(made_up(json.loads(%r), (6, 6)), names=['<script>alert(9)</script>'])\nhostile" % json.dumps(HOSTILE),
'lab': "lab = threshold_lab([inspection, inspect_image(%r)], masks=[mask, None])\nlab" % str(ROOT/'sample_data/metal/test/good/000.jpg'),
'thresholds': "print(json.dumps([lab.config.tau_t, lab.config.alpha]))",
'pictures': "pictures = dataset_browser(%r, page_size=6)\npictures" % str(ROOT/'sample_data'),
'explained': """from datasets import Dataset
explained = dataset_browser(Dataset.from_list([dict(path=%r, reference=%r, label=1, category='metal', defect='scratch', split='test', image_size=420,
    boxes=[{'bbox_2d': [100, 120, 220, 300], 'label': 'scratch'}], text='<think>There is a scratch.</think><answer>Yes.</answer>', source='masks')]))
explained""" % (str(PHOTO), str(ROOT/'sample_data/metal/test/good/000.jpg')),
'monitor': """os.makedirs('run', exist_ok=True); open('run/metrics.jsonl', 'w').close()
def step(number):
    with open('run/metrics.jsonl', 'a') as file: print(json.dumps(dict(step=number, reward=number/8, loss=.5, seconds=1.)), file=file)
step(1)
monitor = training_monitor('run', seconds=.2)
monitor""",
'step': "step(2)",
'missing': "missing = VBox([threshold_lab('no/such/folder'), dataset_browser('no/such/folder'), training_monitor('no/such/run'), reward_inspector('no/such/run')])\nmissing"}
CELLS |= {f'close {name}': f'{name}.close()' for name in ('viewer', 'hostile', 'lab', 'pictures', 'explained', 'monitor')} | {'close missing': 'for one in [*missing.children, missing]: one.close()'}
NUMBER = {name: number for number, name in enumerate(CELLS)}

@pytest.fixture(scope='module')
def lab(window, axe, tmp_path_factory):
    "The notebook above, open in a JupyterLab of its own, its first cell run; whatever goes wrong on the page until the last test fails."
    folder = tmp_path_factory.mktemp('lab')
    with jupyterlab(folder) as (address, key):
        write_notebook(folder/'work/viewer.ipynb', *CELLS.values())
        with watched(window, local=address, height=1400, scripts=[axe]) as context:
            notebook = Notebook(context.new_page(), address, key, 'viewer.ipynb')
            notebook.run(NUMBER['setup'])
            yield notebook

@contextmanager
def shown(lab, name):
    "What the cell `name` shows, run now; on leaving, what it opened is closed and gone."
    lab.run(NUMBER[name]); output = lab.output(NUMBER[name])
    try: yield output
    finally: lab.run(NUMBER[f'close {name}'])
    expect(output.locator('button, .js-plotly-plot')).to_have_count(0, timeout=20_000)

@pytest.fixture
def live(lab):
    "A new viewer in the notebook."
    with shown(lab, 'viewer') as cell:
        cell.locator('.readl-viewer button.token').first.wait_for()
        yield cell

def kernel(lab): lab.page.evaluate(SAVED); return json.loads(lab.run(NUMBER['state']))

def arrives(lab, **wanted):
    "The kernel's state, once it is as `wanted`: ipywidgets holds a change back until the kernel has heard the one before."
    for _ in range(20):
        said, selected = kernel(lab)
        if all(said.get(name) == (value if not isinstance(value, float) else pytest.approx(value)) for name, value in wanted.items()): return said, selected
    assert False, f'the kernel has {said} instead of {wanted}'

def test_live_page_and_kernel_agree(lab, live, inspection, mask):
    cell = live
    agree(cell, inspection, mask)
    token(cell, 5).click()
    assert arrives(lab, selected=[[5]])[1] == [[5]] and pressed(cell) == [5]
    token(cell, 5).focus(); lab.page.keyboard.press('Shift+ArrowRight')
    arrives(lab, selected=[[5, 6]])
    agree(cell, inspection, mask, [5, 6])
    token(cell, 6).focus(); lab.page.keyboard.press('Escape')   # running a cell took the focus
    assert pressed(cell) == []; arrives(lab, selected=[[]])
    for name, value in dict(tau_t=.3, tau_i=.7, alpha=.8, beta=.1, opacity=.4, cut=.3).items():
        slide(cell, name, value); arrives(lab, **{name: value})
    cell.locator('button[data-preset=rdam]').click()
    agree(cell, inspection, mask, cut=.3, tau_t=.3, tau_i=.7, alpha=.8, beta=.1)
    more(cell); cell.locator('input[name=sinks]').check()
    arrives(lab, sinks=True, preset='rdam')
    cell.locator('input[name=sinks]').uncheck()
    click_cell(cell, 4, 9, inspection.grid_map.shape)
    arrives(lab, cell=[0, 4, 9]); assert looking(cell)

def test_live_page_follows_the_kernel_and_downloads_itself(lab, live, window, tmp_path):
    cell = live
    lab.run(NUMBER['set state'])
    expect(token(cell, 7)).to_have_attribute('aria-pressed', 'true')
    assert pressed(cell) == [7] and float(cell.locator('input[name=tau_t]').input_value()) == pytest.approx(.4)
    lab.run(NUMBER['again']); token(lab.output(NUMBER['again']), 9).wait_for()   # the same widget, shown twice, is saved once
    saved = []; keep = lambda download: saved.append(download); lab.page.on('download', keep)
    with lab.page.expect_download() as download: token(cell, 9).click(); cell.locator('button[data-action=html]').click()
    download.value.save_as(tmp_path/'live.html')
    lab.run(NUMBER['state']); lab.page.evaluate(SAVED); assert len(saved) == 1; lab.page.remove_listener('download', keep)
    with opened(window, tmp_path/'live.html') as page: assert pressed(page) == [9]
    with lab.page.expect_download() as download: cell.locator('button[data-action=png]').click()
    assert np.asarray(Image.open(download.value.path()).convert('L')).std() > 5

def test_inspection_shows_itself_as_the_viewer(lab, inspection):
    lab.output(NUMBER['setup']).locator('iframe').scroll_into_view_if_needed()   # frames out of sight are not drawn
    frame = lab.output(NUMBER['setup']).locator('iframe').element_handle().content_frame()
    frame.wait_for_selector('button.token')
    assert frame.locator('button.token').count() == len(inspection.attention)
    before = picture(frame)
    token(frame, 3).click(); lab.page.mouse.move(0, 0)
    assert pressed(frame) == [3] and picture(frame) != before and measured(frame, 'kept') == inspection.scores.kept.sum()
    slide(frame, 'tau_t', .9)
    assert state(frame)['tau_t'] == pytest.approx(.9)
    with lab.page.expect_download(): frame.locator('button[data-action=html]').click()

@pytest.mark.parametrize('theme', ['JupyterLab Dark', 'JupyterLab Light'])
def test_axe_finds_nothing_in_the_notebook(lab, live, theme):
    lab.page.evaluate('theme => window.jupyterapp.commands.execute("apputils:change-theme", {theme})', theme)
    lab.page.wait_for_selector(f'body[data-jp-theme-light={"false" if "Dark" in theme else "true"}]', state='attached')
    token(live, 2).click(); settled(lab.page)
    live.locator('.readl-viewer').evaluate('region => region.id = "checked"')
    found = violations(lab.page, '#checked')
    assert not found, '\n'.join(found)

def test_hostile_text_is_only_text_in_the_notebook(lab):
    with shown(lab, 'hostile') as cell:
        cell.locator('button.token').first.wait_for()
        text = cell.locator('.readl-viewer').text_content()
        assert all(each.strip() in text for each in HOSTILE), 'the text is not whole'
        assert cell.locator('.readl-viewer script, .readl-viewer img[src=x]').count() == 0
        token(cell, 3).click(); assert pressed(cell) == [3]

def test_threshold_lab_follows_its_sliders_and_opens_the_viewer(lab, inspection):
    with shown(lab, 'lab') as cell:
        cell.locator('.js-plotly-plot').first.wait_for()
        before, table = json.loads(lab.run(NUMBER['thresholds'])), cell.locator('table').first.text_content()
        handle = cell.locator('.widget-slider').filter(has_text=re.compile('alpha|α')).locator('.noUi-handle')
        handle.first.focus()
        for _ in range(6): lab.page.keyboard.press('ArrowRight')
        handle = cell.locator('.widget-slider .noUi-handle').first; handle.focus()
        for _ in range(6): lab.page.keyboard.press('ArrowRight')
        expect(cell.locator('table').first).not_to_have_text(table, timeout=20_000)
        after = json.loads(lab.run(NUMBER['thresholds']))
        assert after[0] != before[0] and after[1] > before[1]
        cell.locator('.thumbnail').first.click()
        cell.locator('.readl-viewer button.token').first.wait_for()
        assert cell.locator('.readl-viewer button.token').count() == len(inspection.attention)

def test_dataset_browser_filters_and_opens_an_image(lab):
    with shown(lab, 'pictures') as cell:
        cell.locator('.thumbnail').first.wait_for()
        assert cell.locator('.thumbnail').count() == 6 and cell.locator('.thumbnail img').first.evaluate('picture => picture.naturalWidth > 0')
        menu = cell.locator('.widget-dropdown').filter(has_text=re.compile('category')).locator('select')
        menu.select_option(index=[option.split()[0] for option in menu.locator('option').all_text_contents()].index('metal'))
        expect(cell.locator('.thumbnail .name').first).to_contain_text('metal', timeout=20_000)
        expect(cell.locator('[role=status]').first).to_contain_text('images pass')
        count = cell.locator('img').count()
        cell.locator('.thumbnail').nth(1).click()
        expect(cell.locator('img')).not_to_have_count(count, timeout=20_000)

def test_explanations_show_reference_boxes_and_hint(lab):
    with shown(lab, 'explained') as cell:
        picture = cell.locator('.thumbnail img').first; picture.wait_for(); outlined = picture.get_attribute('src')
        cell.get_by_role('checkbox', name='hints').check()
        expect(picture).not_to_have_attribute('src', outlined, timeout=20_000)
        cell.locator('.thumbnail').first.click()
        expect(cell.get_by_alt_text('its normal reference')).to_be_visible(timeout=20_000)
        expect(cell.get_by_alt_text('the image, boxes drawn')).to_be_visible()
        expect(cell.get_by_text('scratch at [100, 120, 220, 300]')).to_be_visible()

def test_training_monitor_follows_a_run(lab):
    with shown(lab, 'monitor') as cell:
        cell.locator('.js-plotly-plot').first.wait_for()
        row = cell.locator('table tr').filter(has_text='run').last
        expect(row).to_contain_text('1/', timeout=20_000)
        lab.run(NUMBER['step'])
        expect(row).to_contain_text('2/', timeout=20_000)
        expect(row).to_contain_text('0.25')

def test_dashboards_without_data_say_what_is_missing(lab):
    with shown(lab, 'missing') as cell:
        for words in ('no such folder', 'Nothing to show yet'): expect(cell.get_by_text(re.compile(words)).first).to_be_visible(timeout=20_000)
        assert cell.get_by_text(re.compile('no such (folder|run)|no/such')).count() >= 4
