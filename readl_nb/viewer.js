// The token-to-image viewer: click on a word of the model's reasoning and see where the model looked.
// One plain ES module, used twice: live in an anywidget, and in a static page where ten lines stand in for the widget's
// model. It fetches nothing and needs no kernel.
//
//   1 Formulas  the mirror of scoring.py and aggregation.py     5 Drawing  pixels, outlines, colours
//   2 Data      from JSON to typed arrays                       6 Page     elements and styles
//   3 State     what the user chose, checked                    7 Viewer   events and redrawing
//   4 Numbers   from both to the map that is shown
//
// The response is written by a model and trusted with nothing: it reaches the page as text alone.

// ---- 1 Formulas ----
// A map is a flat array of H * W attention values, row by row. T maps lie one behind the other.

const sum = values => { let total = 0; for (const v of values) total += v; return total; };
const least = (values, low = Infinity) => { for (let i = 0; i < values.length; i++) if (values[i] < low) low = values[i]; return low; };
const most = (values, high = 0) => { for (let i = 0; i < values.length; i++) if (values[i] > high) high = values[i]; return high; };

/** The q-quantile of sorted numbers, with linear interpolation as NumPy does it. */
export function quantile(sorted, q) {
  const at = (sorted.length - 1) * q, i = Math.floor(at), share = at - i;
  const low = sorted[i], high = sorted[Math.min(i + 1, sorted.length - 1)];
  return share < .5 ? low + (high - low) * share : high - (high - low) * (1 - share);
}

/** The cells of one map that count (mask, 0 or 1) and the attention mass of every cell; the map is scaled to sum 1. */
export function foreground(map, binarise = 'mean') {
  const n = map.length, total = sum(map), mass = new Float64Array(n), mask = new Uint8Array(n);
  for (let i = 0; i < n; i++) mass[i] = map[i] / (total > 0 ? total : 1);
  const mean = sum(mass) / n;
  let cut = mean * (1 + 1e-6);   // rounding of a flat map is no evidence
  if (binarise === 'relu_mean') { for (let i = 0; i < n; i++) mass[i] = Math.max(mass[i] - mean, 0); cut = 1e-3; }
  else if (typeof binarise === 'number') cut = quantile(Float64Array.from(mass).sort(), binarise);
  for (let i = 0; i < n; i++) mask[i] = mass[i] > cut ? 1 : 0;
  return { mask, mass };
}

/** Label (1, 2, ...; 0 = background) of every cell and how many there are; diagonal cells touch. */
export function components(mask, [H, W]) {
  const labels = new Int32Array(mask.length), stack = [];
  let count = 0;
  for (let start = 0; start < mask.length; start++) {
    if (!mask[start] || labels[start]) continue;
    labels[start] = ++count; stack.push(start);
    while (stack.length) {
      const cell = stack.pop(), row = Math.floor(cell / W), column = cell % W;
      for (let r = Math.max(row - 1, 0); r <= Math.min(row + 1, H - 1); r++)
        for (let c = Math.max(column - 1, 0); c <= Math.min(column + 1, W - 1); c++) {
          const next = r * W + c;
          if (mask[next] && !labels[next]) { labels[next] = count; stack.push(next); }
        }
    }
  }
  return { labels, count };
}

/** Spatial entropy term by term: the components, heaviest first, each {P, term = -P log P, peak cell}. */
export function entropyTerms(map, shape, binarise = 'mean') {
  const { mask, mass } = foreground(map, binarise), { labels, count } = components(mask, shape);
  const terms = Array.from({ length: count }, () => ({ P: 0, term: 0, peak: -1 }));
  for (let i = 0; i < labels.length; i++) if (labels[i]) {
    const one = terms[labels[i] - 1];
    one.P += mass[i];
    if (one.peak < 0 || mass[i] > mass[one.peak]) one.peak = i;
  }
  const total = sum(terms.map(one => one.P));
  for (const one of terms) { one.P /= total; one.term = Math.abs(one.P * Math.log(one.P)); }
  return { mask, terms: terms.sort((a, b) => b.P - a.P) };
}

/** S_I = - sum over components of P log P, in nats (ReADL, Eq. 3); Infinity, the worst, where nothing stands out. */
export function spatialEntropy(map, shape, binarise = 'mean') {
  const { terms } = entropyTerms(map, shape, binarise);
  return terms.length ? sum(terms.map(one => one.term)) : Infinity;
}

/** Ranks from 0; equal values share the mean of their ranks. */
export function ranks(values) {
  const order = [...values.keys()].sort((a, b) => values[a] - values[b]), result = new Float64Array(values.length);
  for (let i = 0, j; i < order.length; i = j) {
    for (j = i + 1; j < order.length && values[order[j]] === values[order[i]];) j++;
    for (let k = i; k < j; k++) result[order[k]] = (i + j - 1) / 2;
  }
  return result;
}

/** The scores on one scale, higher is better; infinite ones get the worst value, all equal ones 0. */
export function normalise(scores, method = 'minmax', inverse = false) {
  const finite = [...scores.keys()].filter(t => Number.isFinite(scores[t])), result = new Float64Array(scores.length);
  const x = Float64Array.from(finite, t => inverse ? -scores[t] : scores[t]), n = x.length;
  if (!n) return result;
  const low = least(x), high = most(x, -Infinity), largest = Math.max(Math.abs(low), Math.abs(high));
  let y;
  if (high - low <= 1e-9 * largest) y = x.map(() => n === scores.length ? 0 : 1);   // rounding noise is no difference
  else if (method === 'minmax') y = x.map(v => (v - low) / (high - low));
  else if (method === 'rank') y = ranks(x).map(r => r / (n - 1));
  else {
    const mean = sum(x) / n, deviation = Math.sqrt(sum(x.map(v => (v - mean) ** 2)) / n);
    y = x.map(v => (v - mean) / deviation);
    result.fill(least(y));
  }
  finite.forEach((t, i) => { result[t] = y[i]; });
  return result;
}

/** The score at the bend of the sorted curve: farthest from the chord between its ends (ReADL supplement 8). */
export function maxCurvature(scores) {
  const y = Float64Array.from([...scores].filter(Number.isFinite)).sort(), n = y.length;
  if (n < 3 || y[0] === y[n - 1]) return n ? y[0] : 0;
  let best = 0, farthest = -1;
  for (let i = 0; i < n; i++) {
    const chord = i === n - 1 ? y[i] : y[0] + (y[n - 1] - y[0]) / (n - 1) * i, distance = Math.abs(y[i] - chord);
    if (distance > farthest) { farthest = distance; best = i; }
  }
  return y[best];
}

/** The threshold that a score must exceed: 'max_curvature', 'median', ['quantile', q] or a number. */
export function threshold(scores, method = 'max_curvature') {
  if (typeof method === 'number') return method;
  if (method === 'max_curvature') return maxCurvature(scores);
  const sorted = Float64Array.from([...scores].filter(Number.isFinite)).sort();
  return sorted.length ? quantile(sorted, method === 'median' ? .5 : method[1]) : 0;
}

/** w = alpha S_T + beta S_I of the tokens above both thresholds, 0 for the others (ReADL, Eq. 4); else the k heaviest. */
export function tokenWeights(semanticHat, entropyHat, tauT, tauI, alpha = .5, beta = .5, fallbackK = 3) {
  const T = semanticHat.length, mix = Float64Array.from(semanticHat, (s, t) => alpha * s + beta * entropyHat[t]);
  const kept = Uint8Array.from(mix, (m, t) => semanticHat[t] > tauT && entropyHat[t] > tauI && m > 0 ? 1 : 0);
  const fellBack = T > 0 && fallbackK >= 1 && !kept.includes(1);
  if (fellBack && mix.every(m => m <= 0)) { mix.fill(1); kept.fill(1); }   // nothing tells the tokens apart
  else if (fellBack) {
    const order = [...mix.keys()].sort((a, b) => mix[b] - mix[a]);   // stable: earlier tokens win ties
    for (const t of order.slice(0, fallbackK)) kept[t] = mix[t] > 0 ? 1 : 0;
  }
  return { weights: mix.map((m, t) => kept[t] ? m : 0), kept, fellBack };
}

/** The weighted sum of the maps (ReADL, Eq. 5): A = sum over t of w_t A_t. */
export function anomalyMap(maps, weights, cells) {
  const result = new Float64Array(cells);
  for (let t = 0; t < weights.length; t++) {
    const w = weights[t];
    if (w) for (let i = 0, j = t * cells; i < cells; i++, j++) result[i] += w * maps[j];
  }
  return Float32Array.from(result);
}

/** For each of `size` pixels along one side: the two cells it lies between and the share of the second. */
function between(cells, size) {
  const first = new Int32Array(size), second = new Int32Array(size), share = new Float64Array(size);
  for (let i = 0; i < size; i++) {
    const at = Math.max((i + .5) * cells / size - .5, 0);   // pixel centres, as align_corners=False of torch
    first[i] = Math.min(Math.floor(at), cells - 1); second[i] = Math.min(first[i] + 1, cells - 1); share[i] = at - first[i];
  }
  return { first, second, share };
}

