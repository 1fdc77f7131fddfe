"use strict";
// The page of t2vz's gallery. Every text from a row is put in as text, never as markup. Only the cards in and near the
// window exist, so that thousands of rows cost no more than a screenful.
(() => {
const GAP = 16, NARROWEST = 340, STAGE = 184, CAPTION = 16, OVERSCAN = 600, ASK_EVERY_MS = 2000, SETTLED_MS = 60;
const STAGES = ["decode", "conditions", "model", "generate", "encode"];
const TABLES = {
  "Made": ["id", "status", "attempts", "model", "model_revision", "controlnets", "loras", "scheduler", "dtype", "device", "seed", "width", "height", "frames", "fps", "codec", "audio_kept", "content", "content_frames", "signed"],
  "Where": ["output_uri", "output_bytes", "output_sha256", "source_uri", "source_fingerprint", "decoder", "manifest", "row_number"],
  "Run": ["run_id", "started_at", "finished_at", "wall_s", "peak_memory_bytes", "unet_evaluations", "t2vz_version", "torch_version", "diffusers_version", "job_id", "schema_version", "output_mtime_ns"],
};
const ELSEWHERE = new Set(["prompt", "negative_prompt", "mode", "parameters", "quality", "warnings", "error_stage", "error_class", "error_message", "retryable",
  "key", "labels", "panel_px", "period_s", "video", "picture", ...STAGES.map(stage => `${stage}_s`), ...Object.values(TABLES).flat()]);

const data = JSON.parse(document.getElementById("data").textContent);
const base = data.base || "";
const find = id => document.getElementById(id);
const list = find("rows"), form = find("filters"), dialog = find("row");
const field = name => form.elements.namedItem(name);
const rows = new Map();     // key → row
let visible = [];           // the rows that the filters leave, in order
let current = 0;            // place in `visible` that the keyboard is at
let columns = 1, cardWidth = 0, cardHeight = 0, listWidth = 0;
let drawn = new Map();      // place → {row, card}
let opened = null;          // the row in the dialog
let paused = false, waiting = 0;
let plots = {}, better = {}, manifestColumns = [], total = 0;

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return node;
}
const number = value => value.toLocaleString("en", {maximumSignificantDigits: 4});
const counted = (value, noun) => `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
const words = name => name.replaceAll("_", " ");
const short = value => value.toLocaleString("en", {maximumSignificantDigits: 3});
const seconds = value => value < 1 ? `${Math.round(value * 1000)} ms` : value < 120 ? `${short(value)} s` : `${short(value / 60)} min`;
const shortModel = model => model.split("/").slice(-2).join("/");

// ---------------------------------------------------------------- rows and filters

function take(told) {
  if (told.epoch !== data.epoch) rows.clear();
  data.epoch = told.epoch;
  data.number = told.number;
  for (const row of told.rows) {
    row.sought = [row.prompt, row.id, row.negative_prompt, row.error_message, ...(row.warnings || [])].filter(Boolean).join("\n").toLowerCase();
    row.time = Date.parse(row.finished_at);
    rows.set(row.key, row);
  }
  if (told.plots) plots = told.plots;
  if (told.better) better = told.better;
  if (told.columns) manifestColumns = told.columns;
  if (told.total !== undefined) total = told.total;
}

function choices() {
  const all = [...rows.values()];
  const tally = name => {
    const counts = new Map();
    for (const row of all) if (row[name] !== undefined) counts.set(row[name], (counts.get(row[name]) || 0) + 1);
    return counts;
  };
  fill("status", "all", [...tally("status")].sort(), value => value);
  fill("mode", "all", [...tally("mode")].sort(), value => value);
  fill("model", "all", [...tally("model")].sort(), shortModel);
  fill("content", "all", [...tally("content")].sort(), value => value);
  fill("manifest", "all", [...tally("manifest")].sort(), value => value.split("/").pop());
  const began = new Map();
  for (const row of all) began.set(row.run_id, Math.min(began.get(row.run_id) ?? Infinity, Date.parse(row.started_at)));
  fill("run", "all", [...tally("run_id")].sort((a, b) => began.get(b[0]) - began.get(a[0])), value => new Date(began.get(value)).toLocaleString());
  const measures = [...new Set(all.flatMap(row => Object.keys(row.quality || {})))].sort();
  fill("measure", "any", measures.map(name => [name, null]), words);
  find("quality").hidden = !measures.length;
  const orders = [["newest", null], ["manifest", null], ["slowest", null]];
  for (const name of measures) {
    if (better[name]) orders.push([`best ${name}`, null], [`worst ${name}`, null]);
    else orders.push([`low ${name}`, null], [`high ${name}`, null]);
  }
  const said = {newest: "newest first", manifest: "as in the manifest", slowest: "slowest first"};
  fill("order", null, orders, value => said[value] || words(value).replace(" ", " in "));
}

function fill(name, everything, counts, say) {
  const select = field(name), before = select.value || select.dataset.wanted || "";
  const options = counts.map(([value, count]) => el("option", {value}, count === null ? say(value) : `${say(value)} (${count})`));
  if (everything) options.unshift(el("option", {value: ""}, everything));
  select.replaceChildren(...options);
  const known = counts.some(([value]) => value === before);
  select.value = known ? before : everything ? "" : counts[0][0];
  if (known) delete select.dataset.wanted;
  if (everything && name !== "measure") select.closest("label").hidden = counts.length < 2 && !known;
}

function filter() {
  const sought = field("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const same = {status: "status", mode: "mode", model: "model", content: "content", run: "run_id", manifest: "manifest"};
  const wanted = Object.entries(same).map(([name, column]) => [column, field(name).value]).filter(([, value]) => value);
  const measure = field("measure").value, limit = name => field(name).value === "" ? null : Number(field(name).value);
  const from = limit("from"), to = limit("to");
  visible = [...rows.values()].filter(row => {
    if (!wanted.every(([column, value]) => row[column] === value) || !sought.every(word => row.sought.includes(word))) return false;
    if (!measure) return true;
    const value = row.quality?.[measure];
    return value !== undefined && (from === null || value >= from) && (to === null || value <= to);
  });
  const [way, ...rest] = field("order").value.split(" "), name = rest.join(" ");
  const upwards = way === "low" || (way === "best" ? better[name] === "lower" : better[name] === "higher");
  const order = {
    newest: (a, b) => b.time - a.time,
    manifest: (a, b) => (a.manifest || "").localeCompare(b.manifest || "") || (a.row_number || 0) - (b.row_number || 0),
    slowest: (a, b) => (b.wall_s || 0) - (a.wall_s || 0),
  }[way] || ((a, b) => {
    const x = a.quality?.[name], y = b.quality?.[name];
    return x === undefined || y === undefined ? (x === undefined) - (y === undefined) : upwards ? x - y : y - x;
  });
  visible.sort(order);
  field("from").disabled = field("to").disabled = !measure;
}

function show() {
  filter();
  waiting = 0;
  current = Math.min(current, Math.max(0, visible.length - 1));
  for (const {card} of drawn.values()) card.remove();
  drawn.clear();
  list.querySelector(".nothing")?.remove();
  if (!visible.length) {
    const why = rows.size ? "No row is like that." : data.live ? "No results yet: rows appear here as they are finished." : "There are no rows.";
    list.append(el("li", {className: "nothing"}, why));
  }
  tell();
  layout();
  showPlots();
}

function tell() {
  const failed = visible.reduce((sum, row) => sum + (row.status === "failed"), 0);
  const left = total > rows.size ? `; of ${total.toLocaleString("en")} in all, these finished last` : "";
  find("count").replaceChildren(el("strong", {}, visible.length.toLocaleString("en")),
    visible.length === rows.size ? ` row${visible.length === 1 ? "" : "s"}` : ` of ${counted(rows.size, "row")}`, failed ? `, ${failed.toLocaleString("en")} failed` : "", left);
  find("fresh").hidden = !waiting;
  find("fresh").textContent = `Show ${counted(waiting, "new row")}`;
  find("again").hidden = !visible.some(row => row.parameters?.cells);
}

function showPlots() {
  const shown = plots[field("run").value] || {};
  const pictures = Object.values(shown).filter(Boolean);
  const key = pictures.join("");
  const box = find("plots").querySelector("div");
  find("plots").hidden = !pictures.length;
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...pictures.map(svg => {
    const title = new DOMParser().parseFromString(svg, "image/svg+xml").querySelector("title");
    return el("img", {alt: title ? title.textContent : "", src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`});
  }));
}

