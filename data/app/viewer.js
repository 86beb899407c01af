// The canvas of the viewer. Python sends image, labels and scores; opacity, hidden classes and what lies
// under the mouse are drawn and said here. A click, and a class whose map is wanted, are asked of Python.

function make(tag, parent, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  parent.append(element);
  return element;
}

const threeDigits = number => number.toPrecision(3);

function cssColor([red, green, blue]) {
  return `rgb(${red},${green},${blue})`;
}

function packedColor([red, green, blue]) {
  // as a pixel lies in memory: alpha, blue, green, red
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint16Array(await new Response(stream).arrayBuffer());
}

function fromFloat16(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

function areaText(share) {
  if (share >= 0.005) return `${Math.round(100 * share)} %`;
  return share ? "<1 %" : "0";
}

function buildPage(root) {
  root.classList.add("ovss-view");
  const page = {};
  page.message = make("div", root, { className: "ovss-message" });
  page.message.setAttribute("role", "alert");
  const left = make("div", root, { className: "ovss-left" });
  const right = make("div", root, { className: "ovss-right" });
  const frame = make("div", left, { className: "ovss-frame" });
  page.canvas = make("canvas", frame, { className: "ovss-canvas" });
  page.mark = make("div", frame, { className: "ovss-mark" });
  page.hover = make("div", left, { className: "ovss-hover" });
  const tools = make("div", left, { className: "ovss-tools" });
  const opacity = make("label", tools, { textContent: "opacity " });
  page.slider = make("input", opacity, { type: "range", min: 0, max: 1, step: 0.01 });
  page.showAll = make("button", tools, { textContent: "Show all" });
  page.copy = make("button", tools, { textContent: "Copy as code" });
  page.code = make("pre", left, { className: "ovss-code", hidden: true });
  page.legend = make("div", right, { className: "ovss-legend" });
  page.explanation = make("div", right, { className: "ovss-explanation" });
  return page;
}

function shadeOf({ shape: [height, width], classes, labels }, hidden) {
  // The classes in their colors, with a white line where two meet and one of them is shown.
  const shade = new ImageData(width, height);
  const pixels = new Uint32Array(shade.data.buffer);
  const white = 0xffffffff;
  const colors = Uint32Array.from(classes, ({ name, color }) => (hidden.has(name) ? 0 : packedColor(color)));
  for (let i = 0; i < pixels.length; i++) {
    const own = labels[i];
    const beside = i % width ? labels[i - 1] : own;
    const above = i >= width ? labels[i - width] : own;
    const isEdge = own !== beside || own !== above;
    const isSeen = colors[own] || colors[beside] || colors[above];
    pixels[i] = isEdge && isSeen ? white : colors[own];
  }
  return shade;
}

function render({ model, el }) {
  const get = name => model.get(name);
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const page = buildPage(el);
  const layer = document.createElement("canvas");
  let image;
  let rows = []; // of the legend, by class
  let mouse = null; // [x, y] in pixels of the canvas
  let unpackings = 0; // so far: an older one must not overtake a newer one
  let shown = { shape: [0, 0], step: 1, classes: [], labels: [], scores: [] }; // unpacked together

  function draw() {
    const [height, width] = shown.shape;
    const hidden = new Set(get("hidden"));
    if (!height) return;
    [layer.width, layer.height] = [width, height];
    [page.canvas.width, page.canvas.height] = [width, height];
    layer.getContext("2d").putImageData(shadeOf(shown, hidden), 0, 0);
    const context = page.canvas.getContext("2d", { willReadFrequently: true });
    if (image) context.drawImage(image, 0, 0, width, height);
    page.slider.value = get("opacity");
    context.globalAlpha = get("opacity");
    context.drawImage(layer, 0, 0);
    rows.forEach((row, k) => row.setAttribute("aria-pressed", !hidden.has(shown.classes[k].name)));
    sayState();
  }

  function toggle(name) {
    const hidden = get("hidden");
    put("hidden", hidden.includes(name) ? hidden.filter(other => other !== name) : [...hidden, name]);
  }

  function showAlone(name) {
    const others = shown.classes.map(entry => entry.name).filter(other => other !== name);
    const isAlone = others.every(other => get("hidden").includes(other));
    put("hidden", isAlone ? [] : others);
  }

  function legendRow({ name, color, share }) {
    const title = "click: hide or show; double click: this one alone";
    const row = make("button", page.legend, { className: "ovss-class", title });
    make("span", row, { className: "ovss-swatch" }).style.background = cssColor(color);
    make("span", row, { className: "ovss-name", textContent: name });
    make("span", row, { className: "ovss-area", textContent: areaText(share) });
    row.onclick = () => toggle(name);
    row.ondblclick = () => showAlone(name);
    return row;
  }

  async function unpack() {
    unpackings += 1;
    const turn = unpackings;
    const [shape, step, classes] = ["shape", "step", "classes"].map(get);
    const [labels, scores] = await Promise.all([get("labels"), get("scores")].map(inflate));
    if (turn !== unpackings) return; // something newer is on its way
    shown = { shape, step, classes, labels, scores };
    page.legend.replaceChildren();
    rows = [];
    const largestFirst = [...classes.keys()].sort((a, b) => classes[b].share - classes[a].share);
    for (const k of largestFirst) rows[k] = legendRow(classes[k]);
    draw();
  }

  async function loadImage() {
    image = await createImageBitmap(new Blob([get("image")]));
    draw();
  }

  function hoverText() {
    if (get("busy")) return "computing ...";
    const { shape: [height, width], step, classes, labels, scores } = shown;
    if (!mouse || mouse[0] >= width || mouse[1] >= height) return "point: class and score; click: why";
    const i = mouse[1] * width + mouse[0];
    const position = mouse.map(value => value * step).join(", ");
    return `${classes[labels[i]].name} ${threeDigits(fromFloat16(scores[i]))} at (${position})`;
  }

  function sayState() {
    page.hover.textContent = hoverText();
    page.message.textContent = get("message");
    el.classList.toggle("ovss-busy", get("busy"));
  }

  function scoreRow([name, score, share, color], mappedClass) {
    const row = make("button", page.explanation, { className: "ovss-score", title: `score map of ${name}` });
    row.setAttribute("aria-pressed", name === mappedClass);
    make("span", row, { className: "ovss-name", textContent: name });
    const bar = make("span", make("span", row, { className: "ovss-track" }));
    bar.style.width = `${100 * share}%`;
    bar.style.background = cssColor(color);
    make("span", row, { className: "ovss-area", textContent: threeDigits(score) });
    row.onclick = () => put("selected_class", name);
  }

  function explain() {
    const { point, top_scores: topScores, mapped_class: mappedClass, low, high, size } = get("explanation");
    page.explanation.replaceChildren();
    page.mark.hidden = !point;
    if (!point) return;
    page.mark.style.left = `${(100 * (point[0] + 0.5)) / size[0]}%`;
    page.mark.style.top = `${(100 * (point[1] + 0.5)) / size[1]}%`;
    const title = textContent => make("div", page.explanation, { className: "ovss-title", textContent });
    title(`scores at (${point.join(", ")})`);
    for (const entry of topScores) scoreRow(entry, mappedClass);
    title(`score map of ${mappedClass}, ${threeDigits(low)} to ${threeDigits(high)}`);
    const map = make("img", page.explanation, { className: "ovss-map", alt: `score map of ${mappedClass}` });
    map.onload = () => URL.revokeObjectURL(map.src);
    map.src = URL.createObjectURL(new Blob([get("score_map")], { type: "image/png" }));
  }

  function pixelAt(event) {
    const box = page.canvas.getBoundingClientRect();
    const pixel = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return [
      pixel((event.clientX - box.left) / box.width, page.canvas.width),
      pixel((event.clientY - box.top) / box.height, page.canvas.height),
    ];
  }

  function showCode() {
    page.code.hidden = !page.code.hidden;
    page.code.textContent = get("code");
    // where the browser forbids the clipboard, the text is selected, ready for Ctrl-C
    navigator.clipboard?.writeText(get("code")).catch(() => getSelection().selectAllChildren(page.code));
  }

  function download({ file, type }, [data]) {
    const href = URL.createObjectURL(new Blob([data], { type }));
    const link = make("a", el, { href, download: file });
    link.click();
    link.remove();
  }

  page.canvas.onmousemove = event => {
    mouse = pixelAt(event);
    sayState();
  };
  page.canvas.onmouseleave = () => {
    mouse = null;
    sayState();
  };
  page.canvas.onclick = event => put("point", pixelAt(event).map(value => value * shown.step));
  page.slider.oninput = () => put("opacity", Number(page.slider.value));
  page.showAll.onclick = () => put("hidden", []);
  page.copy.onclick = showCode;

  const watch = (action, ...names) => names.forEach(name => model.on(`change:${name}`, action));
  watch(loadImage, "image");
  watch(unpack, "labels", "classes");
  watch(draw, "hidden", "opacity");
  watch(sayState, "busy", "message");
  watch(explain, "explanation", "score_map");
  watch(() => { page.code.textContent = get("code"); }, "code");
  model.on("msg:custom", download);
  unpack();
  loadImage();
  explain();
}

export default { render };