/** The map at image size, bilinear, raw values. */
export function toPixels(grid, [H, W], [height, width]) {
  const x = between(W, width), y = between(H, height), pixels = new Float32Array(height * width), row = new Float64Array(W);
  for (let r = 0, at = 0; r < height; r++) {
    const top = y.first[r] * W, bottom = y.second[r] * W, down = y.share[r];
    for (let c = 0; c < W; c++) row[c] = grid[top + c] * (1 - down) + grid[bottom + c] * down;
    for (let c = 0; c < width; c++, at++) pixels[at] = row[x.first[c]] * (1 - x.share[c]) + row[x.second[c]] * x.share[c];
  }
  return pixels;
}

/** Intersection over union of the pixels above `cut` times the maximum with the mask; NaN where both are empty. */
export function iou(pixels, mask, cut = .5) {
  const above = most(pixels) * cut;
  let both = 0, either = 0;
  for (let i = 0; i < pixels.length; i++) {
    const found = pixels[i] > above;
    if (found && mask[i]) both++;
    if (found || mask[i]) either++;
  }
  return both / either;
}

/** Area under the ROC curve over pixels: the chance that a defect pixel is above a sound one, ties half. */
export function auroc(values, mask) {
  const { keys, defect } = inOrder(values, mask);
  let wins = 0, below = 0;
  for (let i = 0, end = 0; i < keys.length; i = end) {   // pixels of one value after the other
    let above = 0;
    while (end < keys.length && keys[end] === keys[i]) above += defect[end++];
    const sound = end - i - above;
    wins += above * (below + sound / 2);
    below += sound;
  }
  return wins / (below * (keys.length - below));
}

/** Values as float32 in ascending order, as integers of that order, and which are of the defect: a counting sort in two
    passes, some milliseconds for a whole picture, where a sort with a comparison would cost a frame or two. */
function inOrder(values, mask) {
  const numbers = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) numbers[i] = values[i] + 0;   // -0 is 0
  let keys = new Uint32Array(numbers.buffer), defect = Uint8Array.from(mask);
  for (let i = 0; i < keys.length; i++) keys[i] ^= keys[i] >>> 31 ? 0xffffffff : 0x80000000;   // the bits of floats, ordered like the numbers
  for (const shift of [0, 16]) {
    const start = new Uint32Array(65537), nextKeys = new Uint32Array(keys.length), nextDefect = new Uint8Array(keys.length);
    for (let i = 0; i < keys.length; i++) start[(keys[i] >>> shift & 65535) + 1]++;
    for (let digit = 0; digit < 65536; digit++) start[digit + 1] += start[digit];
    for (let i = 0; i < keys.length; i++) {
      const at = start[keys[i] >>> shift & 65535]++;
      nextKeys[at] = keys[i]; nextDefect[at] = defect[i];
    }
    [keys, defect] = [nextKeys, nextDefect];
  }
  return { keys, defect };
}

/** Reverse look-up: for each token the share of its attention that falls on `cell`, 0 where it looks elsewhere. */
export function looksAt(maps, cell, cells, binarise = 'mean') {
  const shares = new Float64Array(maps.length / cells);
  for (let t = 0; t < shares.length; t++) {
    const map = maps.subarray(t * cells, (t + 1) * cells);
    if (foreground(map, binarise).mask[cell]) shares[t] = map[cell] / sum(map);
  }
  return shares;
}

/** The maps without what all tokens share (attention sinks): each minus the mean over tokens, never below 0. */
export function withoutSinks(maps, cells) {
  const T = maps.length / cells, mean = anomalyMap(maps, new Float64Array(T).fill(1 / T), cells);
  return maps.map((v, i) => Math.max(v - mean[i % cells], 0));
}

/** Intersection over union of two boxes [x1, y1, x2, y2]. */
export function boxIoU(a, b) {
  const area = ([x1, y1, x2, y2]) => Math.max(x2 - x1, 0) * Math.max(y2 - y1, 0);
  const both = area(a.map((v, i) => (i < 2 ? Math.max : Math.min)(v, b[i])));
  return both / (area(a) + area(b) - both) || 0;
}

/** True boxes with a predicted one of their own at IoU >= `at`, and the mean over the true ones of their best IoU. */
export function boxMatch(predicted, truth, at = .5) {
  const table = truth.map(one => predicted.map(other => boxIoU(one, other))), owner = predicted.map(() => -1);
  const place = (t, tried) => table[t].some((value, p) => {   // a pair made earlier moves over where that makes room
    if (value < at - 1e-9 || tried.has(p) || (tried.add(p), owner[p] >= 0 && !place(owner[p], tried))) return false;
    owner[p] = t;
    return true;
  });
  return { matched: truth.filter((_, t) => place(t, new Set())).length, mean: sum(table.map(row => most(row))) / truth.length };
}

// ---- 2 Data ----

/** Attention values from whole numbers of `width` bytes (little-endian) and one scale a map. */
export function decodeMaps(base64, scales, cells, width = 2) {
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  if (bytes.length !== scales.length * cells * width)
    throw new Error(`its maps hold ${bytes.length} bytes, not ${scales.length} times ${cells} cells; make the page again.`);
  const values = new Float32Array(scales.length * cells);
  for (let i = 0; i < values.length; i++)
    values[i] = (width === 1 ? bytes[i] : bytes[2 * i] + 256 * bytes[2 * i + 1]) * scales[Math.floor(i / cells)];
  return values;
}

/** A mask (0 or 1 a pixel) from the lengths of its runs, background first. */
export function decodeMask({ height, width, runs }) {
  const mask = new Uint8Array(height * width);
  let at = 0;
  runs.forEach((length, i) => { if (i % 2) mask.fill(1, at, at + length); at += length; });
  return mask;
}

const KINDS = ['predicted', 'true', 'hint', 'map'];   // of boxes

/** The boxes that can be drawn. */
export const cleanBoxes = raw => (raw ?? []).filter(one => KINDS.includes(one?.kind) && one.box?.length === 4 && one.box.every(Number.isFinite)).slice(0, 400);

const ofKind = (boxes, kind) => boxes.filter(one => one.kind === kind), kindsOf = boxes => KINDS.filter(kind => ofKind(boxes, kind).length);
const nameOf = ({ kind, label }) => kind + (label ? `: ${label}` : '');

const lacking = (object, keys) => keys.split(' ').filter(key => (object?.[key] ?? null) === null);

/** One view ready for computing; throws a sentence when the data is not whole. */
export function prepareView(raw) {
  const missing = lacking(raw, 'name verdict notes width height image pieces grid maps scales semantic entropy semantic_hat entropy_hat weights kept flagged tau_t tau_i config');
  if (!missing.length) missing.push(...lacking(raw.config, 'alpha beta fallback_k normalise binarise tau_t tau_i'));
  if (missing.length) throw new Error(`a view has no ${missing.join(', ')}; make the page again.`);
  const [H, W] = raw.grid, cells = H * W, T = raw.weights.length;
  const { maps, heads, ...view } = raw;
  const size = raw.mask ? [raw.mask.height, raw.mask.width] : [raw.height, raw.width].map(side => Math.ceil(420 * side / Math.max(raw.width, raw.height)));
  const texts = Array(T).fill('');
  for (const [text, t] of raw.pieces) if (t >= 0 && t < T) texts[t] += text;
  const hats = [...raw.semantic_hat, ...raw.entropy_hat];
  return {
    ...view, T, H, W, cells, size, heads, texts, entropy: raw.entropy.map(v => v ?? Infinity),
    maps: decodeMaps(maps, raw.scales, cells), truth: raw.mask && decodeMask(raw.mask), boxes: cleanBoxes(raw.boxes), sets: new Map(),
    low: least(hats, 0), high: most(hats, 1),   // z-scores leave 0 to 1
  };
}

// ---- 3 State ----

export const DEFAULTS = {
  selected: [], preset: 'rdam', combine: 'mean', cell: null, tau_t: null, tau_i: null, alpha: null, beta: null,
  opacity: .7, cut: .5, sinks: false, layer: null, head: null, contour: true, components: true, box_predicted: true, box_true: true, box_hint: true, box_map: true,
};

/** A state that fits `views` from anything: what cannot be is left at its default. */
export function cleanState(raw, views) {
  const state = { ...DEFAULTS }, given = raw && typeof raw === 'object' ? raw : {};
  const limits = { tau_t: [-1e6, 1e6], tau_i: [-1e6, 1e6], alpha: [0, 1e6], beta: [0, 1e6], opacity: [0, 1], cut: [0, 1] };
  for (const [key, [low, high]] of Object.entries(limits)) if (Number.isFinite(given[key])) state[key] = Math.min(Math.max(given[key], low), high);
  for (const key of ['sinks', 'contour', 'components', ...KINDS.map(kind => `box_${kind}`)]) if (typeof given[key] === 'boolean') state[key] = given[key];
  if (given.combine === 'weighted') state.combine = 'weighted';
  const list = value => Array.isArray(value) ? value : [], below = (x, n) => Number.isInteger(x) && x >= 0 && x < n;
  for (const key of ['layer', 'head']) if (below(given[key], 1e4)) state[key] = given[key];
  state.selected = views.map(({ T }, v) => [...new Set(list(list(given.selected)[v]))].filter(t => below(t, T)));
  state.preset = state.selected.some(list => list.length) ? null : ['rdam', 'kept', 'all'].includes(given.preset) ? given.preset : 'rdam';
  const [v, r, c] = list(given.cell);
  if (below(v, views.length) && below(r, views[v].H) && below(c, views[v].W)) state.cell = [v, r, c];
  return state;
}

