// The explorer: one row of attention under any threshold, on canvases, without a kernel.
// The same file is the ES module of the widget (`svit_utils.show.widgets.Explorer`) and of the static pages
// (`svit_utils.show.explorer.explorer_html`). Python is the reference: tests/browser/test_explorer.py compares.

export const MODES = {
  dense: "its plain softmax",
  zero: "nothing",
  top1: "its largest key",
  cap: "a lower τ, half of its largest weight",
};
const SETTINGS = ["picture", "layer", "head", "token", "tau", "empty_rows"];

/** What `svit_utils.attention.formula.cut_and_renormalise` computes, for one row p: A = R / sum(R), R = ReLU(p - tau). */
export function cut(p, tau, mode) {
  let largest = 0;
  for (let j = 1; j < p.length; j++) if (p[j] > p[largest]) largest = j;
  const empty = !(p[largest] > tau);
  const level = mode === "cap" ? Math.min(tau, p[largest] / 2) : tau;
  const weights = new Float64Array(p.length);
  let sum = 0, kept = 0, mass = 0;
  for (let j = 0; j < p.length; j++) {
    if (!(p[j] > level)) continue;
    weights[j] = p[j] - level;
    sum += weights[j];
    mass += p[j];
    kept++;
  }
  if (sum > 0) for (let j = 0; j < p.length; j++) weights[j] /= sum;
  else if (mode === "dense") weights.set(p);
  else if (mode === "top1") weights[largest] = 1;
  return { weights, kept, mass, empty, level, largest: p[largest] };
}

/** Zlib bytes to bytes; every browser since 2023 has the decompressor. */
async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** The rows of all pictures: bytes that count the edges below a weight. `rows` leads back to weights. */
class Rows {
  constructor(header, bytes) {
    Object.assign(this, { header, bytes });
    this.tokens = header.grid[0] + header.grid[1] * header.grid[2];
    this.values = Float64Array.from(header.values);
  }

  /** The softmax row of a query; `sparse`: as the model computed it that is cut in every layer. */
  row({ picture, layer, head, token }, sparse) {
    const { layers, heads, pictures, sparse_layers: own } = this.header;
    const depth = layers.length, n = this.tokens;
    // Layers before which nothing is cut have the same rows in both, and are sent once.
    const second = sparse ? own.indexOf(layer) : -1;
    const plane = second < 0 ? picture * depth + layer : pictures.length * depth + picture * own.length + second;
    const start = ((plane * heads + head) * n + token) * n;
    return Float64Array.from(this.bytes.subarray(start, start + n), (level) => this.values[level]);
  }
}

const STYLE = `
:host { display: block; margin: 0.5rem 0; }
.card { --line: #767676; container-type: inline-size; font: 14px/1.4 system-ui, sans-serif; padding: 12px;
  background: #fff; color: #1a1a1a; border: 1px solid #ccc; border-radius: 6px; max-width: 1040px; color-scheme: light; }
.card.dark { --line: #959595; background: #1b1d21; color: #ececec; border-color: #444; color-scheme: dark; }
.panels { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; }
@container (max-width: 620px) { .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; }
figcaption b, figcaption span { display: block; }
canvas { display: block; width: 100%; border-radius: 2px; }
.panels canvas { cursor: crosshair; touch-action: manipulation; }
.bar { display: flex; align-items: center; gap: 6px; margin: 6px 0 10px; font-size: 13px; flex-wrap: wrap; }
.bar canvas { width: 160px; height: 12px; flex: none; }
.sorted { height: 170px; cursor: ns-resize; touch-action: manipulation; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 14px; margin: 10px 0; align-items: end; }
label { display: flex; flex-direction: column; font-size: 13px; }
label.check { flex-direction: row; gap: 6px; align-items: center; min-height: 30px; }
label.tau { flex: 1 1 220px; }
select, input { font: inherit; color: inherit; accent-color: #0072b2; }
select { min-height: 30px; background: transparent; border: 1px solid var(--line); border-radius: 4px; }
.card.dark option { background: #1b1d21; }
input[type=range] { width: 100%; min-height: 24px; margin: 0; }
:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
p { margin: 6px 0 0; }
.words { min-height: 6em; }
.note { font-size: 12px; opacity: 0.85; }
`;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const short = (x) => (x === 0 || x >= 1e-5 ? String(Number(x.toPrecision(x >= 0.001 ? 3 : 2))) : x.toExponential(1));
const percent = (x) => `${(100 * x).toFixed(x > 0.995 || x < 0.005 ? 1 : 0)} %`;
const luminance = (rgb) => 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2];
const parts = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);

