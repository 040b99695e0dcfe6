// Draws the data of this page. Everything that comes from user code is set as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const { gaps: [GAP_X, GAP_Y, PORT_GAP, PAD, HEAD], groups: PLANS } = DATA.layout;
const BEND = 6, SWEEPS = 7, FIELDS = { time: "time_ms", flops: "flops", bytes: "bytes" };
const $ = (id) => document.getElementById(id);

// Items: nodes and groups by key, with their parents. Keys of groups have "g:" in front, those of nodes "n:".
const ITEMS = new Map();
const NODES = new Map(DATA.nodes.map((n) => [n.id, n]));
const TAKERS = new Map();
for (const node of DATA.nodes)
  for (const source of node.inputs) TAKERS.set(source, [...(TAKERS.get(source) || []), node.id]);

function grow(branch, parent, level) {
  const isGroup = typeof branch !== "string";
  const item = { parent, level, isGroup, key: (isGroup ? "g:" : "n:") + (isGroup ? branch.id : branch) };
  ITEMS.set(item.key, item);
  if (isGroup) {
    Object.assign(item, { group: branch, plan: PLANS[branch.id] });
    item.children = branch.children.map((child, i) => Object.assign(grow(child, item, level + 1), { box: item.plan.boxes[i] }));
    item.nodes = item.children.flatMap((child) => child.nodes);
  } else Object.assign(item, { node: NODES.get(branch), nodes: [NODES.get(branch)] });
  const say = isGroup ? [branch.label, branch.type, branch.path]
    : [item.node.label, item.node.operator, item.node.module, item.node.source, item.node.code, ...item.node.weights,
      ...item.node.outputs.map((t) => `[${t.shape.join(", ")}] ${t.dtype}`)];
  item.words = say.join("\n").toLowerCase();
  return item;
}
const ROOT = grow(DATA.tree, null, 0);
const state = { open: new Set(DATA.open), cost: "time", selected: null, found: [], x: 0, y: 0, k: 1 };
const isOpen = (item) => item.isGroup && state.open.has(item.group.id);

// Numbers and words.
const value = (item, cost) => {
  const known = item.nodes.map((n) => n[FIELDS[cost]]).filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) : null;
};
function quantity(number, cost) {
  if (number === null) return "–";
  let step = 0, v = cost === "time" ? number * 1e3 : number;
  const steps = cost === "time" ? ["µ", "m", ""] : ["", "k", "M", "G", "T", "P"];
  while (Math.abs(v) >= 999.5 && step < steps.length - 1) { v /= 1000; step += 1; }
  return `${Number(v.toPrecision(3))} ${steps[step]}${{ time: "s", flops: "FLOP", bytes: "B" }[cost]}`;
}
const shape = (t) => `[${t.shape.join(", ")}] ${t.dtype}`;
const title = (item) => (item.isGroup ? item.group.label : item.node.label);
function share(item, cost) {
  const all = value(ROOT, cost), own = value(item, cost);
  return own === null || !all ? "" : ` · ${Number(((100 * own) / all).toPrecision(2))} %`;
}
function spoken(item) {
  const where = item.isGroup ? `${item.group.type}, ${item.nodes.filter((n) => n.kind === "operator").length} operators`
    : [item.node.module, ...item.node.outputs.map(shape)].filter(Boolean).join(", ");
  const costs = !item.isGroup && item.node.kind !== "operator" ? ""
    : `, ${Object.keys(FIELDS).map((c) => `${DATA.costs[c]} ${quantity(value(item, c), c)}`).join(", ")}`;
  return `${title(item)}, ${where}${costs}`;
}

// Drawing.
function svg(name, attributes, ...content) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, v] of Object.entries(attributes)) element.setAttribute(key, v);
  element.append(...content);
  return element;
}
function way([[x0, y0], [x1, y1], [x2, y2], ...rest]) {
  const middle = (y1 + y2) / 2;
  const bend = Math.abs(x1 - x2) < 0.05 ? `V${y2}` : `C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`;
  return `M${x0} ${y0}V${y1}${bend}` + rest.map(([x, y]) => `L${x} ${y}`).join("");
}
let shown = new Map(), edges = [];

function draw() {
  const scene = $("scene"), inside = place(ROOT);
  shown = new Map();
  edges = [];
  scene.replaceChildren();
  state.size = [inside.width, inside.height];
  content(scene, inside, 0, 0, 0);
  paint();
  mark();
}

