"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const [height, width, channels] = data.shape;

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}
function unpack([bits, text]) {
  const buffer = bytes(text);
  return bits === 32 ? new Float32Array(buffer) : Float32Array.from(new Uint16Array(buffer), fromHalf);
}
// IEEE 754 binary16: a sign, five bits of exponent, ten of fraction.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const run = compile(data.program, data.constants.map(unpack));
const latents = new Float32Array(bytes(data.points)); // of the test images, one after the other
const dims = data.latents;
const z = new Float32Array(dims); // the current point
let label = 0;

function decode(at, ofLabel) {
  return data.classes ? run(at, [ofLabel]) : run(at);
}

// ---- Coordinates: latents or principal components.

const middle = new Float32Array(dims);
for (let i = 0; i < latents.length; i++) middle[i % dims] += latents[i] / data.count;
const components = data.components.map((text) => new Float32Array(bytes(text)));
// In a hierarchy the coordinates are the noise of the prior: 0 is a group's mean, whatever is above.
const COORDINATE = data.groups.length ? "\u03b5" : "z";
const BASES = [
  {
    size: dims,
    name: (k) => `${COORDINATE}${k + 1}`,
    get: (at, k, offset = 0) => at[offset + k],
    set: (at, k, value) => { at[k] = value; },
  },
  {
    size: components.length,
    name: (k) => `pc${k + 1}`,
    get(at, k, offset = 0) {
      let sum = 0;
      for (let i = 0; i < dims; i++) sum += components[k][i] * (at[offset + i] - middle[i]);
      return sum;
    },
    set(at, k, value) {
      const change = value - this.get(at, k);
      for (let i = 0; i < dims; i++) at[i] += change * components[k][i];
    },
  },
];
let basis = BASES[0];
let across = 0;
let up = 1; // unused with one latent

const classLabels = data.labels ? [...new Set(data.labels)].sort((a, b) => a - b) : [];
const plane = { x: new Float32Array(data.count), y: new Float32Array(data.count), box: null, medians: [] };

function project() {
  for (let i = 0; i < data.count; i++) {
    plane.x[i] = basis.get(latents, across, i * dims);
    // With one latent, multiples of the golden ratio spread the points vertically.
    plane.y[i] = dims > 1 ? basis.get(latents, up, i * dims) : ((i * 0.6180339887) % 1) * 2 - 1;
  }
  plane.box = [...paddedRange(plane.x), ...paddedRange(plane.y)];
  plane.medians = classLabels.map((classLabel) => {
    const of = [...data.labels.keys()].filter((i) => data.labels[i] === classLabel);
    return [plane.x, plane.y].map(
      (numbers) => of.map((i) => numbers[i]).sort((a, b) => a - b)[of.length >> 1]);
  });
}
function paddedRange(numbers) {
  let low = -2, high = 2;
  for (const number of numbers) {
    low = Math.min(low, number);
    high = Math.max(high, number);
  }
  const edge = 0.05 * (high - low);
  return [low - edge, high + edge];
}
const position = () => [basis.get(z, across), dims > 1 ? basis.get(z, up) : 0];
function moveTo(x, y) {
  const [left, right, bottom, top] = plane.box;
  basis.set(z, across, Math.min(Math.max(x, left), right));
  if (dims > 1) basis.set(z, up, Math.min(Math.max(y, bottom), top));
  redraw();
}

// ---- The decoded image.

function paint(canvas, numbers) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(pixels(numbers), 0, 0);
}
function pixels(numbers) {
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    if (channels === 3) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(255 * numbers[3 * i + c]);
    } else {
      let sum = 0;
      for (let c = 0; c < channels; c++) sum += numbers[i * channels + c];
      const grey = Math.round((255 * sum) / channels);
      image.data[4 * i] = image.data[4 * i + 1] = image.data[4 * i + 2] = grey;
    }
    image.data[4 * i + 3] = 255;
  }
  return image;
}

let scheduled = false;
let frames = 0;
function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    paint($("image"), decode(z, label));
    drawPointer();
    showReadout();
    frames++;
  });
}

const signed = (number) => number.toFixed(2).replace("-", "\u2212");
function showReadout() {
  const [x, y] = position();
  const items = [[basis.name(across), signed(x)]];
  if (dims > 1) items.push([basis.name(up), signed(y)]);
  if (data.classes) items.push(["class", label]);
  else if (data.labels) items.push(["nearest class", data.labels[nearest(x, y).index]]);
  $("readout").replaceChildren(...items.map(([name, value]) => {
    const item = document.createElement("b"), faint = document.createElement("span");
    faint.textContent = `${name} `;
    item.append(faint, String(value));
    return item;
  }));
  for (const slider of sliders) slider.show();
}