/** Whether the page around `host` is dark: as the book says, by the nearest opaque background, or by its text's colour. */
function onDark(host) {
  const { theme } = document.documentElement.dataset;
  if (theme === "dark" || theme === "light") return theme === "dark";
  for (let at = host; at; at = at.parentElement || (at.getRootNode().host ?? null)) {
    const colour = parts(getComputedStyle(at).backgroundColor);
    if (colour.length >= 3 && (colour[3] ?? 1) > 0.5) return luminance(colour) < 128;
  }
  return luminance(parts(getComputedStyle(host).color)) > 128;
}

class Figure {
  constructor(host, header, bytes, changed) {
    Object.assign(this, { host, header, changed, rows: new Rows(header, bytes) });
    [this.prefix, this.high, this.wide] = header.grid;
    this.colours = fromBase64(header.colours);
    this.state = { ...header.start };
    this.milliseconds = 0; // what the last move took
    this.build();
    this.watch();
  }

  // ---- the document ----

  build() {
    const { header, prefix } = this;
    this.root = this.host.shadowRoot || this.host.attachShadow({ mode: "open" });
    this.card = element("div", { class: "card", role: "group", "aria-label": "Attention explorer" });
    this.card.setAttribute("data-lm-suppress-shortcuts", "true");
    this.host.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own arrow keys would move the cells
    const names = ["picture", "dense", "drawn", "sparse"];
    this.panels = Object.fromEntries(names.map((name) => [name, this.panel(name)]));
    this.scale = element("canvas", { width: 160, height: 12, "aria-hidden": "true" });
    this.top = element("span");
    const bar = element("div", { class: "bar" }, "weight 0", this.scale, this.top);
    this.sorted = element("canvas", { class: "sorted", role: "img" });
    this.words = element("div", { class: "words", role: "status", "aria-live": "polite" });
    const grid = element("div", { class: "panels" });
    grid.append(...names.map((name) => this.panels[name].figure));
    this.card.append(grid, bar, this.sorted, this.makeControls(), this.words);
    this.card.append(element("p", { class: "note" }, this.note()));
    this.root.replaceChildren(element("style", {}, STYLE), this.card);
    this.images = header.pictures.map(({ source }) => {
      const image = new Image();
      image.onload = () => this.milliseconds && this.draw();
      image.src = source;
      return image;
    });
    const picker = this.panels.picture.canvas;
    const last = String(this.rows.tokens - 1);
    for (const [key, value] of Object.entries({ tabindex: "0", role: "slider", "aria-valuemin": "0", "aria-valuemax": last }))
      picker.setAttribute(key, value);
    const home = prefix ? ", Home: the class token" : "";
    picker.setAttribute("aria-label", `Query patch; arrow keys move it${home}`);
    picker.addEventListener("keydown", (event) => this.key(event));
    for (const { canvas } of Object.values(this.panels)) this.pointer(canvas, (x, y) => this.pick(x, y));
    this.pointer(this.sorted, (_, y) => this.set({ tau: 10 ** (-4 * Math.min(1, y / this.floor)) }));
  }

  panel(name) {
    const title = {
      picture: "picture and query",
      dense: "dense",
      drawn: "dense, drawn cut",
      sparse: "sparse: all layers cut",
    }[name];
    const canvas = element("canvas", name === "picture" ? {} : { role: "img" });
    const lines = [element("span"), element("span")];
    const text = element("figcaption", {}, element("b", {}, title), ...lines);
    return { canvas, lines, figure: element("figure", { "data-panel": name }, canvas, text) };
  }