// ---------------------------------------------------------------- the list: only what is in sight is drawn

function layout() {
  const width = listWidth = list.clientWidth;
  const style = getComputedStyle(document.documentElement);
  cardHeight = parseFloat(style.getPropertyValue("--card-height"));
  columns = Math.max(1, Math.floor((width + GAP) / (NARROWEST + GAP)));
  cardWidth = Math.floor((width - GAP * (columns - 1)) / columns);
  const lines = Math.ceil(visible.length / columns);
  list.style.height = visible.length ? `${lines * (cardHeight + GAP) - GAP}px` : "";
  const focused = list.contains(document.activeElement) && document.activeElement !== list;
  for (const {card} of drawn.values()) card.remove();
  drawn.clear();
  if (focused) go(current);  // a window that is turned or resized takes the keyboard's place along
  else draw();
}

function draw() {
  const top = -list.getBoundingClientRect().top, step = cardHeight + GAP;
  const first = Math.max(0, Math.floor((top - OVERSCAN) / step)) * columns;
  const last = Math.min(visible.length, Math.ceil((top + innerHeight + OVERSCAN) / step) * columns);
  const focused = list.contains(document.activeElement) ? current : -1;  // is not taken away under the reader
  for (const [place, {card}] of drawn) {
    if ((place < first || place >= last) && place !== focused) { card.remove(); drawn.delete(place); }
  }
  for (let place = first; place < last; place++) {
    if (drawn.has(place)) continue;
    const made = card(visible[place], place);
    let after = null;  // cards lie in the document as in the list, which is how a screen reader goes through them
    for (const node of list.children) if (node.place > place) { after = node; break; }
    list.insertBefore(made, after);
    drawn.set(place, {row: visible[place], card: made});
  }
}