function content(scene, inside, x, y, depth) {
  for (const { line, points } of inside.lines) {
    const edge = svg("path", { class: "edge", d: way(points.map(([a, b]) => [a + x, b + y])) });
    edges.push({ line, edge });
    scene.append(edge);
  }
  for (const box of inside.boxes) {
    const spot = { item: box.item, x: x + box.x, y: y + box.y, width: box.width, height: box.height };
    spot.element = element(spot, Boolean(box.inside), depth);
    shown.set(box.item.key, spot);
    scene.append(spot.element);
    if (box.inside) content(scene, box.inside, spot.x, spot.y, depth + 1);
  }
}

function element({ item, x, y, width, height }, opened, depth) {
  const end = !item.isGroup && item.node.kind !== "operator";
  const [name, hint, below] = opened ? [...item.plan.head.slice(1), ""] : item.box.slice(2);
  const idle = !end && item.nodes.every((n) => !n.calls);
  const kinds = ["item", opened ? "open" : "leaf", end && "end", idle && "idle", depth % 2 && "odd"].filter(Boolean);
  const g = svg("g", { class: kinds.join(" "), transform: `translate(${x} ${y})`, role: "treeitem", tabindex: -1, "aria-label": spoken(item), "aria-level": item.level, "data-key": item.key });
  g.append(svg("rect", { class: "body", width, height, rx: end ? 16 : 5 }));
  const left = item.isGroup ? 30 : 11, first = end ? 16 : 19;
  g.append(svg("text", { x: left, y: first }, svg("tspan", { class: "name" }, name), svg("tspan", { class: "soft", dx: 5 }, hint)));
  g.append(svg("text", { class: "soft", x: item.isGroup ? left : 11, y: end ? 30 : 36 }, below));
  if (!end) g.append(svg("text", { class: "cost", x: width - 10, y: first }));
  if (item.isGroup) {
    g.setAttribute("aria-expanded", opened);
    const sign = svg("g", { class: "toggle", transform: "translate(10 8)" }, svg("rect", { width: 13, height: 13, rx: 3 }), svg("path", { d: `M3.5 6.5h6${opened ? "" : "M6.5 3.5v6"}` }));
    sign.addEventListener("click", (event) => { event.stopPropagation(); toggle(item); });
    g.append(sign);
    g.addEventListener("dblclick", () => toggle(item));
  }
  g.addEventListener("click", () => select(item));
  return g;
}

function paint() {
  const leaves = [...shown.values()].filter(({ item }) => !isOpen(item));
  const most = Math.max(0, ...leaves.map(({ item }) => value(item, state.cost) || 0));
  for (const { item, element: g } of shown.values()) {
    const own = value(item, state.cost);
    // A root makes small costs visible beside a large one; the legend's middle says so.
    if (!isOpen(item)) g.style.setProperty("--heat", most ? 100 * Math.sqrt((own || 0) / most) : 0);
    const text = g.querySelector(".cost");
    if (text) text.textContent = quantity(own, state.cost);
  }
  for (const button of $("costs").children) {
    button.setAttribute("aria-checked", button.dataset.cost === state.cost);
    button.tabIndex = button.dataset.cost === state.cost ? 0 : -1;
  }
  $("legend-title").textContent = `${DATA.costs[state.cost]} of a box`;
  $("legend-middle").textContent = quantity(most / 4, state.cost);
  $("legend-most").textContent = quantity(most, state.cost);
}

function mark() {
  const chosen = state.selected, own = new Set(chosen ? chosen.nodes.map((n) => n.id) : []);
  const taken = new Set(chosen ? chosen.nodes.flatMap((n) => n.inputs).filter((id) => !own.has(id)) : []);
  for (const { line, edge } of edges) edge.classList.toggle("on", taken.has(line) || own.has(line));
  const found = new Set(state.found.map((item) => visible(item)));
  const first = chosen && shown.has(chosen.key) ? chosen.key : shown.keys().next().value;
  for (const [key, { item, element: g }] of shown) {
    g.classList.toggle("on", item === chosen);
    g.classList.toggle("found", found.has(item));
    g.setAttribute("aria-selected", item === chosen);
    g.setAttribute("tabindex", key === first ? 0 : -1);
  }
}