// ---- The plane.

let planeWidth = 0; // in CSS pixels
let planeHeight = 0;
const toScreen = (x, y) => {
  const [left, right, bottom, top] = plane.box;
  return [((x - left) / (right - left)) * planeWidth, ((top - y) / (top - bottom)) * planeHeight];
};
const fromScreen = (px, py) => {
  const [left, right, bottom, top] = plane.box;
  return [left + (px / planeWidth) * (right - left), top - (py / planeHeight) * (top - bottom)];
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const classIndex = new Map(classLabels.map((classLabel, i) => [classLabel, i]));
const colourOf = (classLabel) => data.colours[(classIndex.get(classLabel) ?? 0) % data.colours.length];
let isolated = null; // the only class shown, or null

function clearedContext(canvas) {
  const scale = window.devicePixelRatio || 1;
  const w = Math.round(planeWidth * scale), h = Math.round(planeHeight * scale);
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, planeWidth, planeHeight);
  return context;
}

function drawPoints() {
  if (!planeWidth) return;
  const context = clearedContext($("points"));
  const [left, right, bottom, top] = plane.box;
  const tiled = $("tiles").checked;
  if (tiled) {
    context.fillStyle = "#000000";
    context.fillRect(0, 0, planeWidth, planeHeight);
    context.globalAlpha = 0.65; // keeps the points visible
    context.drawImage(sheet, 0, 0, planeWidth, planeHeight);
    context.globalAlpha = 1;
  }
  const write = (text, x, y) => {
    if (tiled) {
      context.strokeStyle = "#000000";
      context.lineWidth = 4;
      context.lineJoin = "round";
      context.strokeText(text, x, y);
    }
    context.fillText(text, x, y);
  };
  context.font = "12px system-ui, sans-serif";
  const faint = tiled ? "#ffffff" : colour("--faint");
  for (const [low, high, axis] of [[left, right, 0], [bottom, top, 1]]) {
    if (axis === 1 && dims === 1) continue;
    const step = high - low > 16 ? 4 : high - low > 8 ? 2 : 1;
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) {
      const [px, py] = toScreen(axis ? left : at, axis ? at : bottom);
      if (!tiled) {
        context.strokeStyle = colour("--line");
        context.lineWidth = 1;
        context.globalAlpha = at === 0 ? 1 : 0.45;
        context.beginPath();
        context.moveTo(axis ? 0 : px, axis ? py : 0);
        context.lineTo(axis ? planeWidth : px, axis ? py : planeHeight);
        context.stroke();
        context.globalAlpha = 1;
      }
      context.fillStyle = faint;
      context.textAlign = axis ? "left" : "center";
      const text = String(at).replace("-", "\u2212");
      if (axis ? py > 24 && py < planeHeight - 24 : px > 30 && px < planeWidth - 40)
        write(text, axis ? 6 : px, axis ? py + 4 : planeHeight - 6);
    }
  }
  context.font = "600 13px system-ui, sans-serif";
  context.textAlign = "right";
  context.fillStyle = faint;
  write(`${basis.name(across)} \u2192`, planeWidth - 8, planeHeight - 7);
  context.textAlign = "left";
  if (dims > 1) write(`\u2191 ${basis.name(up)}`, 6, 18);

  const radius = data.count > 3000 ? 2 : data.count > 800 ? 2.75 : 3.75;
  context.strokeStyle = tiled ? "rgba(255, 255, 255, 0.8)" : colour("--edge");
  context.lineWidth = 0.75;
  for (let i = 0; i < data.count; i++) {
    const classLabel = data.labels ? data.labels[i] : null;
    const shown = isolated === null || classLabel === isolated;
    const [px, py] = toScreen(plane.x[i], plane.y[i]);
    context.globalAlpha = shown ? 0.8 : 0.08;
    context.fillStyle = colourOf(classLabel);
    context.beginPath();
    context.arc(px, py, radius, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }
  context.globalAlpha = 1;
  if (!data.classes && classLabels.length <= 2 * data.colours.length) labelClasses(context);
}