function card(row, place) {
  const failed = row.status !== "ok";
  const node = el("li", {className: `card ${failed ? "failed" : "ok"}`, "aria-posinset": place + 1, "aria-setsize": visible.length});
  node.place = place;
  node.style.width = `${cardWidth}px`;
  node.style.transform = `translate(${(place % columns) * (cardWidth + GAP)}px, ${Math.floor(place / columns) * (cardHeight + GAP)}px)`;
  const stage = el("div", {className: "stage"});
  if (failed) stage.append(reason(row));
  else panels(stage, row, cardWidth - 24, STAGE - 20);
  const open = el("button", {type: "button", className: "open", tabIndex: place === current ? 0 : -1, title: row.id}, row.id);
  open.addEventListener("click", () => { current = place; openRow(row); });
  open.addEventListener("focus", () => point(place));
  node.append(stage, el("div", {className: "text"},
    el("div", {className: "head"}, open, row.content === "flagged" ? el("span", {className: "mode flagged"}, "flagged") : null, row.mode ? el("span", {className: "mode"}, row.mode) : null),
    el("p", {className: "prompt"}, row.prompt || ""),
    el("p", {className: "facts"}, facts(row)),
    row.quality ? el("p", {className: "facts"}, measures(row)) : null));
  return node;
}

function reason(row) {
  return el("p", {className: "reason"}, el("strong", {}, `${row.status}${row.error_stage ? ` in ${row.error_stage}` : ""}`), row.error_message || "");
}

function facts(row) {
  return [
    row.model && shortModel(row.model),
    row.seed !== undefined && `seed ${row.seed}`,
    row.width && `${row.width} × ${row.height} px`,
    row.frames && `${counted(row.frames, "frame")}${row.fps ? ` at ${rate(row.fps)}/s` : ""}`,
    row.wall_s !== undefined && seconds(row.wall_s),
  ].filter(Boolean).join(" · ");
}

function rate(fps) {
  const [over, under] = String(fps).split("/").map(Number);
  return under ? number(over / under) : fps;
}

// What stands out: that no frame is black or frozen is no news.
function measures(row) {
  return Object.entries(row.quality).filter(([name, value]) => name !== "flow_coverage" && !(value === 0 && /_frames$/.test(name)))
    .map(([name, value]) => `${words(name)} ${typeof value === "number" ? short(value) : value}`).join(" · ");
}