/** The item itself, or the closed group that hides it. */
function visible(item) {
  let result = item;
  for (let up = item.parent; up; up = up.parent) if (!isOpen(up)) result = up;
  return result;
}

// The view.
function view() { $("scene").setAttribute("transform", `translate(${state.x} ${state.y}) scale(${state.k})`); }
function zoom(factor, px, py) {
  const { width, height } = $("canvas").getBoundingClientRect();
  const k = Math.min(4, Math.max(0.02, state.k * factor)), x = px ?? width / 2, y = py ?? height / 2;
  state.x = x - ((x - state.x) * k) / state.k;
  state.y = y - ((y - state.y) * k) / state.k;
  state.k = k;
  view();
}
function fit(least = 0.02) {
  const { width, height } = $("canvas").getBoundingClientRect(), [w, h] = state.size;
  state.k = Math.min(1.25, Math.max(least, Math.min((width - 40) / w, (height - 40) / h)));
  state.x = (width - w * state.k) / 2;
  state.y = h * state.k > height - 40 ? 20 : (height - h * state.k) / 2;
  view();
}
function bring(item) {
  const spot = shown.get(item.key), { width, height } = $("canvas").getBoundingClientRect();
  if (!spot) return;
  const x = state.x + spot.x * state.k, y = state.y + spot.y * state.k, w = spot.width * state.k, h = spot.height * state.k;
  if (x < 10 || x + w > width - 10) state.x += x + w / 2 > 0 && w > width ? 10 - x : width / 2 - x - w / 2;
  if (y < 10 || y + Math.min(h, height / 2) > height - 10) state.y += (h > height / 2 ? 60 : height / 2 - h / 2) - y;
  view();
}

// What can be done.
function toggle(item, to = !isOpen(item)) {
  const before = shown.get(item.key);
  if (to) state.open.add(item.group.id); else state.open.delete(item.group.id);
  draw();
  const after = shown.get(item.key);
  if (before && after) {
    // The head of the box stays where the eye is.
    state.x += (before.x + before.width / 2 - after.x - after.width / 2) * state.k;
    state.y += (before.y - after.y) * state.k;
  }
  view();
  select(item);
}
function reveal(item) {
  let changed = false;
  for (let up = item.parent; up; up = up.parent)
    if (!isOpen(up)) { state.open.add(up.group.id); changed = true; }
  if (changed) draw();
  select(item);
}
function select(item, focus = true) {
  state.selected = item;
  mark();
  details();
  if (!item) return;
  bring(item);
  if (focus) shown.get(item.key)?.element.focus({ preventScroll: true });
}
function every(opened) {
  state.open = new Set([ROOT.group.id]);
  if (opened) for (const item of ITEMS.values()) if (item.isGroup) state.open.add(item.group.id);
  if (state.selected) state.selected = visible(state.selected);
  draw();
  fit(0.85);
}
function search(text) {
  const wanted = text.trim().toLowerCase();
  state.found = wanted ? [...ITEMS.values()].filter((item) => item !== ROOT && item.words.includes(wanted)) : [];
  $("hits").textContent = wanted ? `${state.found.length} found` : "";
  state.selected = null;
  mark();
  details();
}
function nextHit(step) {
  if (!state.found.length) return;
  const at = state.found.indexOf(state.selected);
  const next = at < 0 && step < 0 ? state.found.length - 1 : (at + step + state.found.length) % state.found.length;
  reveal(state.found[next]);
  $("search").focus();
  $("hits").textContent = `${next + 1} of ${state.found.length}`;
}