// Labels the classes at their medians, for readers who cannot distinguish the colours.
function labelClasses(context) {
  context.font = "700 17px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineJoin = "round";
  for (const [i, classLabel] of classLabels.entries()) {
    if (isolated !== null && classLabel !== isolated) continue;
    const [px, py] = toScreen(...plane.medians[i]);
    context.lineWidth = 5;
    context.strokeStyle = "#ffffff";
    context.strokeText(classLabel, px, py);
    context.fillStyle = colourOf(classLabel);
    context.fillText(classLabel, px, py);
  }
  context.textBaseline = "alphabetic";
}

let path = []; // points of the path, in the plane's coordinates
let chosen = null; // index of the selected test image

function drawPointer() {
  if (!planeWidth) return;
  const context = clearedContext($("pointer"));
  if (path.length) {
    const trace = () => {
      context.beginPath();
      for (const stop of path) context.lineTo(...toScreen(...stop));
    };
    context.lineJoin = context.lineCap = "round";
    for (const [lineWidth, strokeColour] of [[6, colour("--card")], [3, colour("--ink")]]) {
      context.lineWidth = lineWidth;
      context.strokeStyle = context.fillStyle = strokeColour;
      trace();
      context.stroke();
      for (const stop of [path[0], path[path.length - 1]]) {
        context.beginPath();
        context.arc(...toScreen(...stop), lineWidth, 0, 2 * Math.PI);
        context.fill();
      }
    }
  }
  const ring = (x, y, r, lineWidth, strokeColour) => {
    context.beginPath();
    context.arc(...toScreen(x, y), r, 0, 2 * Math.PI);
    context.lineWidth = lineWidth;
    context.strokeStyle = strokeColour;
    context.stroke();
  };
  if (chosen !== null) {
    ring(plane.x[chosen], plane.y[chosen], 7, 4, colour("--card"));
    ring(plane.x[chosen], plane.y[chosen], 7, 2, colour("--ink"));
  }
  const [x, y] = position();
  ring(x, y, 12, 5, "#ffffff");
  ring(x, y, 12, 2.5, "#000000");
}

// ---- Decoded images behind the points, a few at a time so that the page stays responsive.

const SIDE = 18;
const sheet = document.createElement("canvas");
let version = 0;
let tiling = false;
function drawTiles() {
  const current = ++version;
  tiling = $("tiles").checked;
  if (!tiling) return drawPoints();
  if (sheet.width !== SIDE * width || sheet.height !== SIDE * height)
    Object.assign(sheet, { width: SIDE * width, height: SIDE * height });
  const context = sheet.getContext("2d");
  const [left, right, bottom, top] = plane.box;
  const at = z.slice();
  const ofLabel = label;
  let next = 0;
  const drawSome = () => {
    if (current !== version) return;
    for (const began = performance.now(); next < SIDE * SIDE && performance.now() - began < 10; next++) {
      const column = next % SIDE, row = Math.floor(next / SIDE);
      basis.set(at, across, left + ((column + 0.5) / SIDE) * (right - left));
      if (dims > 1) basis.set(at, up, top - ((row + 0.5) / SIDE) * (top - bottom));
      context.putImageData(pixels(decode(at, ofLabel)), column * width, row * height);
    }
    drawPoints();
    tiling = next < SIDE * SIDE;
    if (tiling) setTimeout(drawSome, 10);
  };
  setTimeout(drawSome, 60);
}

// ---- A test image and its reconstruction.

function nearest(x, y) {
  const [px, py] = toScreen(x, y);
  let index = 0, least = Infinity;
  for (let i = 0; i < data.count; i++) {
    if (isolated !== null && data.labels[i] !== isolated) continue;
    const [qx, qy] = toScreen(plane.x[i], plane.y[i]);
    const square = (px - qx) ** 2 + (py - qy) ** 2;
    if (square < least) [least, index] = [square, i];
  }
  return { index, distance: Math.sqrt(least) };
}
const testImages = new Image();
testImages.src = data.sheet;

function choose(index) {
  chosen = index;
  z.set(latents.subarray(index * dims, (index + 1) * dims));
  if (data.classes) pickClass(data.labels[index]);
  const column = index % data.columns, row = Math.floor(index / data.columns);
  $("chosen").hidden = false;
  const name = data.labels ? `, class ${data.labels[index]}` : "";
  $("which").textContent = `Test image ${index}${name}`;
  paint($("rebuilt"), decode(z, label));
  const canvas = $("original");
  Object.assign(canvas, { width, height });
  testImages.decode().then(() => {
    if (chosen === index)
      canvas.getContext("2d").drawImage(
        testImages, column * width, row * height, width, height, 0, 0, width, height);
  });
  if (basis.size > 2) drawTiles();
  redraw();
}

// ---- Paths.

