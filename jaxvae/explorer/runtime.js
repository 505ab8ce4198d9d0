// Carries out a decoder's program, as program.py writes it: registers are flat Float32Arrays.
"use strict";

// The program as a function of its inputs' numbers. What it returns is overwritten by the next call.
function compile(program, constants) {
  const values = program.sizes.map((size, i) => constants[i] || new Float32Array(size));
  const known = program.sizes.map((_, i) => i < constants.length);
  const steps = [];
  for (const operation of program.operations) {
    const given = operation.in.map((register) => values[register]);
    const step = KINDS[operation.kind](operation, given, values[operation.out]);
    // What depends on constants alone is done once.
    if (operation.in.every((register) => known[register])) {
      step();
      known[operation.out] = true;
    } else {
      steps.push(step);
    }
  }
  return (...inputs) => {
    inputs.forEach((numbers, i) => values[program.inputs[i]].set(numbers));
    for (const step of steps) step();
    return values[program.output];
  };
}

const KINDS = {
  view(operation, [x], out) {
    const from = places(operation);
    return () => {
      for (let i = 0; i < from.length; i++) out[i] = x[from[i]];
    };
  },

  place(operation, [fill, ...parts], out) {
    const to = operation.parts.map(places);
    return () => {
      out.fill(fill[0]);
      parts.forEach((part, p) => {
        const where = to[p];
        for (let i = 0; i < where.length; i++) out[where[i]] = part[i];
      });
    };
  },

  map(operation, [a, b, c], out) {
    const n = out.length;
    // A loop of its own for what networks do most: the engine makes each one fast.
    switch (operation.f) {
      case "add": return () => { for (let i = 0; i < n; i++) out[i] = a[i] + b[i]; };
      case "mul": return () => { for (let i = 0; i < n; i++) out[i] = a[i] * b[i]; };
      case "max": return () => { for (let i = 0; i < n; i++) out[i] = a[i] > b[i] ? a[i] : b[i]; };
    }
    const f = FUNCTIONS[operation.f];
    if (!b) return () => { for (let i = 0; i < n; i++) out[i] = f(a[i]); };
    if (!c) return () => { for (let i = 0; i < n; i++) out[i] = f(a[i], b[i]); };
    return () => { for (let i = 0; i < n; i++) out[i] = f(a[i], b[i], c[i]); };
  },

  reduce(operation, [x], out) {
    const { inner } = operation;
    const f = FUNCTIONS[operation.f];
    const start = { add: 0, max: -Infinity, min: Infinity }[operation.f];
    return () => {
      for (let i = 0; i < out.length; i++) {
        let total = start;
        for (let j = i * inner; j < (i + 1) * inner; j++) total = f(total, x[j]);
        out[i] = total;
      }
    };
  },

  dot(operation, [x, y], out) {
    const { batch, m, k, n } = operation;
    const met = gathering(k, n);
    return () => {
      out.fill(0);
      for (let row = 0; row < batch * m; row++) {
        const count = met.gather(x, row * k);
        met.add(out, row * n, y, Math.floor(row / m) * k * n, count, n);
      }
    };
  },

  // Every input pixel adds its share to the output pixels it reaches: zeros, of which relus and
  // transposed convolutions make many, cost nothing.
  conv(operation, [x, kernel], out) {
    const { stride, low, spread, reach, groups } = operation;
    const [images, height, width, channels] = operation.x;
    const [tapRows, tapColumns, fanIn, fanOut] = operation.kernel;
    const [rows, columns] = operation.result;
    const each = fanOut / groups;
    const met = gathering(fanIn, fanOut);
    const down = meetings(height, tapRows, rows, 0);
    const right = meetings(width, tapColumns, columns, 1);

    // For every input position, [tap, output position] in turn.
    function meetings(side, taps, steps, axis) {
      return Array.from({ length: side }, (_, at) => {
        const found = [];
        for (let tap = 0; tap < taps; tap++) {
          const from = at * spread[axis] + low[axis] - tap * reach[axis];
          const step = from / stride[axis];
          if (Number.isInteger(step) && step >= 0 && step < steps) found.push(tap, step);
        }
        return found;
      });
    }

    return () => {
      out.fill(0);
      for (let image = 0; image < images; image++)
        for (let h = 0; h < height; h++)
          for (let w = 0; w < width; w++)
            for (let group = 0; group < groups; group++) {
              const pixel = ((image * height + h) * width + w) * channels + group * fanIn;
              const count = met.gather(x, pixel);
              if (!count) continue;
              const vertical = down[h], horizontal = right[w];
              for (let v = 0; v < vertical.length; v += 2)
                for (let u = 0; u < horizontal.length; u += 2) {
                  const row = image * rows + vertical[v + 1];
                  const to = (row * columns + horizontal[u + 1]) * fanOut + group * each;
                  const tap = vertical[v] * tapColumns + horizontal[u];
                  met.add(out, to, kernel, tap * fanIn * fanOut + group * each, count, each);
                }
            }
    };
  },
};

