"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const [height, width, channels] = data.shape;

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}
function unpacked([bits, text]) {
  const buffer = bytes(text);
  return bits === 32 ? new Float32Array(buffer) : Float32Array.from(new Uint16Array(buffer), fromHalf);
}
// IEEE 754 binary16: a sign, five bits of exponent, ten of fraction.
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const run = compile(data.program, data.constants.map(unpacked));
const latents = new Float32Array(bytes(data.points)); // of every test image in turn
const dims = data.latents;
const z = new Float32Array(dims); // where we are
let label = 0;

function decode(at, ofClass) {
  return data.classes ? run(at, [ofClass]) : run(at);
}

// ---- Coordinates: the latents themselves, or their principal components.

const middle = new Float32Array(dims);
for (let i = 0; i < latents.length; i++) middle[i % dims] += latents[i] / data.count;
const components = data.components.map((text) => new Float32Array(bytes(text)));
const BASES = [
  {
    size: dims,
    name: (k) => `z${k + 1}`,
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
let up = 1; // with one latent, there is no second axis

const kinds = data.labels ? [...new Set(data.labels)].sort((a, b) => a - b) : [];
const plane = { x: new Float32Array(data.count), y: new Float32Array(data.count), box: null, medians: [] };

function lay() {
  for (let i = 0; i < data.count; i++) {
    plane.x[i] = basis.get(latents, across, i * dims);
    // One latent alone: the points are spread out by the golden ratio, so as not to hide each other.
    plane.y[i] = dims > 1 ? basis.get(latents, up, i * dims) : ((i * 0.6180339887) % 1) * 2 - 1;
  }
  plane.box = [...reach(plane.x), ...reach(plane.y)];
  plane.medians = kinds.map((kind) => {
    const of = [...data.labels.keys()].filter((i) => data.labels[i] === kind);
    return [plane.x, plane.y].map(
      (numbers) => of.map((i) => numbers[i]).sort((a, b) => a - b)[of.length >> 1]);
  });
}
function reach(numbers) {
  let low = -2, high = 2;
  for (const number of numbers) {
    low = Math.min(low, number);
    high = Math.max(high, number);
  }
  const edge = 0.05 * (high - low);
  return [low - edge, high + edge];
}
const here = () => [basis.get(z, across), dims > 1 ? basis.get(z, up) : 0];
function goTo(x, y) {
  const [left, right, bottom, top] = plane.box;
  basis.set(z, across, Math.min(Math.max(x, left), right));
  if (dims > 1) basis.set(z, up, Math.min(Math.max(y, bottom), top));
  changed();
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

let waiting = false;
let frames = 0;
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    paint($("image"), decode(z, label));
    drawPointer();
    showPosition();
    frames++;
  });
}

const signed = (number) => number.toFixed(2).replace("-", "\u2212");
function showPosition() {
  const [x, y] = here();
  const said = [[basis.name(across), signed(x)]];
  if (dims > 1) said.push([basis.name(up), signed(y)]);
  if (data.classes) said.push(["class", label]);
  else if (data.labels) said.push(["nearest class", data.labels[nearest(x, y).index]]);
  $("readout").replaceChildren(...said.map(([name, value]) => {
    const item = document.createElement("b"), faint = document.createElement("span");
    faint.textContent = `${name} `;
    item.append(faint, String(value));
    return item;
  }));
  for (const slider of sliders) slider.show();
}

// ---- The plane.

let size = 0; // of the plane's sides, in CSS pixels
let tall = 0;
const toScreen = (x, y) => {
  const [left, right, bottom, top] = plane.box;
  return [((x - left) / (right - left)) * size, ((top - y) / (top - bottom)) * tall];
};
const fromScreen = (px, py) => {
  const [left, right, bottom, top] = plane.box;
  return [left + (px / size) * (right - left), top - (py / tall) * (top - bottom)];
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const kindOf = new Map(kinds.map((kind, i) => [kind, i]));
const colourOf = (kind) => data.colours[(kindOf.get(kind) ?? 0) % data.colours.length];
let alone = null; // the class shown alone

function prepared(canvas) {
  const scale = window.devicePixelRatio || 1;
  const w = Math.round(size * scale), h = Math.round(tall * scale);
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, size, tall);
  return pen;
}