  makeControls() {
    const { header, prefix } = this, tokens = [...Array(prefix).keys()];
    const list = (name, label, options) => {
      const select = element("select", { name, "aria-label": label }); // else its options would be in its name
      for (const [value, text] of options) select.append(element("option", { value }, text));
      return [select, element("label", {}, label, select)];
    };
    const made = [
      list("picture", "Picture", header.pictures.map(({ name }, i) => [i, name])),
      list("layer", "Layer", header.layers.map((name, i) => [i, name])),
      list("head", "Head", [...Array(header.heads).keys()].map((i) => [i, `${i}`])),
      list("token", "Query", [["patch", "a patch"], ...tokens.map((i) => [i, this.name(i)])]),
      list("empty_rows", "An empty row gets", Object.entries(MODES).map(([mode, what]) => [mode, `${mode}: ${what}`])),
    ];
    this.selects = Object.fromEntries(made.map(([select]) => [select.name, select]));
    for (const [select] of made) {
      select.addEventListener("change", () => {
        if (select.name === "empty_rows") return this.set({ empty_rows: select.value });
        const patch = this.patch ?? prefix + Math.floor(this.high / 2) * this.wide + Math.floor(this.wide / 2);
        this.set({ [select.name]: select.value === "patch" ? patch : Number(select.value) });
      });
    }
    if (!prefix) made[3][1].hidden = true;
    const last = header.edges.length - 2; // at the last edge, 1, nothing would ever survive
    this.slider = element("input", { type: "range", min: 0, max: last, step: 1, name: "tau" });
    this.tauText = element("span");
    this.slider.addEventListener("input", () => this.set({ tau: header.edges[this.slider.value] }));
    this.outline = element("input", { type: "checkbox", name: "outline" });
    this.outline.checked = true;
    this.outline.addEventListener("change", () => this.draw());
    const controls = element("div", { class: "controls" }, ...made.map(([, label]) => label));
    controls.append(element("label", { class: "tau" }, this.tauText, this.slider));
    if (header.pictures.some(({ outline }) => outline.length))
      controls.append(element("label", { class: "check" }, this.outline, "Outline of the object"));
    return controls;
  }

  note() {
    const { errors, fine, edges } = this.header, keys = ", or focus the picture and use the arrow keys";
    return (
      `Click a patch to make it the query${keys}; click the sorted row to move τ. Struck: exactly 0. Weights are stored in ` +
      `one byte: to ${percent(errors[0])} of their value above ${short(fine)}, to ${percent(errors[1])} above ${short(edges[0])}, ` +
      `as half of that below. τ stops where this changes no survivor.`
    );
  }

  /** Measure and draw again when the width, the theme or the system's colours change. */
  watch() {
    const again = () => {
      this.measure();
      this.draw();
    };
    this.sizes = new ResizeObserver(again);
    this.sizes.observe(this.card);
    this.themes = new MutationObserver(again);
    const look = { attributes: true, attributeFilter: ["class", "style", "theme", "data-theme", "data-jp-theme-light"] };
    for (const at of [document.documentElement, document.body]) this.themes.observe(at, look);
    this.system = matchMedia("(prefers-color-scheme: dark)");
    this.system.addEventListener("change", again);
    this.stop = () => {
      this.sizes.disconnect();
      this.themes.disconnect();
      this.system.removeEventListener("change", again);
    };
  }

  // ---- what the reader does ----

