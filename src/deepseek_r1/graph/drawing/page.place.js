"use strict";
// Placing: the same steps, in the same order, as in _place.py.
function place(item) {
  const plan = item.plan, inner = new Map();
  item.children.forEach((child, i) => { if (isOpen(child)) inner.set(i, place(child)); });
  const sizes = plan.vertices.map(([kind, , child]) => kind !== "child" ? [BEND, 0]
    : inner.has(child) ? [inner.get(child).width, inner.get(child).height] : plan.boxes[child]);
  const end = (index, side, line) => {
    const [kind, , child, , ins, outs, main] = plan.vertices[index], width = sizes[index][0];
    if (kind !== "child") return 0;
    if (inner.has(child)) return inner.get(child).ports.get(side + line) - width / 2;
    const order = side === "in" ? ins : outs, middle = side === "in" ? main : (order.length - 1) / 2;
    const step = Math.min(16, (width / 2 - 12) / Math.max(middle, order.length - 1 - middle, 1));
    return (order.indexOf(line) - middle) * step;
  };
  const offsets = plan.segments.map(([a, b, line]) => [end(a, "out", line), end(b, "in", line)]);
  return assemble(item, plan, inner, sizes, offsets, columns(plan, sizes, offsets));
}

function columns(plan, sizes, offsets) {
  const x = sizes.map(() => 0), up = sizes.map(() => []), down = sizes.map(() => []);
  for (const row of plan.rows) {
    let edge = 0;
    for (const v of row) { x[v] = edge + sizes[v][0] / 2; edge += sizes[v][0] + GAP_X; }
  }
  plan.segments.forEach(([a, b], i) => { down[a].push(i); up[b].push(i); });
  const firm = plan.vertices.map(([kind]) => (kind === "child" ? 4 : 1));
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const [near, far] = sweep % 2 === 0 ? [up, down] : [down, up];
    for (const row of sweep % 2 === 0 ? plan.rows : [...plan.rows].reverse()) {
      const pulls = row.map((v) => pull(plan, v, near[v], far[v], offsets, x));
      const wanted = row.map((v, i) => (pulls[i] === null ? x[v] : pulls[i]));
      const weights = row.map((v, i) => (pulls[i] === null ? 0.1 : firm[v]));
      spread(wanted, weights, row.map((v) => sizes[v][0])).forEach((centre, i) => { x[row[i]] = centre; });
    }
    if (sweep % 2) tighten(plan, sizes, offsets, x);
  }
  return x;
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function pull(plan, vertex, near, far, offsets, x) {
  const bend = plan.vertices[vertex][0] === "bend";
  const places = (segments, alike) => {
    const found = [];
    for (const i of segments) {
      const [a, b] = plan.segments[i], [other, shift] = b === vertex ? [a, 1] : [b, -1];
      if (!alike || (plan.vertices[other][0] === "bend") === bend) found.push(x[other] + shift * (offsets[i][0] - offsets[i][1]));
    }
    return found;
  };
  let found = places(near, true);
  if (!found.length && bend) found = places(far, true);
  if (!found.length) found = places(near, false);
  return found.length ? mean(found) : null;
}

function tighten(plan, sizes, offsets, x) {
  const bent = plan.vertices.map(([kind]) => kind === "bend"), lines = new Map(), ends = new Map(), beside = new Map();
  const add = (map, key, v) => { if (map.has(key)) map.get(key).push(v); else map.set(key, [v]); };
  plan.vertices.forEach(([, , , line], v) => { if (bent[v]) add(lines, line, v); });
  plan.segments.forEach(([a, b, line], i) => { if (bent[a] !== bent[b]) add(ends, line, bent[a] ? x[b] + offsets[i][1] : x[a] + offsets[i][0]); });
  for (const row of plan.rows) row.forEach((v, i) => beside.set(v, [row[i - 1], row[i + 1]]));
  for (const [line, bends] of lines) {
    let low = -Infinity, high = Infinity;
    for (const v of bends) {
      const [left, right] = beside.get(v);
      if (left !== undefined) low = Math.max(low, x[left] + sizes[left][0] / 2 + GAP_X + BEND / 2);
      if (right !== undefined) high = Math.min(high, x[right] - sizes[right][0] / 2 - GAP_X - BEND / 2);
    }
    if (low <= high) {
      const column = Math.min(Math.max(mean(ends.get(line)), low), high);
      for (const v of bends) x[v] = column;
    }
  }
}

function spread(wanted, weights, widths) {
  const shifts = [], blocks = [];
  let edge = 0;
  for (const width of widths) { shifts.push(edge + width / 2); edge += width + GAP_X; }
  wanted.forEach((want, i) => {
    blocks.push([want - shifts[i], weights[i], 1]);
    while (blocks.length > 1 && blocks[blocks.length - 2][0] > blocks[blocks.length - 1][0]) {
      const [m, weight, members] = blocks.pop(), last = blocks[blocks.length - 1];
      last[0] = (last[0] * last[1] + m * weight) / (last[1] + weight);
      last[1] += weight;
      last[2] += members;
    }
  });
  return blocks.flatMap(([m, , members]) => Array(members).fill(m)).map((m, i) => m + shifts[i]);
}

function assemble(item, plan, inner, sizes, offsets, x) {
  const root = item === ROOT;
  let left = Infinity, right = -Infinity, y = root ? 0 : HEAD;
  sizes.forEach(([width], v) => { left = Math.min(left, x[v] - width / 2); right = Math.max(right, x[v] + width / 2); });
  if (!sizes.length) left = right = 0;
  const width = Math.max(right - left + 2 * PAD, root ? 0 : plan.head[0]), shift = (width - (right - left)) / 2 - left;
  x = x.map((v) => v + shift);
  const tops = [], heights = [];
  plan.rows.forEach((row, i) => {
    const height = row.reduce((most, v) => Math.max(most, sizes[v][1]), 0), last = i === plan.rows.length - 1;
    tops.push(y);
    heights.push(height);
    y += height + (last ? (height ? PAD : 0) : i ? GAP_Y : row.length ? PORT_GAP : PAD);
  });
  const result = { width, height: y, boxes: [], lines: [], ports: new Map() };
  const top = plan.vertices.map(([, row], v) => tops[row] + (heights[row] - sizes[v][1]) / 2);
  plan.vertices.forEach(([kind, , child, line], v) => {
    if (kind === "child") result.boxes.push({ item: item.children[child], x: x[v] - sizes[v][0] / 2, y: top[v], width: sizes[v][0], height: sizes[v][1], inside: inner.get(child) });
    else if (kind !== "bend") result.ports.set(kind + line, x[v]);
  });
  plan.segments.forEach(([a, b, line], i) => {
    const [upper, upperRow] = plan.vertices[a], [lower, lowerRow] = plan.vertices[b], [from, to] = offsets[i];
    const under = tops[upperRow] + heights[upperRow];
    const points = [[x[a] + from, upper === "child" ? top[a] + sizes[a][1] : under], [x[a] + from, under], [x[b] + to, tops[lowerRow]], [x[b] + to, lower === "out" ? y : top[b]]];
    if (lower === "bend") points.push([x[b], tops[lowerRow] + heights[lowerRow]]);
    result.lines.push({ line, points });
  });
  return result;
}