function drawPoints() {
  if (!size) return;
  const pen = prepared($("points"));
  const [left, right, bottom, top] = plane.box;
  const behind = $("tiles").checked;
  if (behind) {
    pen.fillStyle = "#000000";
    pen.fillRect(0, 0, size, tall);
    pen.globalAlpha = 0.65; // the points are in front
    pen.drawImage(sheet, 0, 0, size, tall);
    pen.globalAlpha = 1;
  }
  const write = (text, x, y) => {
    if (behind) {
      pen.strokeStyle = "#000000";
      pen.lineWidth = 4;
      pen.lineJoin = "round";
      pen.strokeText(text, x, y);
    }
    pen.fillText(text, x, y);
  };
  pen.font = "12px system-ui, sans-serif";
  const faint = behind ? "#ffffff" : colour("--faint");
  for (const [low, high, axis] of [[left, right, 0], [bottom, top, 1]]) {
    if (axis === 1 && dims === 1) continue;
    const step = high - low > 16 ? 4 : high - low > 8 ? 2 : 1;
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) {
      const [px, py] = toScreen(axis ? left : at, axis ? at : bottom);
      if (!behind) {
        pen.strokeStyle = colour("--line");
        pen.lineWidth = 1;
        pen.globalAlpha = at === 0 ? 1 : 0.45;
        pen.beginPath();
        pen.moveTo(axis ? 0 : px, axis ? py : 0);
        pen.lineTo(axis ? size : px, axis ? py : tall);
        pen.stroke();
        pen.globalAlpha = 1;
      }
      pen.fillStyle = faint;
      pen.textAlign = axis ? "left" : "center";
      const text = String(at).replace("-", "\u2212");
      if (axis ? py > 24 && py < tall - 24 : px > 30 && px < size - 40)
        write(text, axis ? 6 : px, axis ? py + 4 : tall - 6);
    }
  }
  pen.font = "600 13px system-ui, sans-serif";
  pen.textAlign = "right";
  pen.fillStyle = faint;
  write(`${basis.name(across)} \u2192`, size - 8, tall - 7);
  pen.textAlign = "left";
  if (dims > 1) write(`\u2191 ${basis.name(up)}`, 6, 18);

  const radius = data.count > 3000 ? 2 : data.count > 800 ? 2.75 : 3.75;
  pen.strokeStyle = behind ? "rgba(255, 255, 255, 0.8)" : colour("--edge");
  pen.lineWidth = 0.75;
  for (let i = 0; i < data.count; i++) {
    const kind = data.labels ? data.labels[i] : null;
    const shown = alone === null || kind === alone;
    const [px, py] = toScreen(plane.x[i], plane.y[i]);
    pen.globalAlpha = shown ? 0.8 : 0.08;
    pen.fillStyle = colourOf(kind);
    pen.beginPath();
    pen.arc(px, py, radius, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
  }
  pen.globalAlpha = 1;
  if (!data.classes && kinds.length <= 2 * data.colours.length) nameClasses(pen);
}

// A class's number at its median, so that it need not be told by its colour alone.
function nameClasses(pen) {
  pen.font = "700 17px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  for (const [i, kind] of kinds.entries()) {
    if (alone !== null && kind !== alone) continue;
    const [px, py] = toScreen(...plane.medians[i]);
    pen.lineWidth = 5;
    pen.strokeStyle = "#ffffff";
    pen.strokeText(kind, px, py);
    pen.fillStyle = colourOf(kind);
    pen.fillText(kind, px, py);
  }
  pen.textBaseline = "alphabetic";
}

let path = []; // stops, in the plane's coordinates
let chosen = null; // the test image looked at

function drawPointer() {
  if (!size) return;
  const pen = prepared($("pointer"));
  if (path.length) {
    const trace = () => {
      pen.beginPath();
      for (const stop of path) pen.lineTo(...toScreen(...stop));
    };
    pen.lineJoin = pen.lineCap = "round";
    for (const [wide, ink] of [[6, colour("--card")], [3, colour("--ink")]]) {
      pen.lineWidth = wide;
      pen.strokeStyle = pen.fillStyle = ink;
      trace();
      pen.stroke();
      for (const stop of [path[0], path[path.length - 1]]) {
        pen.beginPath();
        pen.arc(...toScreen(...stop), wide, 0, 2 * Math.PI);
        pen.fill();
      }
    }
  }
  const ring = (x, y, r, wide, ink) => {
    pen.beginPath();
    pen.arc(...toScreen(x, y), r, 0, 2 * Math.PI);
    pen.lineWidth = wide;
    pen.strokeStyle = ink;
    pen.stroke();
  };
  if (chosen !== null) {
    ring(plane.x[chosen], plane.y[chosen], 7, 4, colour("--card"));
    ring(plane.x[chosen], plane.y[chosen], 7, 2, colour("--ink"));
  }
  const [x, y] = here();
  ring(x, y, 12, 5, "#ffffff");
  ring(x, y, 12, 2.5, "#000000");
}