// The lines of a row's picture beside each other. All start in the same frame of the screen, so they stay in step.
function panels(into, row, width, height) {
  const [w, h] = row.panel_px || [1, 1], labels = row.labels || [];
  const box = el("div", {className: "panels", role: "img", "aria-label": `${labels.join(", ")}: ${row.prompt || row.id}`});
  into.append(box);
  if (!row.picture) { box.replaceChildren("no thumbnails"); return; }
  const picture = new Image();
  picture.onload = () => {
    const frames = Math.max(1, Math.round(picture.naturalWidth / w)), lines = Math.max(1, Math.round(picture.naturalHeight / h));
    const names = lines === labels.length ? labels : Array.from({length: lines}, (_, line) => line === lines - 1 ? "result" : "");
    const scale = Math.min((width - 6 * (lines - 1)) / (lines * w), (height - CAPTION) / h, 3);
    box.replaceChildren(...names.map((name, line) => {
      const image = el("img", {alt: "", src: picture.src, draggable: false}), view = el("div", {className: "view"}, image);
      view.style.width = `${Math.floor(w * scale)}px`;
      view.style.height = `${Math.floor(h * scale)}px`;
      for (const [key, value] of Object.entries({line, lines, frames, period: `${row.period_s}s`})) image.style.setProperty(`--${key}`, value);
      if (frames === 1) image.style.animation = "none";
      return el("figure", {className: "panel"}, view, el("figcaption", {}, name));
    }));
  };
  picture.onerror = () => box.replaceChildren("its picture is not there");
  // Whoever flings through the list leaves most cards behind at once: those load nothing.
  setTimeout(() => { if (box.isConnected) picture.src = address(row.picture); }, SETTLED_MS);
}

const address = place => place.startsWith("data:") ? place : base + place;

// ---------------------------------------------------------------- the keyboard

function point(place) {
  if (place !== current) {
    const before = drawn.get(current);
    if (before) before.card.querySelector(".open").tabIndex = -1;
  }
  current = place;
  const now = drawn.get(place);
  if (now) now.card.querySelector(".open").tabIndex = 0;
}

function go(place) {
  if (!visible.length) return;
  place = Math.max(0, Math.min(visible.length - 1, place));
  const top = list.getBoundingClientRect().top + Math.floor(place / columns) * (cardHeight + GAP);
  const covered = document.querySelector("header").offsetHeight + 8;
  if (top < covered) scrollBy({top: top - covered, behavior: "instant"});
  else if (top + cardHeight > innerHeight - 8) scrollBy({top: Math.min(top - covered, top + cardHeight - innerHeight + 8), behavior: "instant"});
  draw();
  point(place);
  drawn.get(place)?.card.querySelector(".open").focus({preventScroll: true});
}

list.addEventListener("keydown", event => {
  const page = Math.max(1, Math.floor(innerHeight / (cardHeight + GAP))) * columns;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page, Home: -visible.length, End: visible.length}[event.key];
  if (step === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  go(event.target === list ? current : current + step);
});
list.addEventListener("focus", event => { if (event.target === list) go(current); });

// ---------------------------------------------------------------- one row, all that is known of it

function openRow(row) {
  opened = row;
  const place = visible.indexOf(row);
  const step = (by, name, text) => {
    const button = el("button", {type: "button", "aria-label": name, disabled: !visible[place + by]}, text);
    button.addEventListener("click", () => move(by));
    return button;
  };
  const close = el("button", {type: "button"}, "Close");
  close.addEventListener("click", () => dialog.close());
  const body = el("div", {className: "row-body"});
  dialog.replaceChildren(el("div", {className: "row-head"}, el("h2", {id: "row-title"}, row.id), step(-1, "Row before", "←"), step(1, "Next row", "→"), close), body);
  if (!dialog.open) dialog.showModal();
  body.scrollTop = 0;
  close.focus({preventScroll: true});

  body.append(el("p", {className: "big"}, row.prompt || ""));
  if (row.negative_prompt) body.append(section("Not", el("p", {}, row.negative_prompt)));
  if (row.status !== "ok") {
    const retry = row.retryable === undefined ? "" : row.retryable ? "\nThe same row may succeed another time." : "\nThe same row would fail again: mend it first.";
    body.append(el("p", {className: "problem"}, el("strong", {}, `${row.status}${row.error_stage ? ` in ${row.error_stage}` : ""}${row.error_class ? ` (${row.error_class})` : ""}: `), row.error_message || "", retry));
  }
  if (row.labels) {
    const stage = el("div", {className: "stage"});
    body.append(stage);
    panels(stage, row, stage.clientWidth - 28, Math.min(300, innerHeight * .4));
  }
  if (row.output_uri) body.append(whole(row));
  if (row.warnings) body.append(section("Warnings", el("ul", {className: "warnings"}, ...row.warnings.map(text => el("li", {}, text)))));
  body.append(again(row));
  const tables = el("div", {className: "tables"});
  if (row.quality) tables.append(table("Quality", Object.entries(row.quality)));
  const times = STAGES.filter(stage => row[`${stage}_s`] !== undefined).map(stage => [stage, row[`${stage}_s`]]);
  if (times.length) {
    const bar = el("div", {className: "time", "aria-hidden": "true"}, ...times.map(([name, value]) => {
      const part = el("i", {title: `${name} ${seconds(value)}`});
      part.style.flexGrow = value;
      return part;
    }));
    tables.append(el("section", {}, el("h3", {}, "Time per stage"), bar, rowsOf(times.map(([name, value]) => [name, seconds(value)]))));
  }
  const {cells, ...used} = row.parameters || {};
  tables.append(table("Parameters as used", Object.entries(used)));
  for (const [title, names] of Object.entries(TABLES)) tables.append(table(title, names.map(name => [name, row[name]])));
  tables.append(table("More", Object.entries(row).filter(([name]) => !ELSEWHERE.has(name) && name !== "sought" && name !== "time")));
  body.append(...[...tables.children].length ? [tables] : []);
  remember();
}