let drawingPath = false; // whether dragging draws a path
let playing = 0; // id of the requested animation frame, or 0
function setPath(stops) {
  path = stops;
  $("play").disabled = path.length < 2;
  $("clear").disabled = path.length < 1;
  redraw();
}
function setDrawing(on) {
  drawingPath = on;
  $("draw").setAttribute("aria-pressed", String(on));
}
function stop() {
  cancelAnimationFrame(playing);
  playing = 0;
  $("play").textContent = "Play";
}
function play() {
  if (playing) return stop();
  if (path.length < 2) return;
  const lengths = [0];
  for (let i = 1; i < path.length; i++) {
    const [a, b] = toScreen(...path[i - 1]), [c, d] = toScreen(...path[i]);
    lengths.push(lengths[i - 1] + Math.hypot(c - a, d - b));
  }
  const total = lengths[lengths.length - 1];
  const duration = Math.min(12000, Math.max(2000, (6000 * total) / planeWidth));
  const began = performance.now();
  $("play").textContent = "Stop";
  const frame = (now) => {
    const travelled = Math.min(1, Math.max(0, (now - began) / duration)) * total;
    let i = 1;
    while (i < path.length - 1 && lengths[i] < travelled) i++;
    const share = (travelled - lengths[i - 1]) / (lengths[i] - lengths[i - 1] || 1);
    const [a, b] = path[i - 1], [c, d] = path[i];
    moveTo(a + share * (c - a), b + share * (d - b));
    if (travelled < total) playing = requestAnimationFrame(frame);
    else stop();
  };
  playing = requestAnimationFrame(frame);
}

// ---- Pointer events: mouse, touch and stylus.

let pressed = null;
const eventPoint = (event) => {
  const frame = $("plane").getBoundingClientRect();
  return fromScreen(event.clientX - frame.left - 1, event.clientY - frame.top - 1);
};
$("plane").addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  stop();
  pressed = { x: event.clientX, y: event.clientY, moved: false };
  $("plane").setPointerCapture(event.pointerId);
  if (drawingPath) setPath([eventPoint(event)]);
  moveTo(...eventPoint(event));
});
$("plane").addEventListener("pointermove", (event) => {
  if (playing) return;
  $("readout").setAttribute("aria-live", "off");
  if (pressed && Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 5)
    pressed.moved = true;
  if (pressed && drawingPath) setPath([...path, eventPoint(event)]);
  moveTo(...eventPoint(event));
});
$("plane").addEventListener("pointerup", (event) => {
  if (!pressed) return;
  const { moved } = pressed;
  pressed = null;
  if (drawingPath) {
    if (path.length > 1 && moved) {
      setDrawing(false);
      play();
    } else {
      setPath([]);
    }
    return;
  }
  if (moved) return;
  const found = nearest(...eventPoint(event));
  if (found.distance < (event.pointerType === "mouse" ? 12 : 24)) choose(found.index);
});
$("plane").addEventListener("pointercancel", () => { pressed = null; });

$("plane").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [x, y] = position();
  const [left, right, bottom, top] = plane.box;
  const share = event.shiftKey ? 0.05 : 0.01;
  const stepX = share * (right - left), stepY = share * (top - bottom);
  const actions = {
    ArrowLeft: () => moveTo(x - stepX, y),
    ArrowRight: () => moveTo(x + stepX, y),
    ArrowUp: () => moveTo(x, y + stepY),
    ArrowDown: () => moveTo(x, y - stepY),
    Enter: () => choose(nearest(x, y).index),
    p: () => setPath([...path, [x, y]]),
    " ": play,
    Escape: stop,
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  if (event.key.startsWith("Arrow")) stop();
  $("readout").setAttribute("aria-live", "polite"); // for screen readers
  action();
});

// ---- Controls.

$("draw").addEventListener("click", () => { stop(); setDrawing(!drawingPath); });
$("play").addEventListener("click", play);
$("clear").addEventListener("click", () => { stop(); setPath([]); });
$("tiles").addEventListener("change", drawTiles);
$("smooth").addEventListener("change", () => {
  document.body.classList.toggle("smooth", $("smooth").checked);
});

classLabels.forEach((classLabel) => {
  const button = document.createElement("button"), dot = document.createElement("i");
  dot.style.background = colourOf(classLabel);
  button.append(dot, String(classLabel));
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    isolated = isolated === classLabel ? null : classLabel;
    [...$("legend").children].forEach((one, i) =>
      one.setAttribute("aria-pressed", String(classLabels[i] === isolated)));
    $("legend").classList.toggle("one", isolated !== null);
    drawPoints();
    redraw();
  });
  $("legend").append(button);
});

