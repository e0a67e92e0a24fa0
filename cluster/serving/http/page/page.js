// The page asks the endpoint as any client does: /v1/models, /v1/chat/completions, /v1/runs.

const root = location.pathname.replace(/[^/]*$/, "");
const byId = (id) => document.getElementById(id);
const longestSide = 2048; // pixels; larger images are scaled down here
let model = null;
let picture = null; // a canvas with the image
let asked = 0;
let key = sessionStorage.getItem("key") ?? "";

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(root + path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) byId("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the endpoint answered ${response.status}`);
}

async function showModel() {
  const { data } = await (await request("v1/models")).json();
  model = data[0].id;
  byId("model").textContent = model;
}

// The image.

async function take(file) {
  if (!file?.type.startsWith("image/")) return say("That is no image.", true);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`This browser cannot read ${file.name}.`, true);
  }
  const scale = Math.min(1, longestSide / Math.max(bitmap.width, bitmap.height));
  picture = document.createElement("canvas");
  picture.width = Math.max(1, Math.round(bitmap.width * scale));
  picture.height = Math.max(1, Math.round(bitmap.height * scale));
  picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
  for (const side of ["dense", "pruned"]) show(side, { image: true });
  byId("saving").textContent = "";
  byId("go").disabled = false;
  say(`${file.name || "Image"}, ${picture.width} × ${picture.height} pixels.`);
}

// A copy of its own for each request: what an earlier one left in a cache is of another image.
function ownCopy() {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [picture.width, picture.height];
  const context = copy.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixel = context.getImageData(0, 0, 1, 1);
  const mark = crypto.getRandomValues(new Uint8Array(3));
  for (const i of [0, 1, 2]) pixel.data[i] = mark[i];
  pixel.data[3] = 255;
  context.putImageData(pixel, 0, 0);
  return copy.toDataURL("image/png");
}

// Answers.

function show(side, { image = false, text = "", facts = [] }) {
  const card = byId(side);
  const canvas = card.querySelector("canvas");
  if (image) {
    canvas.hidden = false;
    [canvas.width, canvas.height] = [picture.width, picture.height];
    canvas.getContext("2d").drawImage(picture, 0, 0);
  }
  card.querySelector(".text").textContent = text;
  card.querySelector("dl").replaceChildren(
    ...facts.flatMap(([name, value]) => {
      const [term, entry] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, entry.textContent] = [name, value];
      return [term, entry];
    }),
  );
}

// Rows and columns of the tokens of an image without tiles; towers may merge four patches to one.
function grid(image) {
  for (const by of [1, 2, 4]) {
    const [rows, columns] = [Math.floor(image.rows / by), Math.floor(image.columns / by)];
    if (image.tiles === 1 && rows * columns === image.tokens) return { rows, columns };
  }
  return null;
}

function darken(pruning) {
  const found = pruning?.images.length === 1 ? grid(pruning.images[0]) : null;
  if (!found) return false;
  const bits = Uint8Array.from(atob(pruning.kept), (c) => c.charCodeAt(0));
  const canvas = byId("pruned").querySelector("canvas");
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(0 0 0 / 72%)";
  const x = (column) => Math.round((column * canvas.width) / found.columns);
  const y = (row) => Math.round((row * canvas.height) / found.rows);
  for (let token = 0; token < found.rows * found.columns; token++) {
    if ((bits[token >> 3] >> (token & 7)) & 1) continue;
    const [row, column] = [Math.floor(token / found.columns), token % found.columns];
    context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
  }
  return true;
}

async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