  pointer(canvas, act) {
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      act(event.clientX - box.left, event.clientY - box.top);
    };
    canvas.addEventListener("pointerdown", at);
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons === 1 && event.pointerType === "mouse") at(event); // a finger scrolls the page
    });
  }

  pick(x, y) {
    const side = this.panels.picture.canvas.clientWidth / this.wide;
    const within = (at, size) => Math.max(0, Math.min(size - 1, Math.floor(at / side)));
    this.set({ token: this.prefix + within(y, this.high) * this.wide + within(x, this.wide) });
  }

  key(event) {
    const { prefix, wide, high } = this;
    const patch = this.state.token - prefix;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in moves || (event.key === "Home" && prefix))) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "Home") return this.set({ token: 0 });
    if (patch < 0) return this.set({ token: this.patch ?? prefix }); // from the class token back to the patch before
    const [down, right] = moves[event.key];
    const row = Math.max(0, Math.min(high - 1, Math.floor(patch / wide) + down));
    const column = Math.max(0, Math.min(wide - 1, (patch % wide) + right));
    this.set({ token: prefix + row * wide + column });
  }

  /** Change settings; what lies outside their range is moved inside. `tau` goes to the nearest stop. */
  set(changes, tell = true) {
    const { header } = this, start = performance.now();
    const next = { ...this.state, ...changes };
    const sizes = { picture: header.pictures.length, layer: header.layers.length, head: header.heads, token: this.rows.tokens };
    for (const [name, size] of Object.entries(sizes)) next[name] = Math.max(0, Math.min(size - 1, Math.round(next[name]) || 0));
    if (!(next.empty_rows in MODES)) next.empty_rows = this.state.empty_rows;
    next.tau = header.edges[this.stopOf(next.tau)];
    const same = SETTINGS.every((name) => next[name] === this.state[name]);
    this.state = next;
    if (next.token >= this.prefix) this.patch = next.token;
    if (same && this.milliseconds) return;
    this.draw();
    this.milliseconds = performance.now() - start;
    if (tell && this.changed) this.changed(next);
  }

  stopOf(tau) {
    const { edges } = this.header;
    let best = 0;
    const far = (i) => Math.abs(Math.log(edges[i] / tau));
    for (let i = 1; i < edges.length - 1; i++) if (far(i) < far(best)) best = i;
    return best;
  }

  // ---- what it shows ----

  /** The rows and weights on show, by panel; what the tests compare with Python. */
  numbers() {
    const { state } = this;
    const [dense, sparse] = [false, true].map((second) => this.rows.row(state, second));
    const cuts = [dense, sparse].map((row) => cut(row, state.tau, state.empty_rows));
    return { dense: { weights: dense }, drawn: cuts[0], sparse: cuts[1] };
  }

  name(token) {
    if (token < this.prefix) return token ? `prefix token ${token}` : "class token";
    const patch = token - this.prefix;
    return `patch row ${Math.floor(patch / this.wide)}, column ${patch % this.wide}`;
  }

  happened({ kept, mass, empty, level, largest }) {
    const { tau, empty_rows: mode } = this.state, n = this.rows.tokens;
    const lost = `every key was lost (the largest weight, ${short(largest)}, is not above τ)`;
    const rest = `${kept} of ${n} keys survive, with ${percent(mass)} of the weight`;
    if (mode === "cap" && level < tau)
      return `${empty ? lost : "the largest weight is less than 2τ"}; for this row τ came down to half of the largest, ${short(level)}: ${rest}.`;
    if (!empty) return `${rest}; the other ${n - kept} get exactly 0.`;
    const then = { dense: "this row fell back to its softmax", zero: "this row reads nothing", top1: "this row reads its largest key alone" };
    return `${lost}; ${then[mode]}.`;
  }

  tell(shown) {
    const { header, state } = this, n = this.rows.tokens;
    const tau = `τ = ${short(state.tau)} = ${(state.tau * n).toFixed(2)}/N`;
    const lines = [`Query: ${this.name(state.token)}, ${header.layers[state.layer]}, head ${state.head}. At ${tau}, ${this.happened(shown.drawn)}`];
    const { threshold } = header, same = !header.sparse_layers.includes(state.layer);
    const ran = `In the model that ran with ${threshold ? `a cut at ${short(threshold)}` : "its cut"} in every layer, `;
    lines.push(ran + (same ? "this row is the same: nothing is cut before it." : this.happened(shown.sparse)));
    if (!same && !(Math.abs(Math.log(state.tau / threshold)) < 1e-6))
      lines[1] += " (Its earlier layers stay as they ran; only this row is cut anew.)";
    this.words.replaceChildren(...lines.map((line) => element("p", {}, line)));
    this.tauText.textContent = tau;
    this.slider.value = this.stopOf(state.tau);
    this.slider.setAttribute("aria-label", "threshold tau, logarithmic");
    this.slider.setAttribute("aria-valuetext", `tau ${short(state.tau)}, ${shown.drawn.kept} keys survive`);
    for (const name of ["picture", "layer", "head", "empty_rows"]) this.selects[name].value = state[name];
    this.selects.token.value = state.token < this.prefix ? state.token : "patch";
    const { picture } = this.panels;
    picture.canvas.setAttribute("aria-valuenow", state.token);
    picture.canvas.setAttribute("aria-valuetext", `${this.name(state.token)}; ${shown.drawn.kept} keys survive`);
    this.outline.disabled = !header.pictures[state.picture].outline.length;
    picture.lines[0].textContent = header.pictures[state.picture].name;
    picture.lines[1].textContent = this.name(state.token);
    for (const [name, { weights }] of Object.entries(shown)) {
      const zeros = weights.reduce((sum, weight) => sum + (weight === 0), 0);
      const [count, first] = this.panels[name].lines;
      count.textContent = `${zeros} of ${n} exactly 0`;
      first.textContent = this.prefix ? `class token ${short(weights[0])}` : "";
      this.panels[name].canvas.setAttribute("aria-label", `Map of the weights, ${name}: ${zeros} of ${n} exactly 0`);
    }
  }

  /** Sizes and colours. Not at every move: to ask for them makes the browser lay out the whole page. */
  measure() {
    const dark = onDark(this.host.parentElement || this.host);
    this.card.classList.toggle("dark", dark);
    this.look = dark
      ? { ink: "#ececec", faint: "#3a3d42", paper: "#2a2c31", strike: "#6a6d73", kept: "#56b4e9", lost: "#77797e", tau: "#ff9a4d" }
      : { ink: "#1a1a1a", faint: "#dddddd", paper: "#ececec", strike: "#b0b0b0", kept: "#0072b2", lost: "#b0b0b0", tau: "#b34f00" };
    const width = this.panels.picture.canvas.clientWidth || 160;
    this.side = [width, (width * this.high) / this.wide];
    for (const { canvas } of Object.values(this.panels)) this.fit(canvas, ...this.side);
    this.plot = [this.sorted.clientWidth || 320, this.sorted.clientHeight || 170];
    this.fit(this.sorted, ...this.plot);
    for (const { canvas } of Object.values(this.panels)) canvas.style.height = `${this.side[1]}px`;
  }

  /** As many pixels as the screen has where the canvas is shown. */
  fit(canvas, width, height) {
    const dense = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * dense), Math.round(height * dense)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    canvas.getContext("2d").setTransform(dense, 0, 0, dense, 0, 0);
  }

  draw() {
    const shown = this.numbers();
    const onGrid = Object.values(shown).map(({ weights }) => weights.subarray(this.prefix).reduce((a, b) => Math.max(a, b), 0));
    const top = Math.max(...onGrid, 1e-12);
    this.drawPicture();
    for (const [name, { weights }] of Object.entries(shown)) this.drawMap(this.panels[name].canvas, weights, top);
    this.drawScale(top);
    this.drawSorted(shown.dense.weights);
    this.tell(shown);
  }

  drawPicture() {
    const context = this.panels.picture.canvas.getContext("2d"), [width, height] = this.side;
    const image = this.images[this.state.picture];
    if (image.complete && image.naturalWidth) context.drawImage(image, 0, 0, width, height);
    this.drawMarks(context, width, height);
  }

  drawMap(canvas, weights, top) {
    const context = canvas.getContext("2d"), [width, height] = this.side;
    const { prefix, wide, high, colours, look } = this, last = colours.length / 3 - 1;
    const x = (column) => (column * width) / wide, y = (row) => (row * height) / high;
    context.fillStyle = look.paper;
    context.fillRect(0, 0, width, height);
    context.beginPath();
    for (let patch = 0; patch < wide * high; patch++) {
      const row = Math.floor(patch / wide), column = patch % wide, weight = weights[prefix + patch];
      if (weight === 0) {
        context.moveTo(x(column) + 1, y(row + 1) - 1);
        context.lineTo(x(column + 1) - 1, y(row) + 1);
        continue;
      }
      const at = 3 * Math.round(last * Math.sqrt(Math.min(1, weight / top)));
      context.fillStyle = `rgb(${colours[at]},${colours[at + 1]},${colours[at + 2]})`;
      context.fillRect(x(column), y(row), x(column + 1) - x(column) + 0.3, y(row + 1) - y(row) + 0.3);
    }
    context.strokeStyle = look.strike;
    context.lineWidth = 1;
    context.stroke();
    this.drawMarks(context, width, height);
  }

  /** The object's outline and the query, on top of a picture or a map. */
  drawMarks(context, width, height) {
    const { outline, size } = this.header.pictures[this.state.picture];
    if (this.outline.checked && outline.length) {
      context.beginPath();
      for (const [x1, y1, x2, y2] of outline) {
        context.moveTo((x1 * width) / size[1], (y1 * height) / size[0]);
        context.lineTo((x2 * width) / size[1], (y2 * height) / size[0]);
      }
      for (const [colour, line] of [["#000", 3], ["#fff", 1.2]]) Object.assign(context, { strokeStyle: colour, lineWidth: line }).stroke();
    }
    const patch = this.state.token - this.prefix, side = width / this.wide;
    if (patch < 0) return;
    const [x, y] = [(patch % this.wide) * side, Math.floor(patch / this.wide) * side];
    for (const [colour, line] of [["#fff", 5], ["#d55e00", 2.5]])
      Object.assign(context, { strokeStyle: colour, lineWidth: line }).strokeRect(x, y, side, side);
  }

  drawScale(top) {
    const context = this.scale.getContext("2d"), last = this.colours.length / 3 - 1;
    for (let x = 0; x < 160; x++) {
      const at = 3 * Math.round(last * Math.sqrt(x / 159));
      context.fillStyle = `rgb(${this.colours[at]},${this.colours[at + 1]},${this.colours[at + 2]})`;
      context.fillRect(x, 0, 1, 12);
    }
    this.top.textContent = `${short(top)} (square-root scale, one for all maps)`;
  }

  /** The dense row in falling order on a logarithmic axis, with tau and 1/N. */
  drawSorted(p) {
    const context = this.sorted.getContext("2d"), { look } = this, left = 44, [width, height] = this.plot;
    context.clearRect(0, 0, width, height);
    const floor = (this.floor = height - 20);
    const y = (value) => Math.min(floor, (floor * Math.log10(Math.max(value, 1e-4))) / -4);
    const order = Float64Array.from(p).sort().reverse(), { tau } = this.state;
    context.font = "12px system-ui, sans-serif";
    for (const decade of [1, 0.1, 0.01, 0.001]) {
      context.fillStyle = look.faint;
      context.fillRect(left, y(decade), width - left, 1);
      context.fillStyle = look.ink;
      context.fillText(String(decade), 2, Math.max(10, y(decade) + 4));
    }
    const step = (width - left) / order.length;
    order.forEach((value, j) => {
      context.fillStyle = value > tau ? look.kept : look.lost;
      context.fillRect(left + j * step, y(value), Math.max(step - 0.4, 0.6), floor - y(value));
    });
    const line = (value, text, colour, dash, above) => {
      Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: 2, textAlign: "right" });
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(left, y(value));
      context.lineTo(width, y(value));
      context.stroke();
      context.fillText(text, width - 4, above ? y(value) - 4 : y(value) + 14);
    };
    const fair = 1 / order.length; // what each key would get of an even row
    line(fair, `1/N = ${short(fair)}`, look.ink, [4, 4], fair > tau);
    line(tau, `τ = ${short(tau)}`, look.tau, [], fair <= tau);
    context.setLineDash([]);
    Object.assign(context, { fillStyle: look.ink, textAlign: "left" });
    context.fillText("keys of the dense row, by falling weight", left, height - 5);
    const kept = order.filter((value) => value > tau).length;
    this.sorted.setAttribute("aria-label", `The dense row in falling order: ${kept} of ${order.length} weights lie above tau ${short(tau)}; 1/N is ${short(fair)}`);
  }
}