function move(by) {
  const place = visible.indexOf(opened) + by;
  if (visible[place]) { current = place; openRow(visible[place]); }
}

function section(title, ...children) {
  return el("section", {}, el("h3", {}, title), ...children);
}

function table(title, pairs) {
  const known = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "" && !(Array.isArray(value) && !value.length));
  return known.length ? section(title, rowsOf(known)) : "";
}

function rowsOf(pairs) {
  const text = value => typeof value === "number" ? (Number.isInteger(value) ? String(value) : number(value)) : Array.isArray(value) ? value.join(" + ") : typeof value === "object" ? JSON.stringify(value) : String(value);
  return el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, words(name)), el("dd", {}, text(value))]));
}

function whole(row) {
  const box = section("The whole video");
  if (row.video) {
    const player = row.video.kind === "video"
      ? el("video", {controls: true, loop: true, muted: true, playsInline: true, preload: "metadata", src: address(row.video.address), "aria-label": `The video of ${row.id}`})
      : el("img", {className: "whole", alt: `The video of ${row.id}`, src: address(row.video.address)});
    player.onerror = () => player.replaceWith(el("p", {}, "The video can't be played here."));
    if (row.width < 256 && row.video.kind === "video") player.style.width = "256px";
    box.append(player);
  }
  box.append(el("p", {className: "where"}, `${data.out.replace(/\/$/, "")}/${row.output_uri}`));
  return box;
}

// ---------------------------------------------------------------- rows to render again