async function answer(side, prune) {
  const content = [
    { type: "image_url", image_url: { url: ownCopy() } },
    { type: "text", text: byId("prompt").value },
  ];
  const body = {
    model, prune: { ...prune, report: true }, stream: true,
    stream_options: { include_usage: true }, messages: [{ role: "user", content }],
  };
  const started = performance.now();
  let [text, first, last] = ["", null, null];
  const options = {
    method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  };
  for await (const event of events(await request("v1/chat/completions", options))) {
    if (event.error) throw new Error(event.error.message);
    const said = event.choices[0]?.delta.content;
    if (said) {
      first ??= performance.now();
      text += said;
      byId(side).querySelector(".text").textContent = text;
    }
    if (event.usage) last = event;
  }
  const seconds = (performance.now() - started) / 1000;
  const { visual_tokens: all, visual_tokens_kept: kept, completion_tokens } = last.usage;
  show(side, {
    text,
    facts: [
      ["Visual tokens", `${kept} of ${all}`],
      ["Tokens of the answer", `${completion_tokens}`],
      ["First token", first === null ? "–" : `${((first - started) / 1000).toFixed(2)} s`],
      ["Whole answer", `${seconds.toFixed(2)} s`],
    ],
  });
  return { seconds, text, pruning: last.pruning };
}

async function askBothWays(event) {
  event.preventDefault();
  if (!picture) return;
  key = byId("key").value || key;
  sessionStorage.setItem("key", key);
  byId("go").disabled = true;
  byId("saving").textContent = "";
  try {
    if (!model) await showModel();
    const retain = Number(byId("budget").value) / 100;
    const sides = [
      ["dense", { method: "none" }],
      ["pruned", { method: byId("method").value, retain }],
    ];
    if (asked++ % 2) sides.reverse();
    for (const side of ["dense", "pruned"]) show(side, { image: true });
    const found = {};
    for (const [side, prune] of sides) {
      say(`Asking: ${side} …`);
      found[side] = await answer(side, prune);
    }
    const shown = darken(found.pruned.pruning);
    const ratio = found.dense.seconds / found.pruned.seconds;
    const same = found.dense.text === found.pruned.text ? "the same text" : "another text";
    byId("saving").textContent =
      `Pruned: ${same}, in ${(100 / ratio).toFixed(0)} % of the dense answer's time.`;
    say(shown ? "Done. Dropped tokens are darkened." : "Done. The tokens of this model form no grid.");
  } catch (error) {
    say(error.message, true);
  } finally {
    byId("go").disabled = false;
  }
}

// Runs.

function left(seconds) {
  if (seconds === null) return "–";
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return `${hours}:${String(minutes).padStart(2, "0")}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

function runRow(run) {
  const row = document.createElement("tr");
  const failed = Object.values(run.rows_failed).reduce((sum, rows) => sum + rows, 0);
  const bar = document.createElement("progress");
  bar.max = Math.max(1, run.rows_total);
  bar.value = run.rows_done;
  bar.setAttribute("aria-label", `run ${run.run_id}`);
  const kept = run.visual_tokens ? `${((100 * run.visual_tokens_kept) / run.visual_tokens).toFixed(1)} %` : "–";
  const cells = [
    run.run_id, run.state, bar, `${run.rows_done} of ${run.rows_total}`, failed,
    run.rows_per_second.toFixed(1), left(run.state === "running" ? run.eta_seconds : null), kept,
  ];
  for (const cell of cells) {
    const entry = document.createElement("td");
    entry.append(cell);
    row.append(entry);
  }
  return row;
}

async function showRuns() {
  try {
    const { data } = await (await request("v1/runs")).json();
    byId("runs-status").textContent = data.length ? "" : "No job has run here yet.";
    byId("runs-rows").replaceChildren(...data.reverse().map(runRow));
  } catch (error) {
    byId("runs-status").textContent = error.message;
  }
}

// Events.

byId("form").addEventListener("submit", askBothWays);
byId("file").addEventListener("change", (event) => take(event.target.files[0]));
byId("budget").addEventListener("input", (event) => {
  byId("budget-shown").textContent = `${Number(event.target.value).toFixed(1)} %`;
});
const drop = byId("drop");
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", over);
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file) take(file);
});
showModel().catch((error) => say(error.message, true));
showRuns();
setInterval(() => document.hidden || showRuns(), 2000);
