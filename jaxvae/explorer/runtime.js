// Executes a decoder's program, written by program.py. Registers are flat Float32Arrays.
"use strict";

// Returns the program as a function of its inputs. The next call overwrites its result.
function compile(program, constants) {
  const values = program.sizes.map((size, i) => constants[i] || new Float32Array(size));
  const known = program.sizes.map((_, i) => i < constants.length);
  const steps = [];
  for (const operation of program.operations) {
    const given = operation.in.map((register) => values[register]);
    const step = KINDS[operation.kind](operation, given, values[operation.out]);
    // Operations on constants only are executed once, here.
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
    const from = positions(operation);
    return () => {
      for (let i = 0; i < from.length; i++) out[i] = x[from[i]];
    };
  },

  place(operation, [fill, ...parts], out) {
    const to = operation.parts.map(positions);
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
    // Separate loops for the most frequent functions, which the engine optimises best.
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
    const product = sparseProduct(k, n);
    return () => {
      out.fill(0);
      for (let row = 0; row < batch * m; row++) {
        const count = product.gather(x, row * k);
        product.add(out, row * n, y, Math.floor(row / m) * k * n, count, n);
      }
    };
  },

  // Each input pixel is added to the output pixels that it contributes to. Zeros, which relus and
  // transposed convolutions produce, are skipped.
  conv(operation, [x, kernel], out) {
    const { stride, low, spread, reach, groups } = operation;
    const [images, height, width, channels] = operation.x;
    const [tapRows, tapColumns, fanIn, fanOut] = operation.kernel;
    const [rows, columns] = operation.result;
    const groupOut = fanOut / groups;
    const product = sparseProduct(fanIn, fanOut);
    const down = contributions(height, tapRows, rows, 0);
    const right = contributions(width, tapColumns, columns, 1);

    // For each input position: tap, output position, tap, output position, ...
    function contributions(side, taps, steps, axis) {
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
              const count = product.gather(x, pixel);
              if (!count) continue;
              const vertical = down[h], horizontal = right[w];
              for (let v = 0; v < vertical.length; v += 2)
                for (let u = 0; u < horizontal.length; u += 2) {
                  const row = image * rows + vertical[v + 1];
                  const to = (row * columns + horizontal[u + 1]) * fanOut + group * groupOut;
                  const tap = vertical[v] * tapColumns + horizontal[u];
                  product.add(out, to, kernel, tap * fanIn * fanOut + group * groupOut, count, groupOut);
                }
            }
    };
  },
};

// Vector-matrix products that skip zeros: `gather` collects the vector's other elements, `add` adds
// their product with the matrix to `out`. Rows of the matrix are `apart` elements apart.
function sparseProduct(length, apart) {
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

// Returns the buffer positions of a strided array's elements, in row-major order.
function positions({ shape, strides, offset }) {
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
  // Rounds to eight significant bits, ties to even.
  bfloat16(a) {
    if (!Number.isFinite(a)) return a;
    ROUNDED.setFloat32(0, a);
    const bits = ROUNDED.getUint32(0);
    ROUNDED.setUint32(0, (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000);
    return ROUNDED.getFloat32(0);
  },
};