/** Only what differs from the defaults: short links, short code. */
export function changes(state) {
  const telling = ([key, value]) => key === 'selected' ? value.some(list => list.length) : key === 'preset' && value === null ? false : JSON.stringify(value) !== JSON.stringify(DEFAULTS[key]);
  return Object.fromEntries(Object.entries(state).filter(telling));   // preset null follows from the selection
}

/** A state as a Python literal; its strings are our own words, so that swapping letters is safe. */
export function python(state) {
  const names = { null: 'None', true: 'True', false: 'False', ':': ': ', ',': ', ', '"': "'" };
  return JSON.stringify(state).replace(/null|true|false|[:,"]/g, found => names[found]);
}

// ---- 4 Numbers ----

/** The maps of the chosen layer and head, or of all; `changed` when they are not the ones Python scored. */
function mapsOf(view, { layer, head, sinks }) {
  const inside = view.heads && (layer ?? 0) < view.heads.layers && (head ?? 0) < view.heads.heads;
  const [l, h] = inside ? [layer, head] : [null, null];
  const key = `${l} ${h} ${sinks}`;
  if (!view.sets.has(key)) {
    if (view.sets.size > 8) view.sets.clear();   // bounded memory
    view.sets.set(key, makeMaps(view, l, h, sinks));
  }
  return view.sets.get(key);
}

function makeMaps(view, layer, head, sinks) {
  const inside = layer !== null || head !== null;
  let { maps, semantic } = inside ? ofHeads(view, layer, head) : view;
  if (!inside && !sinks) return { ...view, changed: false };
  if (sinks) maps = withoutSinks(maps, view.cells);
  const { binarise, normalise: method, tau_t, tau_i } = view.config;
  const entropy = Array.from({ length: view.T }, (_, t) => spatialEntropy(maps.subarray(t * view.cells, (t + 1) * view.cells), [view.H, view.W], binarise));
  const semantic_hat = normalise(semantic, method), entropy_hat = normalise(entropy, method, true);
  return { maps, semantic, entropy, semantic_hat, entropy_hat, inside, changed: true, tau_t: threshold(semantic_hat, tau_t), tau_i: threshold(entropy_hat, tau_i) };
}

/** Maps and S_T of one layer and head; null stands for the mean over all of them. */
function ofHeads(view, layer, head) {
  const { layers: L, heads: H, text } = view.heads, { T, cells } = view;
  view.heads.values ??= decodeMaps(view.heads.maps, view.heads.scales, cells, 1);
  const chosen = [];
  for (let one = 0; one < L * H; one++) if ((layer ?? Math.floor(one / H)) === Math.floor(one / H) && (head ?? one % H) === one % H) chosen.push(one);
  const maps = new Float32Array(T * cells), semantic = new Float64Array(T);
  for (const one of chosen) {
    for (let i = 0, j = one * T * cells; i < maps.length; i++, j++) maps[i] += view.heads.values[j] / chosen.length;
    for (let t = 0; t < T; t++) semantic[t] += (text?.[one * T + t] ?? NaN) / chosen.length;
  }
  return { maps, semantic: semantic.some(Number.isNaN) ? view.semantic : semantic };   // not captured: that of all heads
}

/** Scores, thresholds and weights of a view; Python's own numbers while nothing was changed. */
export function scored(view, state) {
  const set = mapsOf(view, state), { config } = view;
  const tau_t = state.tau_t ?? set.tau_t, tau_i = state.tau_i ?? set.tau_i, alpha = state.alpha ?? config.alpha, beta = state.beta ?? config.beta;
  const key = [tau_t, tau_i, alpha, beta].join();
  if (set.scored?.key === key) return set.scored;
  const own = !set.changed && [state.tau_t, state.tau_i, state.alpha, state.beta].every(v => v === null);
  const found = own ? { weights: Float64Array.from(view.weights), kept: Uint8Array.from(view.kept), fellBack: view.fell_back }
    : tokenWeights(set.semantic_hat, set.entropy_hat, tau_t, tau_i, alpha, beta, config.fallback_k);
  const total = config.scale === 'mean' ? sum(found.weights) || 1 : 1;
  set.scored = { ...set, ...found, key, own, tau_t, tau_i, alpha, beta, shares: found.weights.map(w => w / total), heaviest: most(found.weights) };
  return set.scored;
}

/** What a view shows: the map, which tokens it is of, and its kind; maps of one kind share one colour scale. */
export function shown(view, v, state, preview) {
  const scores = scored(view, state), { T, cells } = view, all = [...Array(T).keys()];
  const locked = state.selected[v] ?? [], preset = locked.length ? null : preview === null ? state.preset ?? 'rdam' : null;
  const tokens = locked.length ? locked : preset === null ? [preview] : preset === 'all' ? all : all.filter(t => scores.kept[t]);
  const evidence = preset === 'rdam' || (state.combine === 'weighted' && (preset !== null || locked.length > 0));
  const weights = new Float64Array(T);
  for (const t of tokens) weights[t] = evidence ? scores.shares[t] : 1 / tokens.length;
  const map = anomalyMap(scores.maps, weights, cells);
  const range = preset === 'rdam' && scores.own && view.map_range && !view.left_out ? view.map_range : [least(map), most(map)];
  return { map, range, tokens, preset, kind: evidence ? 'evidence' : 'attention', title: titleOf(view, preset, tokens, evidence) };
}

function titleOf(view, preset, tokens, evidence) {
  if (!view.T) return 'no reasoning tokens: the map is empty';
  if (tokens.length === 1 && !evidence) return `attention of ${quoted(view.texts[tokens[0]])}`;
  return `${preset === 'rdam' ? 'anomaly map' : evidence ? 'weighted sum' : 'mean attention'} of ${tokens.length} ${preset === 'kept' ? 'kept ' : ''}token${tokens.length === 1 ? '' : 's'}`;
}

/** A word short enough for a sentence. */
export function quoted(text) {
  const word = text.trim(), letters = [...word];
  if (!word) return text.includes('\n') ? 'a line break' : 'a blank';
  return `“\u2068${letters.length > 24 ? letters.slice(0, 24).join('') + '…' : word}\u2069”`;   // isolated: a right-to-left mark ends with the word
}

/** A number with three digits. */
export function digits(value) {
  if (value === null || Number.isNaN(value)) return '–';
  if (!Number.isFinite(value)) return '∞';
  if (value === 0) return '0';
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** What decided about one token, as a sentence. */
function aboutToken(view, scores, t) {
  return `${quoted(view.texts[t])}, token ${t}: S_T ${digits(scores.semantic[t])} (scaled ${digits(scores.semantic_hat[t])}), `
    + `S_I ${digits(scores.entropy[t])} nats (scaled ${digits(scores.entropy_hat[t])}), `
    + (scores.kept[t] ? `kept with weight ${digits(scores.weights[t])}` : 'not kept') + (view.flagged[t] ? '; punctuation or blank' : '');
}

function aboutSelected(view, scores, tokens) {
  if (!tokens.length) return view.T ? 'Point at a word to see where it looked, at the image to see a cell.' : '';
  return `${tokens.length} tokens, weight ${digits(sum(tokens.map(t => scores.weights[t])))} together`;
}

const covers = ({ W, H }, { box: [x1, y1, x2, y2] }, [row, column]) => x1 * W < column + 1 && x2 * W > column && y1 * H < row + 1 && y2 * H > row;

function aboutCell(view, map, [row, column], state) {
  const value = map[row * view.W + column], total = sum(map), inside = view.boxes.filter(one => state[`box_${one.kind}`] && covers(view, one, [row, column]));
  return `row ${row}, column ${column}: ${digits(value)}` + (total > 0 ? `, ${digits(100 * value / total)} % of this map` : '')
    + (inside.length ? `; in ${inside.slice(0, 3).map(one => quoted(nameOf(one))).join(', ')}` : '');
}

function aboutLooks(view, shares, [row, column]) {
  const looking = [...shares.keys()].filter(t => shares[t] > 0).sort((a, b) => shares[b] - shares[a]);
  const first = looking.slice(0, 3).map(t => `${quoted(view.texts[t])} ${digits(100 * shares[t])} %`);
  return `row ${row}, column ${column}: ${looking.length} of ${view.T} tokens look here` + (first.length ? `, most ${first.join(', ')}` : '');
}

// ---- 5 Drawing ----

// matplotlib's cividis, every 15th of 256 colours: the same to people who do not tell red from green.
const STOPS = '00224e 002d68 163770 2e416d 3f4c6c 4e566c 5c616e 696b71 767676 838179 928c78 a09875 afa471 bfb06b cfbd62 dfca57 f0d846 fee838'.split(' ').map(colour => '#' + colour);
const GRADIENT = `linear-gradient(90deg, ${STOPS.join()})`;
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const [left, right] = [Math.floor(i / 15), Math.ceil(i / 15)].map(at => [1, 3, 5].map(from => parseInt(STOPS[at].slice(from, from + 2), 16)));
  return left.map((value, channel) => value + (right[channel] - value) * (i / 15 % 1));
});

/** The map as pixels over the image; strong evidence covers it, weak evidence lets it through. */
function paint(canvas, pixels, [height, width], [low, high], opacity) {
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext('2d'), picture = context.createImageData(width, height), words = new Uint32Array(picture.data.buffer);
  const table = new Uint32Array(256), bytes = new Uint8Array(table.buffer), scale = high > low ? 255 / (high - low) : 0;
  for (let i = 0; i < 256; i++) bytes.set([...COLOURS[i], 255 * opacity ** (2.8 - 2.3 * i / 255)].map(Math.round), 4 * i);
  for (let i = 0; i < pixels.length; i++) words[i] = table[Math.max(0, Math.min(255, (pixels[i] - low) * scale + .5 | 0))];
  context.putImageData(picture, 0, 0);
}

/** The border of a mask as an SVG path: its edges, neighbours joined; one cell is x wide and y high. */
export function outline(mask, [H, W], x = 1, y = 1) {
  const at = (r, c) => r >= 0 && c >= 0 && r < H && c < W && mask[r * W + c] > 0, n = value => Math.round(value * 100) / 100;
  let path = '';
  const edges = (lines, length, at, draw) => {
    for (let i = 0; i <= lines; i++) for (let j = 0, from = -1; j <= length; j++) {
      const edge = j < length && at(i - 1, j) !== at(i, j);
      if (edge && from < 0) from = j;
      if (!edge && from >= 0) { path += draw(i, from, j); from = -1; }
    }
  };
  edges(H, W, at, (r, from, to) => `M${n(from * x)} ${n(r * y)}H${n(to * x)}`);
  edges(W, H, (c, r) => at(r, c), (c, from, to) => `M${n(c * x)} ${n(from * y)}V${n(to * y)}`);
  return path;
}

// ---- 6 Page ----

/** An element: what it knows as a property is set, the rest become attributes; children that are text stay text. */
function h(tag, properties = {}, ...children) {
  const svg = tag.startsWith('svg:'), element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(properties))
    if (key in element && !svg) element[key] = value; else element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Text of our own with its indices set low: S_T. */
function pretty(text, name = '') {
  return h('span', { class: name }, ...text.split(/_(\w)/).map((part, i) => i % 2 ? h('sub', {}, part) : part));
}

const STYLE = `
.readl-viewer{
  color-scheme:light dark;container-type:inline-size;
  --paper:light-dark(#fff, #16181d);--ink:light-dark(#1b1e24, #e9e7e2);--soft:light-dark(#5c626d, #a3a8b2);--line:light-dark(#d9dce1, #383d47);
  --panel:light-dark(#f5f6f8, #1f2229);--shade:light-dark(#e8b21d, #9c7200);--accent:light-dark(#0b5cad, #7db8ff);--look:light-dark(#9b1f7a, #f49ad8);
  --warm:light-dark(#8a6d1f, #d8bd6a);--serif:Charter, "Bitstream Charter", Georgia, serif;
  font:13px/1.5 system-ui, sans-serif;font-variant-numeric:tabular-nums;color:var(--ink);background:var(--paper);padding:12px;overflow-wrap:anywhere;
  & *, & *::before, & *::after{box-sizing:border-box}
  & :focus-visible{outline:2.5px solid var(--accent);outline-offset:2px}
  & .error{color:light-dark(#a11, #ff9b93);font-weight:600;margin-bottom:8px; &:empty{display:none}}
  & sub{font-size:.72em;line-height:0}

  & .bar, & .row{display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center}
  & .bar{margin-bottom:12px} & .row{margin-top:8px}
  & .presets{display:inline-flex;border:1px solid var(--line);border-radius:8px;overflow:hidden;
    & button{border:0;border-radius:0;outline-offset:-3px} & button + button{border-left:1px solid var(--line)}}
  & .presets button, & .row button{font:inherit;color:var(--ink);background:var(--paper);padding:4px 12px;min-height:28px;cursor:pointer; &:hover{background:var(--panel)}}
  & .presets button[aria-pressed=true]{background:var(--ink);color:var(--paper)}
  & .row button{border:1px solid var(--line);border-radius:8px}
  & label{display:inline-flex;gap:6px;align-items:center;min-height:24px}
  & output{white-space:nowrap} & .bar output{min-width:2.3em} & input{accent-color:var(--accent);margin:0} & input[type=checkbox]{width:16px;height:16px}
  & input[type=range]{width:100px;height:24px}
  & select{font:inherit;color:inherit;background:var(--paper);border:1px solid var(--line);border-radius:6px;padding:2px 4px;min-height:26px}

  & .views{display:grid;grid-template-columns:repeat(auto-fit, minmax(min(100%, 300px), 1fr));gap:24px 28px}
  & .view, & .figure{min-width:0}
  & .head{display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline;margin-bottom:8px;font-size:15px}
  & .name{font-weight:650} & .verdict{border:1.5px solid currentColor;border-radius:99px;padding:0 10px;font-size:13px;font-weight:600}
  & .notes{margin:0 0 8px;padding:0;list-style:none;color:var(--soft); & li::before{content:"⚠ "} &:empty{display:none}}
  & .body{display:flex;flex-direction:column} & .figure{display:contents; &>*{max-width:var(--wide)}}
  & .stage{position:relative;width:100%;aspect-ratio:var(--aspect);cursor:crosshair;border-radius:3px;
    &>*{position:absolute;inset:0;width:100%;height:100%;display:block;margin:0;max-width:none;border-radius:inherit;pointer-events:none}
    &.mapped img{filter:grayscale(1)}}
  & svg path{fill:none;vector-effect:non-scaling-stroke}
  & .halo{stroke:#000a;stroke-width:3.5} & .line{stroke:#fff;stroke-width:1.5}
  & .truth{& .line{stroke:#000} & .halo{stroke:#fff;stroke-width:4}} & .region path{stroke-width:1}
  & .chosen{& .line{stroke-width:3} & .halo{stroke-width:6}}
  & .boxes .line{stroke:var(--box);stroke-width:2} & .boxes .halo{stroke:#000c;stroke-width:4.5}
  & .predicted{--box:#e8711a} & .true{--box:#6cc0f5;& path{stroke-dasharray:9 5}} & .hint{--box:#e58fc0;& path{stroke-dasharray:0 9;stroke-linecap:round} & .line{stroke-width:3}} & .map{--box:#1fc795;& path{stroke-dasharray:12 4 2 4}}
  & .chip{position:absolute;padding:0 4px;font-size:11px;line-height:15px;color:#000;background:var(--box);border-radius:2px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;unicode-bidi:isolate}
  & .chips:has(:nth-child(4)) .chip:not(.near){display:none}   /* many would hide what they name */
  & .swatch{width:30px;height:12px;background:#222;border-radius:2px}
  & .pair{display:grid;grid-template-columns:2fr 1fr;gap:6px;align-items:start;background:var(--paper)} & .reference{margin:0;font-size:12px;color:var(--soft)}
  & .twin{position:relative;cursor:crosshair; & img{display:block;width:100%;margin:0;border-radius:3px} & svg{position:absolute;inset:0;width:100%;height:100%;pointer-events:none}}
  & svg text{font:700 15px system-ui, sans-serif;fill:#fff;stroke:#000;stroke-width:3px;paint-order:stroke;text-anchor:middle;dominant-baseline:central}
  & .caption{display:flex;gap:12px;justify-content:space-between;margin-top:4px;white-space:nowrap; &>:first-child{overflow:hidden;text-overflow:ellipsis}}
  & .scale{display:inline-flex;gap:5px;align-items:center;font-size:12px;color:var(--soft); & i{width:50px;height:9px;border-radius:2px;background: ${GRADIENT}}}
  & [hidden]{display:none} & .readout, & .terms, & .measures{color:var(--soft);margin-top:4px; & b{color:var(--ink)}}
  & .readout{height:4.5em;overflow-y:auto}   /* fixed:the words below must not slip from under the pointer */
  & .measures{display:grid;grid-template-columns:repeat(auto-fit, minmax(7.4em, 1fr));gap:0 8px;white-space:nowrap}
  & .terms{order:1;font-size:12px}   /* below the words where these are below the image */
  & .stack{display:flex;height:15px;margin:3px 0;gap:1px; & span{background:var(--panel);border:1px solid var(--line);color:var(--ink);font-size:10px;line-height:13px;text-align:center;overflow:hidden;min-width:2px}}

  & .prose{font:16px/2.05 var(--serif);max-width:46em;max-height:34rem;overflow-y:auto;padding:2px 6px 2px 3px;margin-top:10px; & p{margin:0;min-height:1em}}
  & .rest{color:var(--soft);unicode-bidi:isolate} & .word{white-space:nowrap}
  & .token{display:inline-block;position:relative;isolation:isolate;border:0;background:none;color:inherit;font:inherit;line-height:1.35;text-align:start;cursor:pointer;
    margin:0;padding:1px 0 7px;min-width:.3em;max-width:100%;border-radius:3px;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
    & i{position:absolute;left:0;pointer-events:none}
    & .weight{inset:1px -1px 7px;z-index:-1;border-radius:3px;background:var(--shade);opacity:calc(.75 * var(--w, 0))}
    & .st, & .si{height:2px;width:100%;transform-origin:left} & .st{bottom:3px;background:var(--accent);transform:scaleX(var(--t, 0))} & .si{bottom:0;background:var(--warm);transform:scaleX(var(--i, 0))}
    &:hover{box-shadow:0 0 0 1.5px var(--soft)} &:focus-visible{outline-offset:1px;z-index:1}
    &.blank::before{content:"␣";color:var(--soft);font-size:.8em} &.break::before{content:"⏎"}
    &[data-kept="1"]{background:linear-gradient(var(--ink) 0 0) 0 calc(100% - 6px) / 100% 2px no-repeat}   /* an underline that needs no new layout */
    &::after{content:"";position:absolute;top:-3px;left:calc(50% - 2px);width:4px;height:4px;border-radius:50%;background:var(--ink);opacity:0}
    &[data-kept="1"]::after{opacity:1}
    &.looks-here{box-shadow:0 0 0 2px color-mix(in srgb, var(--look) calc(25% + 75% * var(--l)), transparent)}
    &[aria-pressed=true]{background:var(--ink) content-box;color:var(--paper); &::before{color:inherit} & .weight{visibility:hidden}}}

  & .panel{margin-top:14px;border-top:1px solid var(--line);padding-top:10px}
  & .sliders{display:grid;grid-template-columns:repeat(auto-fit, minmax(min(100%, 260px), 1fr));gap:4px 20px; & label{display:grid;grid-template-columns:1.2em 1fr 12em} & input{width:100%}}
  &.alone .sliders label{grid-template-columns:1.2em 1fr 7em}
  & .formula{color:var(--soft);font:italic 14px var(--serif)}
  & details{margin-top:8px} & summary{cursor:pointer;min-height:24px;color:var(--soft);width:fit-content} & details p{margin:4px 0;max-width:60em}
  & .said{flex-basis:100%; &:empty{display:none} & code{display:block;background:var(--panel);padding:6px 8px;border-radius:6px;font-size:12px;user-select:all;max-height:8em;overflow:auto}}
  &.alone{@container (min-width:720px){
    & .body{display:grid;gap:0 28px;grid-template-columns:minmax(300px, 440px) minmax(0, 1fr)} & .figure{display:block} & .prose{margin-top:0}
    & .paired .body{grid-template-columns:minmax(300px, min(640px, 55%)) minmax(0, 1fr)} & .pair{grid-template-columns:1fr 1fr}}}
  @container (max-width:500px){& .stage, & .pair{position:sticky;top:0;z-index:2}}
}
[data-jp-theme-light="true"] .readl-viewer{color-scheme:light}
[data-jp-theme-light="false"] .readl-viewer{color-scheme:dark}
`;

const HELP = [
  'Underline and dot: kept, part of the anomaly map. Shade: weight w. Bars under a word, longer is better: upper S_T, how much it is about anomalies; lower S_I, how concentrated its look is. Inverted: selected. Framed: looks at the chosen cell.',
  'Pointer: over a word shows its map, click locks it, Shift-click selects up to there, Ctrl-click adds one. A click on the image finds the words that look there.',
  'Keys: Tab reaches text and image, arrows move, Shift and arrows select, Space or Enter locks, Escape clears.',
];

const MORE_HELP = 'Found: true boxes with a predicted one of their own at IoU 0.5 or more. Box IoU: mean over the true boxes of their best predicted one.';

/** The response as prose: words that wrap as words, tokens that are buttons, lines that are paragraphs. */
function buildProse(view) {
  const prose = h('div', { class: 'prose', role: 'group', ariaLabel: 'response of the model' }), buttons = Array(view.T);
  let line, word, letters;
  const newLine = () => { prose.append(line = h('p', { dir: 'auto' })); word = null; };
  const between = text => {   // blanks stay text, so that the page reads and copies as the response; a line break ends the paragraph
    for (const part of text.split(/(\n+)/)) if (part) { line.append(part); word = null; if (part.includes('\n')) newLine(); }
  };
  const inWord = element => {   // the tokens of one word stay on one line, up to a length that fits a small screen
    if (!word || letters > 24) { line.append(word = h('span', { class: 'word' })); letters = 0; }
    letters += element.textContent.length;
    if (letters > 24) word.className = '';
    word.append(element);
  };
  newLine();
  for (const [text, t] of view.pieces) {
    const body = text.trim(), start = body ? text.indexOf(body) : 0, mine = t >= 0 && t < view.T && !buttons[t];
    between(body ? text.slice(0, start) : mine && text.includes('\n') ? '' : text);
    if (mine) inWord(buttons[t] = tokenButton(view, t, body));
    else if (body && !/\s/.test(body)) inWord(h('span', { class: 'rest' }, body));
    else for (const part of body.split(/(\n+)/)) if (part.trim()) { line.append(h('span', { class: 'rest' }, part)); word = null; } else between(part);
    between(body ? text.slice(start + body.length) : mine && text.includes('\n') ? text : '');
  }
  return { prose, buttons };
}

function tokenButton(view, t, body) {
  const kind = body ? '' : view.texts[t].includes('\n') ? ' blank break' : ' blank', bar = name => h('i', { class: name });
  return h('button', { type: 'button', class: 'token' + kind, 'data-token': t, ariaPressed: 'false', tabIndex: -1 }, bar('weight'), body, bar('st'), bar('si'));
}

/** A pair of paths: a dark one under a light one is seen on every colour. */
function doubleLine(name) {
  const paths = ['halo', 'line'].map(kind => h('svg:path', { class: kind }));
  let drawn = '';
  return { group: h('svg:g', { class: name }, ...paths), set: d => { if (d !== drawn) for (const path of paths) path.setAttribute('d', drawn = d); } };
}

const isPicture = address => /^data:image\/(jpeg|png|webp);base64,/.test(address);   // nothing is fetched, whatever the data says

function buildStage(view) {
  const long = 420 / Math.max(view.width, view.height), box = [view.width * long, view.height * long];
  const image = h('img', { alt: `the inspected image ${view.name}` }), overlay = h('canvas');
  if (isPicture(view.image)) image.src = view.image;
  const lines = Object.fromEntries(['components', 'truth', 'region', 'hover', 'chosen'].map(name => [name, doubleLine(name)])), numbers = h('svg:g');
  const kinds = kindsOf(view.boxes).map(kind => buildBoxes(ofKind(view.boxes, kind), kind, box));
  const svg = h('svg:svg', { viewBox: `0 0 ${box.join(' ')}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' }, ...Object.values(lines).map(line => line.group), numbers);
  lines.hover.group.before(...kinds.map(({ line }) => line.group));
  const stage = h('div', { class: 'stage', tabIndex: 0, role: 'application', ariaLabel: `Image of ${view.H} by ${view.W} cells: arrows move, Enter finds the words that look there${view.boxes.slice(0, 10).map(one => '; ' + nameOf(one)).join('')}.` }, image, overlay, svg, ...kinds.map(({ chips }) => chips));
  return { stage, image, overlay, lines, numbers, kinds, box, cell: [box[0] / view.W, box[1] / view.H], ...buildReference(view) };
}

/** The boxes of one kind: lines, and a chip with the name at each. */
function buildBoxes(boxes, kind, [w, tall]) {
  const line = doubleLine(`boxes ${kind}`), chips = h('div', { class: 'chips', ariaHidden: 'true' });
  for (const { box: [x1, y1, x2, y2], label } of boxes) {
    // above, below, inside at the top or the bottom: equal boxes of two kinds keep both names
    const [edge, down] = { predicted: y1 > .08 ? ['bottom', 1 - y1] : ['top', y1], true: y2 < .92 ? ['top', y2] : ['bottom', 1 - y2], hint: ['top', y1], map: ['bottom', 1 - y2] }[kind];
    const [side, across] = x1 + x2 > 1 ? ['right', 1 - x2] : ['left', x1];
    chips.append(h('span', { class: `chip ${kind}`, style: `${edge}:${100 * down}%;${side}:${100 * across}%;max-width:${100 * (1 - across)}%` }, nameOf({ kind, label })));
  }
  const d = boxes.map(({ box: [x1, y1, x2, y2] }) => `M${x1 * w} ${y1 * tall}H${x2 * w}V${y2 * tall}H${x1 * w}z`).join('');
  return { kind, boxes, line, chips, d };
}

/** The normal image; a cell is the same share of it. */
function buildReference(view) {
  if (!isPicture(view.reference)) return {};
  const twins = { hover: doubleLine('hover'), chosen: doubleLine('chosen') }, normal = h('img', { alt: `normal reference of ${view.name}`, src: view.reference });
  const svg = h('svg:svg', { viewBox: `0 0 ${view.W} ${view.H}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' }, twins.hover.group, twins.chosen.group);
  return { twins, normal, reference: h('figure', { class: 'reference' }, h('div', { class: 'twin' }, normal, svg), h('figcaption', {}, 'reference')) };
}

function boxMeasures({ boxes }) {
  const of = kind => ofKind(boxes, kind).map(({ box }) => box), truth = of('true'), value = (name, text) => h('b', { 'data-measure': name }, text);
  const { matched, mean } = boxMatch(of('predicted'), truth);
  return !truth.length ? [] : [h('span', {}, 'box IoU ', value('box-iou', digits(mean))), h('span', {}, 'found ', value('boxes', matched), `/${truth.length}`)];
}

function buildView(view, v, compared) {
  const part = { ...buildStage(view), ...buildProse(view), title: h('span'), low: h('span'), high: h('span'), terms: h('div', { class: 'terms' }), notes: h('ul', { class: 'notes' }) };
  part.readout = h('div', { class: 'readout', 'aria-live': 'polite' });
  part.measures = Object.fromEntries(['entropy', 'kept', 'iou', 'auroc'].map(name => [name, h('b', { 'data-measure': name })]));
  const { entropy, kept, iou: overlap, auroc: area } = part.measures, known = view.truth ? [h('span', {}, 'IoU ', overlap), h('span', {}, 'AUROC ', area)] : [];
  if (compared) known.push(...boxMeasures(view));
  const measures = h('div', { class: 'measures' }, h('span', {}, pretty('S_I '), entropy, ' nats'), h('span', {}, 'kept ', kept, ` of ${view.T}`), ...known);
  const caption = h('div', { class: 'caption' }, part.title, h('span', { class: 'scale' }, part.low, h('i'), part.high));
  const screen = part.reference ? h('div', { class: 'pair' }, part.stage, part.reference) : part.stage;
  const figure = h('div', { class: 'figure' }, screen, caption, part.readout, measures, part.terms);
  const head = h('div', { class: 'head' }, h('span', { class: 'name' }, view.name), h('span', { class: 'verdict' }, view.verdict));
  part.section = h('section', { class: part.reference ? 'view paired' : 'view', 'data-view': v, ariaLabel: `inspection ${v + 1}: ${view.name}` }, head, part.notes, h('div', { class: 'body' }, figure, part.prose));
  part.section.style.setProperty('--wide', `${Math.round((part.reference ? 640 : 440) * Math.min(1, 1.2 * view.width / view.height))}px`);
  part.stage.style.setProperty('--aspect', `${view.width} / ${view.height}`);
  return part;
}

const SPOKEN = { tau_t: 'threshold of semantic relevance', tau_i: 'threshold of concentration', alpha: 'weight of semantic relevance', beta: 'weight of concentration',
  opacity: 'opacity of the map', cut: 'share of the maximum above which a pixel counts as defect' };

function buildControls(views) {
  const low = least(views.map(view => view.low)), high = most(views.map(view => view.high)), top = name => most(views.map(view => view.config[name]), 1), output = {};
  const truth = views.some(view => view.truth), [L, H] = ['layers', 'heads'].map(key => most(views.map(view => view.heads?.[key] ?? 0)));
  const range = (name, text, min = 0, max = 1) => h('label', { title: SPOKEN[name] }, pretty(text), h('input', { type: 'range', name, min, max, step: (max - min) / 200, ariaLabel: SPOKEN[name] }), output[name] = h('output'));
  const check = (name, ...texts) => h('label', {}, h('input', { type: 'checkbox', name }), ...texts);
  const swatch = kind => h('svg:svg', { class: `swatch boxes ${kind}`, viewBox: '0 0 30 12', 'aria-hidden': 'true' }, h('svg:path', { class: 'line', d: 'M3 6H27' }));
  const choose = (name, text, options) => h('label', {}, text, h('select', { name }, ...options.map(([value, label]) => h('option', { value }, label))));
  const press = (kind, names) => Object.entries(names).map(([name, text]) => h('button', { type: 'button', [`data-${kind}`]: name }, text));
  const numbered = count => [['', 'mean of all'], ...Array.from({ length: count }, (_, i) => [i, i])];
  const bar = h('div', { class: 'bar' }, h('div', { class: 'presets', role: 'group', ariaLabel: 'map to show' }, ...press('preset', { rdam: 'RDAM', kept: 'Kept tokens', all: 'All tokens' })),
    range('opacity', 'Opacity'), check('components', 'Components of a token’s map'), ...(truth ? [check('contour', 'Defect contour')] : []),
    ...kindsOf(views.flatMap(view => view.boxes)).map(kind => check(`box_${kind}`, `Boxes: ${kind}`, swatch(kind))));
  const sliders = h('div', { class: 'sliders' }, range('tau_t', 'τ_T', low, high), range('tau_i', 'τ_I', low, high), range('alpha', 'α', 0, top('alpha')), range('beta', 'β', 0, top('beta')));
  const formula = pretty('w = (α Ŝ_T + β Ŝ_I) · [Ŝ_T > τ_T] · [Ŝ_I > τ_I],  RDAM = Σ_t w_t A_t', 'formula');
  const more = h('details', {}, h('summary', {}, 'More: several tokens, layers and heads, sinks'), h('div', { class: 'row' },
    choose('combine', 'Several tokens', [['mean', 'mean'], ['weighted', 'weighted sum']]), ...(L ? [choose('layer', 'Layer', numbered(L)), choose('head', 'Head', numbered(H))] : []),
    check('sinks', 'Subtract the mean over tokens (attention sinks)'), ...(truth ? [range('cut', 'IoU above this share of the maximum')] : [])));
  if (!L) more.append(h('p', {}, 'Layers and heads: not captured; TokenViewer(..., heads=True) keeps them.'));
  const said = h('div', { class: 'said', role: 'status' });
  const actions = h('div', { class: 'row' }, ...press('action', { png: 'Save PNG', html: 'Save HTML', code: 'Copy Python', link: 'Copy link' }), said);
  const help = h('details', {}, h('summary', {}, 'How to read and use this'), ...HELP.concat(views.some(view => view.boxes.length || view.reference) ? MORE_HELP : []).map(text => h('p', {}, pretty(text))));
  const panel = h('div', { class: 'panel', role: 'group', ariaLabel: 'thresholds and export' }, sliders, h('div', { class: 'row' }, formula, ...press('action', { own: 'Reset thresholds' })), more, actions, help);
  more.classList.add('more');
  return { bar, panel, output, said, more };
}

// ---- 7 Viewer ----

function render({ model, el }) {
  const stop = new AbortController(), listen = (target, kind, f) => target.addEventListener(kind, f, { signal: stop.signal });
  const root = h('div', { class: 'readl-viewer', 'data-lm-suppress-shortcuts': 'true' });   // JupyterLab leaves our keys alone
  const error = h('div', { class: 'error', role: 'alert' });
  let views = [], parts = [], controls, state, frame = 0, saving = 0, written = '';
  let asked = false, preview = null, pointed = null, anchor = null;   // where pointer and keys are: token {v, t}, cell {v, row, column}, start of a selection {v, t}
  el.replaceChildren(root);

  function build() {
    preview = pointed = anchor = null; views = [];
    root.replaceChildren(h('style', {}, STYLE), error);
    try {
      const data = model.get('data');
      if (data?.version !== 1 || !data.views?.length) throw new Error('there is no inspection in it; give TokenViewer at least one.');
      views = data.views.map(prepareView);
      const compared = kindsOf(views.flatMap(view => view.boxes)).includes('predicted');   // beside them, a model without any found none
      parts = views.map((view, v) => buildView(view, v, compared)); controls = buildControls(views);
    } catch (problem) { views = []; error.textContent = `The viewer cannot show this: ${problem.message}`; return; }
    root.classList.toggle('alone', views.length === 1);
    root.append(controls.bar, h('div', { class: 'views' }, ...parts.map(part => part.section)), controls.panel);
    for (const { buttons } of parts) { const first = buttons.find(Boolean); if (first) first.tabIndex = 0; }
    listen(controls.more, 'toggle', later);
    adopt(linked() ?? model.get('state'));
  }

  /** The state of a link, in a page that has an address of its own. */
  function linked() {
    if (!model.page || !location.hash.startsWith('#state=')) return null;
    try { return JSON.parse(decodeURIComponent(location.hash.slice(7))); } catch { return null; }
  }

  function adopt(raw) {
    state = cleanState(raw, views); written = JSON.stringify(state);
    if (state.layer !== null || state.head !== null || state.sinks) controls.more.open = true;
    fillControls(); later();
  }

  function change(changed) {
    state = { ...state, ...changed };
    later();
    clearTimeout(saving); saving = setTimeout(save, 100);   // a slider must not flood the kernel
  }

  function save() {
    clearTimeout(saving); saving = 0; written = JSON.stringify(state);
    model.set('state', state); model.save_changes?.();
  }

  // One redraw a frame, whatever happened in it. Only what changed is written to the page.

  function later() { frame ||= requestAnimationFrame(redraw); }

  function redraw() {
    frame = 0;
    if (!views.length) return;
    const all = views.map(view => scored(view, state)), maps = views.map((view, v) => shown(view, v, state, preview?.v === v ? preview.t : null));
    error.textContent = all.every(({ alpha, beta }) => alpha + beta > 0) ? '' : 'α and β are both 0: move one of them up.';
    views.forEach((view, v) => {
      const alike = maps.filter(map => map.kind === maps[v].kind).map(map => map.range), range = [least(alike.map(r => r[0])), most(alike.map(r => r[1]))];
      drawMap(view, parts[v], maps[v], range);
      drawComponents(view, parts[v], maps[v], all[v]);
      drawNotes(view, parts[v], all[v]);
      drawTokens(view, parts[v], v, all[v]);
      drawCells(view, parts[v], v, maps[v], all[v]);
      drawBoxes(view, parts[v], v);
    });
    fillOutputs();
  }

  function drawMap(view, part, { map, title }, range) {
    const key = [...range, state.opacity].join(), same = part.key === key && map.every((value, i) => value === part.map[i]);
    if (!same) {
      part.pixels = toPixels(map, [view.H, view.W], view.size);
      paint(part.overlay, part.pixels, view.size, range, state.opacity);
      part.stage.classList.toggle('mapped', state.opacity > 0);
      Object.assign(part, { key, map });
    }
    part.title.textContent = title; part.low.textContent = digits(range[0]); part.high.textContent = digits(range[1]);
    if (view.truth) drawTruth(view, part, same);
  }

  function drawTruth(view, part, same) {
    const cell = [part.box[0] / view.size[1], part.box[1] / view.size[0]], wanted = state.contour && controls.more.open, top = wanted && most(part.pixels) * state.cut;
    part.contour ??= outline(view.truth, view.size, ...cell);
    part.lines.truth.set(state.contour ? part.contour : '');
    // what the IoU compares the defect with is drawn while its slider is in sight
    part.lines.region.set(wanted ? outline(part.pixels.map(value => value > top), view.size, ...cell) : '');
    if (!same) part.measures.auroc.textContent = digits(auroc(part.pixels, view.truth));
    if (!same || part.cut !== state.cut) part.measures.iou.textContent = digits(iou(part.pixels, view.truth, part.cut = state.cut));
  }

  function drawComponents(view, part, { map, tokens, preset, kind }, scores) {
    const shape = [view.H, view.W], [x, y] = part.cell, { mask, terms } = entropyTerms(map, shape, view.config.binarise);
    const total = terms.length ? sum(terms.map(one => one.term)) : Infinity, wanted = state.components && preset !== 'rdam';
    part.measures.entropy.textContent = digits(tokens.length === 1 && kind === 'attention' ? scores.entropy[tokens[0]] : total);   // Python's own where there is one
    part.measures.kept.textContent = sum(scores.kept);
    part.lines.components.set(wanted ? outline(mask, shape, x, y) : '');
    part.numbers.replaceChildren(...(wanted ? terms.slice(0, 9) : []).map(({ peak }, i) => h('svg:text', { x: (peak % view.W + .5) * x, y: (Math.floor(peak / view.W) + .5) * y }, `${i + 1}`)));
    drawTerms(part.terms, wanted ? terms : null, total);
  }

  /** S_I = sum of -P log P: a bar whose parts are the terms, and the sum written out. */
  function drawTerms(box, terms, total) {
    box.hidden = !state.components;
    if (!terms?.length) return box.replaceChildren(...(terms ? [pretty('nothing stands out: no component, S_I = ∞')] : []));
    const rest = terms.slice(4), two = P => Number(P.toPrecision(2));
    const stack = (total > 0 ? terms : []).map(({ term }, i) => h('span', { style: `flex: ${100 * term / total} 0 0` }, term > .06 * total ? `${i + 1}` : ''));
    const written = terms.slice(0, 4).map(({ P }) => `− ${two(P)} log ${two(P)}`).join(' ') + (rest.length ? ` + ${digits(sum(rest.map(one => one.term)))} of ${rest.length} smaller` : '');
    box.replaceChildren(h('div', { class: 'stack', ariaHidden: 'true' }, ...stack), pretty(`S_I = − Σ P log P = ${written} = `), h('b', {}, digits(total)), ' nats');
  }

  function drawNotes(view, part, scores) {
    const notes = [...view.notes];
    if (scores.fellBack && !scores.own) notes.push(`no token passed both thresholds: the heaviest ${sum(scores.kept)} are kept`);
    if ((state.layer ?? state.head) !== null && !scores.inside) notes.push('this layer or head was not captured here: the mean is shown');
    if (part.noted !== (part.noted = notes.join())) part.notes.replaceChildren(...notes.map(note => h('li', {}, note)));
  }

  function drawTokens(view, part, v, scores) {
    const pressed = new Set(state.selected[v]), scaled = value => (value - view.low) / (view.high - view.low);
    const cell = cellOf(v), looks = cell && looksOf(view, part, scores.maps, cell[0] * view.W + cell[1]), highest = looks ? most(looks) : 0;
    part.buttons.forEach((button, t) => {
      const was = button.drawn ?? {}, word = view.texts[t].trim() || quoted(view.texts[t]);
      const now = button.drawn = { w: scores.weights[t] / (scores.heaviest || 1), t: scaled(scores.semantic_hat[t]), i: scaled(scores.entropy_hat[t]),
        l: highest > 0 ? looks[t] / highest : 0, kept: scores.kept[t], pressed: pressed.has(t) };
      for (const name of ['w', 't', 'i', 'l']) if (now[name] !== was[name]) button.style.setProperty(`--${name}`, now[name].toFixed(3));
      if (now.l !== was.l) button.classList.toggle('looks-here', now.l > 0);
      if (now.kept !== was.kept) { button.dataset.kept = now.kept; button.ariaLabel = word + (now.kept ? ', kept' : ''); }
      if (now.pressed !== was.pressed) button.ariaPressed = now.pressed;
    });
  }

  function looksOf(view, part, maps, cell) {
    if (part.looks?.maps !== maps || part.looks.cell !== cell) part.looks = { maps, cell, shares: looksAt(maps, cell, view.cells, view.config.binarise) };
    return part.looks.shares;
  }

  function drawBoxes(view, { kinds }, v) {
    const here = pointed?.v === v && [pointed.row, pointed.column];
    for (const { kind, boxes, line, chips, d } of kinds) {
      line.set(state[`box_${kind}`] ? d : ''); chips.hidden = !state[`box_${kind}`];
      boxes.forEach((box, i) => chips.children[i].classList.toggle('near', here && covers(view, box, here)));
    }
  }

  /** The chosen cell in view v; views of one size and grid show the same place. */
  function cellOf(v) {
    if (!state.cell) return null;
    const [from, ...cell] = state.cell;
    return ['H', 'W', 'width', 'height'].every(key => views[from][key] === views[v][key]) ? cell : null;
  }

  function drawCells(view, part, v, { map, tokens, preset }, scores) {
    const [x, y] = part.cell, box = cell => cell ? `M${cell[1] * x} ${cell[0] * y}h${x}v${y}h${-x}z` : '';
    const here = pointed?.v === v ? [pointed.row, pointed.column] : null, chosen = cellOf(v), token = preview?.v === v ? preview.t : tokens.length === 1 && !preset ? tokens[0] : null;
    part.lines.hover.set(box(here)); part.lines.chosen.set(box(chosen));
    for (const [name, cell] of [['hover', here], ['chosen', chosen]]) part.twins?.[name].set(cell ? `M${cell[1]} ${cell[0]}h1v1h-1z` : '');
    const text = here ? aboutCell(view, map, here, state) : token !== null ? aboutToken(view, scores, token) : chosen ? aboutLooks(view, part.looks.shares, chosen) : aboutSelected(view, scores, state.selected[v]);
    if (part.readout.textContent !== text) part.readout.textContent = text;
  }

  const own = name => views.map(view => scored(view, state)[name]);   // of each view, while the state says nothing

  function fillControls() {
    for (const input of root.querySelectorAll('input, select'))
      if (input.type === 'checkbox') input.checked = state[input.name];
      else input.value = state[input.name] ?? '';   // a view's own thresholds: in fillOutputs
  }

  function fillOutputs() {
    for (const [name, output] of Object.entries(controls.output)) {
      const values = state[name] === null ? own(name) : [state[name]], ends = new Set([least(values), most(values, -Infinity)].map(digits));
      output.textContent = [...ends].join(' to ') + (state[name] === null ? ' own' : '');
      if (state[name] === null) output.previousElementSibling.value = values[0];   // the view's own may move: other layers, no sinks
    }
    for (const button of controls.bar.querySelectorAll('[data-preset]')) button.ariaPressed = button.dataset.preset === state.preset;
  }

  listen(root, 'input', ({ target: { name, type, value, checked } }) => {
    if (name in DEFAULTS) change({ [name]: type === 'checkbox' ? checked : name === 'combine' ? value : value === '' ? null : Number(value) });
  });

  listen(root, 'click', event => {
    const [token, button, stage] = ['.token', 'button', '.stage, .twin'].map(kind => event.target.closest(kind));
    if (token) selectToken(placeOf(token), event);
    else if (button?.dataset.preset) { preview = null; change({ preset: button.dataset.preset, selected: views.map(() => []) }); }
    else if (button) actions[button.dataset.action]();
    else if (stage) chooseCell(cellAt(event, stage));
  });

  // Tokens: hover previews, click locks, Shift selects up to here, Ctrl adds one.

  const viewOf = element => Number(element.closest('.view').dataset.view), placeOf = token => ({ v: viewOf(token), t: Number(token.dataset.token) });
  const upTo = (a, b) => Array.from({ length: Math.abs(a - b) + 1 }, (_, i) => Math.min(a, b) + i);

  function selectToken({ v, t }, { shiftKey, ctrlKey, metaKey }) {
    const list = state.selected[v], only = list.length === 1 && list[0] === t;
    const range = shiftKey && anchor?.v === v, add = ctrlKey || metaKey;
    select(v, range ? upTo(anchor.t, t) : add ? (list.includes(t) ? list.filter(one => one !== t) : [...list, t].sort((a, b) => a - b)) : only ? [] : [t]);
    if (!range) anchor = { v, t };
    focusToken(v, t, false);
  }

  function select(v, tokens) {
    const selected = state.selected.map((list, i) => i === v ? tokens : list), some = selected.some(list => list.length);
    if (!tokens.length) preview = null;
    change({ selected, preset: some ? null : 'rdam' });
  }

  function focusToken(v, t, move = true) {
    for (const button of parts[v].section.querySelectorAll('.token[tabindex="0"]')) button.tabIndex = -1;   // one stop for Tab
    parts[v].buttons[t].tabIndex = 0;
    if (move) parts[v].buttons[t].focus();
  }

  const follow = (kind, f) => listen(root, kind, event => { f(event); later(); });
  follow('pointerover', ({ target }) => { const token = target.closest('.token'); preview = token && placeOf(token); });
  follow('pointermove', event => { const stage = event.target.closest('.stage, .twin'); pointed = stage && cellAt(event, stage); });
  for (const kind of ['pointerleave', 'focusout']) follow(kind, () => { preview = pointed = null; });
  follow('focusin', ({ target }) => {
    if (target.matches('.token:focus-visible')) preview = placeOf(target);
    if (target.matches('.stage:focus-visible')) pointed ??= { v: viewOf(target), row: 0, column: 0 };
  });

  const inside = (x, n) => Math.max(0, Math.min(n - 1, Math.floor(x)));

  function cellAt(event, stage) {
    const box = stage.getBoundingClientRect(), v = viewOf(stage), { H, W } = views[v];
    return { v, row: inside((event.clientY - box.top) / box.height * H, H), column: inside((event.clientX - box.left) / box.width * W, W) };
  }

  function chooseCell({ v, row, column }) {
    const cell = [v, row, column];
    pointed = null;
    change({ cell: state.cell?.join() === cell.join() ? null : cell });
  }

  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity], Enter: null, ' ': null };

  listen(root, 'keydown', event => {
    const { target, key } = event, f = target.matches('.token') ? tokenKey : target.matches('.stage') ? stageKey : null;
    if (key === 'Escape' && !target.matches('input, select')) { preview = pointed = anchor = null; change({ selected: views.map(() => []), preset: 'rdam', cell: null }); }
    else if (f && key in STEPS && !(STEPS[key] && (event.altKey || event.metaKey))) { event.preventDefault(); f(event, target); later(); }
  });

  function tokenKey(event, token) {
    const { v, t } = placeOf(token), step = STEPS[event.key];
    if (!step) return selectToken({ v, t }, event);
    const next = nextToken(parts[v].buttons, t, step);
    focusToken(v, next);
    if (!event.shiftKey) return;
    if (anchor?.v !== v) anchor = { v, t };
    select(v, upTo(anchor.t, next));
  }

  /** The token beside t, the first or last one, or the nearest on the line above or below. */
  function nextToken(buttons, t, [down, right]) {
    const there = [...buttons.keys()].filter(i => buttons[i]), at = there.indexOf(t);
    if (right) return there[inside(at + right, there.length)];
    const box = buttons[t].getBoundingClientRect();
    let best = t, distance = Infinity, line = null;
    for (let k = at + down; k >= 0 && k < there.length; k += down) {
      const { top, left } = buttons[there[k]].getBoundingClientRect();
      if (Math.abs(top - box.top) < 5) continue;
      if (Math.abs(top - (line ??= top)) > 5) break;
      if (Math.abs(left - box.left) < distance) { distance = Math.abs(left - box.left); best = there[k]; }
    }
    return best;
  }

  function stageKey({ key }, stage) {
    const v = viewOf(stage), { H, W } = views[v], from = pointed?.v === v ? pointed : { v, row: 0, column: 0 }, step = STEPS[key];
    if (!step) return chooseCell(from);
    pointed = { v, row: inside(from.row + step[0], H), column: inside(from.column + step[1], W) };
  }

  const say = (text, code) => controls.said.replaceChildren(text, ...(code ? [h('code', { tabIndex: 0 }, code)] : []));

  function download(blob, name) {
    const link = h('a', { href: URL.createObjectURL(blob), download: name });
    root.append(link); link.click(); link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved ${name}.`);
  }

  async function copy(text) {
    try { await navigator.clipboard.writeText(text); say('Copied:', text); }
    catch { say('Copying is not allowed here; select it:', text); }
  }

  const savePage = html => download(new Blob([html], { type: 'text/html' }), 'readl-viewer.html');

  const actions = {
    own() { change({ tau_t: null, tau_i: null, alpha: null, beta: null }); },
    png() { drawPicture(views, parts).toBlob(blob => blob ? download(blob, 'readl-viewer.png') : say('Too large for one picture.')); },
    async html() { save(); if (model.page) savePage(await model.page()); else { asked = true; say('Making the page ...'); model.send({ kind: 'page', state }); } },
    code() { copy(`TokenViewer(*inspections, state=${python(changes(state))})`); },
    link() {
      if (!model.page || !/^(file|https?):$/.test(location.protocol)) return say('A link needs a page of its own: save the HTML, open it, copy the link there.');
      location.hash = 'state=' + encodeURIComponent(JSON.stringify(changes(state)));
      copy(location.href);
    },
  };

  // The other side: the kernel, or the shim of a static page.

  const fromKernel = () => { if (views.length && JSON.stringify(cleanState(model.get('state'), views)) !== written) adopt(model.get('state')); };
  const heard = { 'change:data': build, 'change:state': fromKernel, 'msg:custom': message => { if (message.kind === 'page' && asked) { asked = false; savePage(message.html); } } };   // of several views of one widget, the one that asked
  for (const [kind, f] of Object.entries(heard)) model.on(kind, f);
  listen(window, 'hashchange', () => { const raw = linked(); if (raw && views.length) { adopt(raw); save(); } });
  build();

  return () => {
    if (saving) save();
    cancelAnimationFrame(frame); stop.abort(); root.remove();
    for (const [kind, f] of Object.entries(heard)) model.off?.(kind, f);
  };
}

/** All views in one canvas, twice as fine as a small screen: image, map, lines, title and scale. */
function drawPicture(views, parts) {
  const gap = 16, top = 26, beside = ({ box, normal }) => normal?.naturalWidth ? box[0] / 2 : -gap;
  const width = sum(parts.map(part => part.box[0] + beside(part) + 2 * gap)) + gap, height = most(parts.map(part => part.box[1])) + top + 44;
  const canvas = h('canvas', { width: 2 * width, height: 2 * height }), pen = canvas.getContext('2d');
  const write = (text, x, y, style = {}, room) => { Object.assign(pen, { fillStyle: '#1b1e24', font: '12px system-ui, sans-serif', textAlign: 'left', ...style }); pen.fillText(text, x, y, room); };
  pen.scale(2, 2); pen.fillStyle = '#fff'; pen.fillRect(0, 0, width, height); pen.translate(gap, top);
  parts.forEach(({ box: [w, tall], ...part }, v) => {
    if (part.stage.classList.contains('mapped')) pen.filter = 'grayscale(1)';
    if (part.image.naturalWidth) pen.drawImage(part.image, 0, 0, w, tall);
    pen.filter = 'none';
    pen.drawImage(part.overlay, 0, 0, w, tall);
    for (const path of part.stage.querySelectorAll('path')) {
      const { stroke, strokeWidth, strokeDasharray, strokeLinecap } = getComputedStyle(path);
      Object.assign(pen, { strokeStyle: stroke, lineWidth: parseFloat(strokeWidth), lineCap: strokeLinecap });
      pen.setLineDash((strokeDasharray.match(/[\d.]+/g) ?? []).map(Number));
      pen.stroke(new Path2D(path.getAttribute('d') ?? ''));
    }
    const from = part.stage.getBoundingClientRect(), zoom = w / from.width;
    for (const chip of part.stage.querySelectorAll('.chip')) {   // those not shown have no width
      const { left, bottom, width: long } = chip.getBoundingClientRect(), [x, y] = [(left - from.left) * zoom, (bottom - from.top) * zoom];
      pen.fillStyle = getComputedStyle(chip).backgroundColor; pen.fillRect(x, y - 15, long * zoom, 15);
      if (long) write(chip.textContent, x + 4, y - 4, { font: '11px system-ui, sans-serif' }, long * zoom - 8);
    }
    const half = beside(parts[v]);
    if (half > 0) { pen.drawImage(part.normal, w + gap, 0, half, half * part.normal.naturalHeight / part.normal.naturalWidth); write('reference', w + gap, -9); }
    for (const number of part.numbers.children) {
      const [x, y] = [+number.getAttribute('x'), +number.getAttribute('y') + 5], bold = { font: '700 15px system-ui, sans-serif', textAlign: 'center' };
      for (const [shift, fillStyle] of [[-1, '#000'], [1, '#000'], [0, '#fff']]) write(number.textContent, x + shift, y + shift, { ...bold, fillStyle });
    }
    const scale = pen.createLinearGradient(40, 0, 160, 0);
    STOPS.forEach((colour, i) => scale.addColorStop(i / 17, colour));
    pen.fillStyle = scale; pen.fillRect(40, tall + 24, 120, 9);
    write(`${views[v].name}   ${views[v].verdict}`, 0, -9, { font: '600 14px system-ui, sans-serif' }, w);
    write(part.title.textContent, 0, tall + 16, {}, w); write(part.high.textContent, 165, tall + 33);
    write(part.low.textContent, 36, tall + 33, { textAlign: 'right' }, 36);
    pen.translate(w + half + 2 * gap, 0);
  });
  return canvas;
}

export default { render };