const cell = text => /[",;\t\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;

function manifestOf(found) {
  const taken = new Set();  // rows of several manifests may share an id
  for (const cells of found) {
    const id = cells.id;
    for (let copy = 2; taken.has(cells.id); copy++) cells.id = `${id}-${copy}`;
    taken.add(cells.id);
  }
  const used = manifestColumns.filter(name => found.some(cells => name in cells));
  return [used, ...found.map(cells => used.map(name => cells[name] ?? ""))].map(line => line.map(cell).join(",")).join("\n") + "\n";
}

function cellsOf(row) {
  const cells = {...row.parameters.cells, id: row.id};
  if (row.status === "ok" && row.seed !== undefined) cells.seed = String(row.seed);
  return cells;
}

function again(row) {
  if (!row.parameters?.cells) {
    return section("To render it again", el("p", {className: "where"}, row.parameters
      ? "This row was made by an earlier version, which did not keep its cells." : `Mend row ${row.row_number ?? ""} of ${row.manifest ?? "the manifest"}.`));
  }
  const text = el("textarea", {readOnly: true, rows: 3, spellcheck: false, "aria-label": "Manifest with this row", value: manifestOf([cellsOf(row)])});
  const said = el("span", {role: "status"});
  const copy = el("button", {type: "button"}, "Copy"), save = el("button", {type: "button"}, "Save"), other = el("button", {type: "button"}, "With another seed");
  copy.addEventListener("click", async () => {
    text.select();
    try { await navigator.clipboard.writeText(text.value); said.textContent = "copied"; }
    catch { said.textContent = document.execCommand("copy") ? "copied" : "press Ctrl-C to copy"; }
  });
  save.addEventListener("click", () => download(text.value, `${row.id.replace(/[^A-Za-z0-9._-]+/g, "_")}.csv`));
  other.addEventListener("click", () => {
    const seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    text.value = manifestOf([{...cellsOf(row), id: `${row.id}-seed-${seed}`.slice(-200), seed}]);
    said.textContent = `seed ${seed}`;
  });
  return section(`To render it again: this manifest${row.status === "ok" ? ", into another folder" : ""}`, text, el("div", {className: "buttons"}, copy, save, other, said));
}

function download(text, name) {
  const link = el("a", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

find("again").addEventListener("click", () => download(manifestOf(visible.filter(row => row.parameters?.cells).map(cellsOf)), "again.csv"));

dialog.addEventListener("keydown", event => {
  if (event.target.matches("textarea, video, input") || event.ctrlKey || event.altKey || event.metaKey) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) { event.preventDefault(); move(by); }
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  if (dialog.open) return;  // told late: another row was opened meanwhile
  const place = visible.indexOf(opened);  // not where the browser puts the focus: that row was opened first
  opened = null;
  dialog.replaceChildren();  // stops the video
  remember();
  if (place >= 0) go(place);  // rows that came meanwhile wait: they would move it away under the keyboard
});

// ---------------------------------------------------------------- the page's address keeps what is asked for

function remember() {
  const asked = new URLSearchParams();
  for (const name of ["words", "status", "mode", "model", "content", "run", "manifest", "measure", "from", "to"]) if (field(name).value) asked.set(name, field(name).value);
  if (field("order").value && field("order").value !== "newest") asked.set("order", field("order").value);
  if (opened) asked.set("row", opened.key);
  const hash = asked.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function recall() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of ["words", "from", "to"]) field(name).value = asked.get(name) || "";
  for (const name of ["status", "mode", "model", "content", "run", "manifest", "measure", "order"]) {
    field(name).value = "";
    field(name).dataset.wanted = asked.get(name) || "";
  }
  return asked.get("row");
}

form.addEventListener("input", () => { current = 0; show(); remember(); });
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => { choices(); current = 0; show(); remember(); }));
addEventListener("hashchange", () => { if (location.hash !== "#rows") { recall(); choices(); show(); } });

find("play").addEventListener("click", () => pause(!paused));
function pause(is) {
  paused = is;
  document.body.classList.toggle("paused", paused);
  find("play").textContent = paused ? "Play" : "Pause";
  find("play").setAttribute("aria-pressed", String(!paused));
}
find("more").addEventListener("click", () => {
  const is = find("choices").classList.toggle("open-choices");
  find("more").setAttribute("aria-expanded", String(is));
});
find("fresh").addEventListener("click", () => { scrollTo({top: 0}); show(); });

let asked = false;
addEventListener("scroll", () => {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; draw(); });
}, {passive: true});
new ResizeObserver(() => { if (list.clientWidth !== listWidth) layout(); }).observe(list);

// ---------------------------------------------------------------- while a run goes on

async function follow() {
  try {
    const told = await (await fetch(`data.json?epoch=${data.epoch || ""}&number=${data.number || 0}`)).json();
    if (told.error) throw new Error(told.error);
    const isFirst = !data.epoch, news = told.rows.length || told.epoch !== data.epoch;
    take(told);
    status(told.under_way);
    if (isFirst) begin();
    else if (news) {
      choices();
      // Nobody who reads further down, or in a row, has it moved away from under the eyes.
      if (!dialog.open && scrollY < 40 && !list.contains(document.activeElement)) show();
      else { waiting += told.rows.length; tell(); showPlots(); }
    }
  } catch (error) {
    find("live").hidden = false;
    find("live").className = "lost";
    find("live").textContent = error instanceof TypeError ? "The gallery's server does not answer; trying again …" : `${error.message}; trying again …`;
  }
  setTimeout(follow, ASK_EVERY_MS);
}

function status(underWay) {
  const some = underWay.slice(0, 3).join(", ") + (underWay.length > 3 ? ", …" : "");
  find("live").hidden = false;
  find("live").className = "";
  find("live").textContent = underWay.length ? `${counted(underWay.length, "row")} under way: ${some}` : "live: no run at work";
}

function begin() {
  const wanted = recall();
  choices();
  show();
  if (wanted && rows.has(wanted)) { current = Math.max(0, visible.indexOf(rows.get(wanted))); openRow(rows.get(wanted)); }
}

pause(matchMedia("(prefers-reduced-motion: reduce)").matches);
if (data.live) { show(); follow(); } else { take(data); begin(); }
})();