// ---- Decoded pictures behind the points, a few at a time, so that the page stays quick.

const SIDE = 18;
const sheet = document.createElement("canvas");
let version = 0;
let tiling = false;
function tileBehind() {
  const mine = ++version;
  tiling = $("tiles").checked;
  if (!tiling) return drawPoints();
  if (sheet.width !== SIDE * width || sheet.height !== SIDE * height)
    Object.assign(sheet, { width: SIDE * width, height: SIDE * height });
  const pen = sheet.getContext("2d");
  const [left, right, bottom, top] = plane.box;
  const at = z.slice();
  const ofClass = label;
  let next = 0;
  const some = () => {
    if (mine !== version) return;
    for (const began = performance.now(); next < SIDE * SIDE && performance.now() - began < 10; next++) {
      const column = next % SIDE, row = Math.floor(next / SIDE);
      basis.set(at, across, left + ((column + 0.5) / SIDE) * (right - left));
      if (dims > 1) basis.set(at, up, top - ((row + 0.5) / SIDE) * (top - bottom));
      pen.putImageData(pixels(decode(at, ofClass)), column * width, row * height);
    }
    drawPoints();
    tiling = next < SIDE * SIDE;
    if (tiling) setTimeout(some, 10);
  };
  setTimeout(some, 60);
}

// ---- A test image and its reconstruction.

function nearest(x, y) {
  const [px, py] = toScreen(x, y);
  let index = 0, least = Infinity;
  for (let i = 0; i < data.count; i++) {
    if (alone !== null && data.labels[i] !== alone) continue;
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
  if (basis.size > 2) tileBehind();
  changed();
}

// ---- Paths.

let drawing = false; // whether a drag draws one
let playing = 0; // the animation frame asked for
function setPath(stops) {
  path = stops;
  $("play").disabled = path.length < 2;
  $("clear").disabled = path.length < 1;
  changed();
}
function setDrawing(on) {
  drawing = on;
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
  const whole = lengths[lengths.length - 1];
  const lasts = Math.min(12000, Math.max(2000, (6000 * whole) / size));
  const began = performance.now();
  $("play").textContent = "Stop";
  const frame = (now) => {
    const gone = Math.min(1, Math.max(0, (now - began) / lasts)) * whole;
    let i = 1;
    while (i < path.length - 1 && lengths[i] < gone) i++;
    const share = (gone - lengths[i - 1]) / (lengths[i] - lengths[i - 1] || 1);
    const [a, b] = path[i - 1], [c, d] = path[i];
    goTo(a + share * (c - a), b + share * (d - b));
    if (gone < whole) playing = requestAnimationFrame(frame);
    else stop();
  };
  playing = requestAnimationFrame(frame);
}

// ---- The pointer: a finger, a pen or the mouse.

let pressed = null;
const place = (event) => {
  const frame = $("plane").getBoundingClientRect();
  return fromScreen(event.clientX - frame.left - 1, event.clientY - frame.top - 1);
};
$("plane").addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  stop();
  pressed = { x: event.clientX, y: event.clientY, moved: false };
  $("plane").setPointerCapture(event.pointerId);
  if (drawing) setPath([place(event)]);
  goTo(...place(event));
});
$("plane").addEventListener("pointermove", (event) => {
  if (playing) return;
  $("readout").setAttribute("aria-live", "off");
  if (pressed && Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 5)
    pressed.moved = true;
  if (pressed && drawing) setPath([...path, place(event)]);
  goTo(...place(event));
});
$("plane").addEventListener("pointerup", (event) => {
  if (!pressed) return;
  const { moved } = pressed;
  pressed = null;
  if (drawing) {
    if (path.length > 1 && moved) {
      setDrawing(false);
      play();
    } else {
      setPath([]);
    }
    return;
  }
  if (moved) return;
  const found = nearest(...place(event));
  if (found.distance < (event.pointerType === "mouse" ? 12 : 24)) choose(found.index);
});
$("plane").addEventListener("pointercancel", () => { pressed = null; });