// The panel.
function html(name, text, ...content) {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  element.append(...content);
  return element;
}
function table(rows) {
  return html("dl", "", ...rows.filter(([, v]) => v !== "" && v !== null && v !== undefined).flatMap(([k, v]) => [html("dt", k), html("dd", String(v))]));
}
function listed(items, right) {
  const list = html("ul");
  list.className = "list";
  for (const item of items) {
    const button = html("button", "", html("span", title(item)), html("span", right(item)));
    const where = item.isGroup ? item.group.path : item.node.module;
    if (where) button.append(html("small", where));
    button.addEventListener("click", () => reveal(item));
    list.append(html("li", "", button));
  }
  return list;
}
function costRows(item) {
  return Object.keys(FIELDS).map((c) => [DATA.costs[c], quantity(value(item, c), c) + share(item, c)]);
}
function details() {
  const item = state.selected, side = $("side");
  side.replaceChildren();
  side.scrollTop = 0;
  if (!item && state.found.length) {
    side.append(html("h2", `${state.found.length} found`), listed(state.found.slice(0, 60), (i) => quantity(value(i, state.cost), state.cost)));
    if (state.found.length > 60) side.append(html("p", `and ${state.found.length - 60} more`));
  } else if (!item) overview(side);
  else if (item.isGroup) groupDetails(side, item);
  else nodeDetails(side, item);
}
function overview(side) {
  side.append(html("h2", DATA.name), table([["class", DATA.type], ["operators", DATA.nodes.filter((n) => n.kind === "operator").length], ...costRows(ROOT).map(([k, v]) => [k, v.split(" · ")[0]])]));
  const how = html("p", DATA.facts.how || "");
  how.className = "quiet";
  side.append(how);
  for (const [name, meaning] of Object.entries(DATA.sizes)) side.append(html("p", `${name}: ${meaning}`));
  for (const note of DATA.notes) side.append(html("p", note));
  side.append(html("h3", `Most ${DATA.costs[state.cost]}`), listed(costly(ROOT), (i) => quantity(value(i, state.cost), state.cost)));
  side.append(html("h3", "Keys"));
  for (const [keys, what] of [["↑ ↓", "along the data"], ["← →", "previous and next box"], ["Enter", "open or close a group"], ["Esc", "group around, then overview"], ["/", "search, Enter for the next"], ["1 2 3", "colour by time, FLOPs, bytes"], ["+ − 0", "zoom, fit"]])
    side.append(html("p", "", ...keys.split(" ").flatMap((k) => [html("kbd", k), " "]), what));
}
function costly(item) {
  return item.nodes.filter((n) => n[FIELDS[state.cost]]).sort((a, b) => b[FIELDS[state.cost]] - a[FIELDS[state.cost]]).slice(0, 10).map((n) => ITEMS.get(`n:${n.id}`));
}
function groupDetails(side, item) {
  const { label, type, path, kind } = item.group;
  side.append(html("h2", label), table([["kind", kind === "module" ? "module" : kind === "run" ? "operators in a row" : kind], ["class", type], ["module", path], ["operators", item.nodes.filter((n) => n.kind === "operator").length], ...costRows(item)]));
  side.append(html("h3", `Most ${DATA.costs[state.cost]} inside`), listed(costly(item), (i) => quantity(value(i, state.cost), state.cost)));
}
function nodeDetails(side, item) {
  const n = item.node;
  side.append(html("h2", n.label));
  if (n.operator) side.append(html("p", "", html("code", n.operator)));
  side.append(table([["kind", n.kind], ["module", n.module], ...(n.kind === "operator" ? [...costRows(item), ["read", quantity(n.read_bytes, "bytes")], ["written", quantity(n.written_bytes, "bytes")], ["runs", n.calls === 1 ? "" : n.calls ? `${n.calls} times` : "not with these inputs"]] : [])]));
  n.outputs.forEach((t, i) => {
    side.append(html("h3", n.outputs.length > 1 ? `Output ${i}` : "Output"), html("p", shape(t)));
    if (t.measured && t.measured.join() !== t.shape.join()) side.append(html("p", `[${t.measured.join(", ")}] in this run`));
  });
  for (const [head, lines] of [["Arguments", n.attributes], ["Weights", n.weights]])
    if (lines.length) side.append(html("h3", head), ...lines.map((line) => html("p", "", html("code", line))));
  if (n.source) side.append(html("h3", "Source"), html("p", "", html("code", n.source)), html("pre", "", html("code", n.code)));
  for (const [head, ids] of [["From", n.inputs], ["To", TAKERS.get(n.id) || []]])
    if (ids.length) side.append(html("h3", head), listed(ids.map((id) => ITEMS.get(`n:${id}`)), (i) => i.node.outputs.map((t) => `[${t.shape.join(", ")}]`).join(" ")));
}