/** Show the explorer in `host`. `rows`: zlib bytes, or the same in base64. Resolves to the `Figure`, which the host keeps. */
export async function mount(host, header, rows, changed) {
  if (!globalThis.DecompressionStream) return void (host.textContent = "The explorer needs a browser of 2023 or later.");
  const bytes = await inflate(typeof rows === "string" ? fromBase64(rows) : rows);
  host.explorer = new Figure(host, header, bytes, changed);
  host.explorer.measure();
  host.explorer.set({}, false);
  return host.explorer;
}

/** anywidget's entry: the settings are traits in Python, in both directions. */
async function render({ model, el }) {
  const host = el.appendChild(document.createElement("div"));
  host.className = "svit-explorer";
  const state = () => Object.fromEntries(SETTINGS.map((name) => [name, model.get(name)]));
  const view = model.get("rows");
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const figure = await mount(host, { ...model.get("header"), start: state() }, bytes, (next) => {
    for (const name of SETTINGS) model.set(name, next[name]);
    model.save_changes();
  });
  const follow = () => figure.set(state(), false);
  for (const name of SETTINGS) model.on(`change:${name}`, follow);
  return () => {
    for (const name of SETTINGS) model.off(`change:${name}`, follow);
    figure.stop();
  };
}

export default { render };