const classButtons = [];
for (let classLabel = 0; classLabel < data.classes; classLabel++) {
  const one = document.createElement("label"), input = document.createElement("input");
  const text = document.createElement("span");
  Object.assign(input, { type: "radio", name: "class", value: classLabel, checked: classLabel === 0 });
  text.textContent = classLabel;
  one.append(input, text);
  input.addEventListener("change", () => { pickClass(classLabel); drawTiles(); redraw(); });
  classButtons.push(input);
  $("classes").append(one);
}
$("classes").hidden = !data.classes;
function pickClass(classLabel) {
  label = classLabel;
  classButtons[classLabel].checked = true;
}

// ---- The groups of a hierarchy.

function normal() { // Box and Muller
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}
let start = 0;
data.groups.forEach((group, g) => {
  const first = start, line = document.createElement("div"), name = document.createElement("span");
  start += group.size;
  name.textContent = `${g + 1}: ${group.rows} \u00d7 ${group.columns} \u00d7 ${group.latents}`;
  line.append(name);
  for (const [text, value] of [["Draw", normal], ["Mean", () => 0]]) {
    const button = document.createElement("button");
    button.textContent = text;
    button.setAttribute("aria-label", `${text} group ${g + 1}`);
    button.addEventListener("click", () => {
      stop();
      for (let k = first; k < first + group.size; k++) z[k] = value();
      drawTiles();
      redraw();
    });
    line.append(button);
  }
  $("groups").append(line);
});
$("levels").hidden = !data.groups.length;

let sliders = [];
function makeSliders() {
  sliders = [];
  $("sliders").replaceChildren();
  for (let k = 0; k < basis.size; k++) {
    if (k === across || k === up) continue;
    const line = document.createElement("label"), name = document.createElement("span");
    const input = document.createElement("input"), value = document.createElement("output");
    name.textContent = basis.name(k);
    Object.assign(input, { type: "range", min: -4, max: 4, step: 0.01 });
    input.addEventListener("input", () => {
      stop();
      basis.set(z, k, Number(input.value));
      drawTiles();
      redraw();
    });
    line.append(name, input, value);
    $("sliders").append(line);
    sliders.push({
      show() {
        const now = basis.get(z, k);
        if (document.activeElement !== input || Math.abs(now - input.value) > 0.006) input.value = now;
        const text = signed(now);
        if (value.textContent !== text) value.textContent = text;
      },
    });
  }
  $("rest").hidden = !sliders.length;
  $("others").textContent = `Other ${basis === BASES[0] ? "latents" : "components"}`;
}
$("reset").addEventListener("click", () => {
  for (let k = 0; k < basis.size; k++) if (k !== across && k !== up) basis.set(z, k, 0);
  drawTiles();
  redraw();
});

function updateProjection() {
  stop();
  setPath([]);
  project();
  makeSliders();
  drawPoints();
  drawTiles();
  redraw();
}
function fillAxisMenus() {
  for (const [id, at] of [["across", across], ["up", up]]) {
    $(id).replaceChildren();
    for (let k = 0; k < basis.size; k++) $(id).add(new Option(basis.name(k), k, false, k === at));
  }
}
$("axes").hidden = dims < 3;
$("basis").addEventListener("change", () => {
  basis = BASES[$("basis").value];
  [across, up] = [0, 1];
  fillAxisMenus();
  updateProjection();
});
for (const id of ["across", "up"])
  $(id).addEventListener("change", () => {
    const [first, second] = [Number($("across").value), Number($("up").value)];
    // Selecting the axis of the other menu swaps the two.
    [across, up] = first === second ? [up, across] : [first, second];
    fillAxisMenus();
    updateProjection();
  });

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawPoints(); redraw(); });
new ResizeObserver(() => {
  planeWidth = $("plane").clientWidth;
  planeHeight = $("plane").clientHeight;
  drawPoints();
  redraw();
}).observe($("plane"));

$("model").textContent = `${data.title}; ${data.count.toLocaleString("en")} test images`;
fillAxisMenus();
updateProjection();

// For tests and benchmarks.
window.explorer = {
  decode: (at, ofLabel = 0) => Array.from(decode(Float32Array.from(at), ofLabel)),
  state: () => ({
    z: Array.from(z), label, chosen, stops: path.length, playing: Boolean(playing), tiling, frames,
    points: Array.from(plane.x, (x, i) => toScreen(x, plane.y[i])),
  }),
};