// Keys and pointer.
function along(item, down) {
  const own = new Set(item.nodes.map((n) => n.id));
  for (const node of down ? [...item.nodes].reverse() : item.nodes)
    for (const id of down ? TAKERS.get(node.id) || [] : node.inputs)
      if (!own.has(id)) {
        // Into a closed group as a whole, out of an open one to what is in it.
        const next = visible(ITEMS.get(`n:${id}`));
        if (next !== item) return next;
      }
  return null;
}
function beside(item, step) {
  const order = [...shown.values()].sort((a, b) => a.y - b.y || a.x - b.x).map((s) => s.item);
  return order[order.indexOf(item) + step];
}
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const item = state.selected && shown.has(state.selected.key) ? state.selected : null;
  const first = shown.values().next().value?.item;
  const acts = {
    ArrowDown: () => select(item ? along(item, true) || item : first), ArrowUp: () => select(item ? along(item, false) || item : first),
    ArrowRight: () => select((item && beside(item, 1)) || item || first), ArrowLeft: () => select((item && beside(item, -1)) || item || first),
    Enter: () => (item ? item.isGroup && toggle(item) : select(first)), " ": () => (item ? item.isGroup && toggle(item) : select(first)),
    Escape: () => select(item && item.parent !== ROOT ? item.parent : null),
    "/": () => $("search").focus(), "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => fit(),
    1: () => colour("time"), 2: () => colour("flops"), 3: () => colour("bytes"),
  };
  const act = acts[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}
function colour(cost) {
  state.cost = cost;
  paint();
  details();
}
function dragging(canvas) {
  const down = new Map();
  canvas.addEventListener("pointerdown", (event) => { down.set(event.pointerId, [event.clientX, event.clientY]); });
  canvas.addEventListener("pointermove", (event) => {
    const from = down.get(event.pointerId);
    if (!from) return;
    const to = [event.clientX, event.clientY], other = [...down].find(([id]) => id !== event.pointerId);
    if (!canvas.classList.contains("drag") && Math.hypot(to[0] - from[0], to[1] - from[1]) < 4) return;
    canvas.classList.add("drag");
    canvas.setPointerCapture(event.pointerId);
    if (other) {
      const box = canvas.getBoundingClientRect(), [cx, cy] = other[1];
      zoom(Math.hypot(to[0] - cx, to[1] - cy) / Math.max(1, Math.hypot(from[0] - cx, from[1] - cy)), cx - box.left, cy - box.top);
    } else { state.x += to[0] - from[0]; state.y += to[1] - from[1]; view(); }
    down.set(event.pointerId, to);
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, (event) => { down.delete(event.pointerId); setTimeout(() => canvas.classList.remove("drag")); });
  // The click that ends a drag chooses nothing.
  canvas.addEventListener("click", (event) => { if (canvas.classList.contains("drag")) event.stopPropagation(); }, true);
  canvas.addEventListener("click", (event) => { if (event.target === canvas) select(null); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : event.ctrlKey ? 0.01 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
}

function begin() {
  document.title = $("title").textContent = DATA.name;
  const count = DATA.nodes.filter((n) => n.kind === "operator").length;
  $("summary").textContent = [`${count} operators`, ...Object.keys(FIELDS).map((c) => quantity(value(ROOT, c), c))].join(", ");
  for (const cost of Object.keys(FIELDS)) {
    const button = html("button", DATA.costs[cost]);
    button.dataset.cost = cost;
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => colour(cost));
    $("costs").append(button);
  }
  $("costs").addEventListener("keydown", (event) => {
    const names = Object.keys(FIELDS), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: 2, ArrowUp: 2 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    colour(names[(names.indexOf(state.cost) + step) % 3]);
    $("costs").querySelector("[aria-checked=true]").focus();
  });
  $("canvas").addEventListener("keydown", pressed);
  document.addEventListener("keydown", (event) => {
    if (event.target === document.body || ("/" === event.key && event.target.tagName !== "INPUT")) pressed(event);
  });
  $("search").addEventListener("input", () => search($("search").value));
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); nextHit(event.shiftKey ? -1 : 1); }
    if (event.key === "Escape") { $("search").value = ""; search(""); $("canvas").querySelector("[tabindex='0']")?.focus(); }
  });
  $("open-all").addEventListener("click", () => every(true));
  $("close-all").addEventListener("click", () => every(false));
  $("in").addEventListener("click", () => zoom(1.25));
  $("out").addEventListener("click", () => zoom(0.8));
  $("fit").addEventListener("click", () => fit());
  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  dragging($("canvas"));
  draw();
  fit(0.85);
  details();
}
begin();