// Vector times matrix, without the vector's zeros: `gather` finds the others, `add` adds to `out`
// what these make of a matrix whose rows lie `apart`.
function gathering(length, apart) {
  const numbers = new Float64Array(length);
  const starts = new Int32Array(length);
  return {
    gather(x, offset) {
      let count = 0;
      for (let i = 0; i < length; i++) {
        const number = x[offset + i];
        if (number !== 0) {
          numbers[count] = number;
          starts[count++] = i * apart;
        }
      }
      return count;
    },
    add(out, to, matrix, offset, count, n) {
      if (n < 4) {
        for (let j = 0; j < n; j++) {
          let sum = 0;
          for (let i = 0; i < count; i++) sum += numbers[i] * matrix[offset + starts[i] + j];
          out[to + j] += sum;
        }
        return;
      }
      let i = 0;
      for (; i + 3 < count; i += 4) {
        const a = numbers[i], b = numbers[i + 1], c = numbers[i + 2], d = numbers[i + 3];
        const p = offset + starts[i], q = offset + starts[i + 1];
        const r = offset + starts[i + 2], s = offset + starts[i + 3];
        for (let j = 0; j < n; j++)
          out[to + j] += a * matrix[p + j] + b * matrix[q + j] + c * matrix[r + j] + d * matrix[s + j];
      }
      for (; i < count; i++) {
        const a = numbers[i], p = offset + starts[i];
        for (let j = 0; j < n; j++) out[to + j] += a * matrix[p + j];
      }
    },
  };
}

// Where the elements of an array of this shape lie in a buffer, in row-major order.
function places({ shape, strides, offset }) {
  let found = [offset];
  shape.forEach((side, axis) => {
    const next = new Int32Array(found.length * side);
    for (let i = 0; i < found.length; i++)
      for (let j = 0; j < side; j++) next[i * side + j] = found[i] + j * strides[axis];
    found = next;
  });
  return Int32Array.from(found);
}

const ROUNDED = new DataView(new ArrayBuffer(4));

const FUNCTIONS = {
  add: (a, b) => a + b,
  sub: (a, b) => a - b,
  mul: (a, b) => a * b,
  div: (a, b) => a / b,
  max: Math.max,
  min: Math.min,
  pow: Math.pow,
  neg: (a) => -a,
  exp: Math.exp,
  exp2: (a) => 2 ** a,
  log: Math.log,
  log1p: Math.log1p,
  expm1: Math.expm1,
  tanh: Math.tanh,
  logistic: (a) => 1 / (1 + Math.exp(-a)),
  abs: Math.abs,
  sign: Math.sign,
  floor: Math.floor,
  ceil: Math.ceil,
  trunc: Math.trunc,
  sqrt: Math.sqrt,
  rsqrt: (a) => 1 / Math.sqrt(a),
  sin: Math.sin,
  cos: Math.cos,
  square: (a) => a * a,
  clamp: (least, a, most) => Math.min(Math.max(a, least), most),
  select: (which, no, yes) => (which ? yes : no),
  eq: (a, b) => +(a === b),
  ne: (a, b) => +(a !== b),
  lt: (a, b) => +(a < b),
  le: (a, b) => +(a <= b),
  gt: (a, b) => +(a > b),
  ge: (a, b) => +(a >= b),
  // The series erf(x) = 2 / sqrt(pi) e^(-x^2) sum_n 2^n x^(2n + 1) / (1 3 5 ... (2n + 1)).
  erf(x) {
    if (Math.abs(x) > 4) return Math.sign(x);
    let term = x, sum = x;
    for (let n = 1; Math.abs(term) > 1e-9 * Math.abs(sum); n++) {
      term *= (2 * x * x) / (2 * n + 1);
      sum += term;
    }
    return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
  },
  erfc: (x) => 1 - FUNCTIONS.erf(x),
  // The nearest number of eight significant bits; of two, the even one.
  bfloat16(a) {
    if (!Number.isFinite(a)) return a;
    ROUNDED.setFloat32(0, a);
    const bits = ROUNDED.getUint32(0);
    ROUNDED.setUint32(0, (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000);
    return ROUNDED.getFloat32(0);
  },
};