$("plane").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [x, y] = here();
  const [left, right, bottom, top] = plane.box;
  const share = event.shiftKey ? 0.05 : 0.01;
  const across_ = share * (right - left), up_ = share * (top - bottom);
  const acts = {
    ArrowLeft: () => goTo(x - across_, y),
    ArrowRight: () => goTo(x + across_, y),
    ArrowUp: () => goTo(x, y + up_),
    ArrowDown: () => goTo(x, y - up_),
    Enter: () => choose(nearest(x, y).index),
    p: () => setPath([...path, [x, y]]),
    " ": play,
    Escape: stop,
  };
  const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  if (event.key.startsWith("Arrow")) stop();
  $("readout").setAttribute("aria-live", "polite"); // to who cannot see where the keys have led
  act();
});

// ---- Controls.

$("draw").addEventListener("click", () => { stop(); setDrawing(!drawing); });
$("play").addEventListener("click", play);
$("clear").addEventListener("click", () => { stop(); setPath([]); });
$("tiles").addEventListener("change", tileBehind);
$("smooth").addEventListener("change", () => {
  document.body.classList.toggle("smooth", $("smooth").checked);
});

kinds.forEach((kind) => {
  const button = document.createElement("button"), dot = document.createElement("i");
  dot.style.background = colourOf(kind);
  button.append(dot, String(kind));
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    alone = alone === kind ? null : kind;
    [...$("legend").children].forEach((one, i) =>
      one.setAttribute("aria-pressed", String(kinds[i] === alone)));
    $("legend").classList.toggle("one", alone !== null);
    drawPoints();
    changed();
  });
  $("legend").append(button);
});

const classButtons = [];
for (let kind = 0; kind < data.classes; kind++) {
  const one = document.createElement("label"), input = document.createElement("input");
  const text = document.createElement("span");
  Object.assign(input, { type: "radio", name: "class", value: kind, checked: kind === 0 });
  text.textContent = kind;
  one.append(input, text);
  input.addEventListener("change", () => { pickClass(kind); tileBehind(); changed(); });
  classButtons.push(input);
  $("classes").append(one);
}
$("classes").hidden = !data.classes;
function pickClass(kind) {
  label = kind;
  classButtons[kind].checked = true;
}

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
      tileBehind();
      changed();
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
  $("others").textContent = `The other ${basis === BASES[0] ? "latents" : "components"}`;
}
$("reset").addEventListener("click", () => {
  for (let k = 0; k < basis.size; k++) if (k !== across && k !== up) basis.set(z, k, 0);
  tileBehind();
  changed();
});

function layAgain() {
  stop();
  setPath([]);
  lay();
  makeSliders();
  drawPoints();
  tileBehind();
  changed();
}
function nameAxes() {
  for (const [id, at] of [["across", across], ["up", up]]) {
    $(id).replaceChildren();
    for (let k = 0; k < basis.size; k++) $(id).add(new Option(basis.name(k), k, false, k === at));
  }
}
$("axes").hidden = dims < 3;
$("basis").addEventListener("change", () => {
  basis = BASES[$("basis").value];
  [across, up] = [0, 1];
  nameAxes();
  layAgain();
});
for (const id of ["across", "up"])
  $(id).addEventListener("change", () => {
    const [first, second] = [Number($("across").value), Number($("up").value)];
    // The same axis twice is the two exchanged.
    [across, up] = first === second ? [up, across] : [first, second];
    nameAxes();
    layAgain();
  });

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawPoints(); changed(); });
new ResizeObserver(() => {
  size = $("plane").clientWidth;
  tall = $("plane").clientHeight;
  drawPoints();
  changed();
}).observe($("plane"));

$("model").textContent = `${data.title}; ${data.count.toLocaleString("en")} test images`;
nameAxes();
layAgain();

// For tests and measurements.
window.explorer = {
  decode: (at, ofClass = 0) => Array.from(decode(Float32Array.from(at), ofClass)),
  state: () => ({
    z: Array.from(z), label, chosen, stops: path.length, playing: Boolean(playing), tiling, frames,
    points: Array.from(plane.x, (x, i) => toScreen(x, plane.y[i])),
  }),
};
