// The live page: frames come from live/events, figures go into the document, steps onto a canvas.

const MEMORY = 20000; // milliseconds that recent figures are of, and that lanes show at most
const BEHIND = 250; // what is shown is so long ago: frames come ten times a second
const AHEAD = 2000; // of the tape, beyond what is shown
const SILENCE = 5000; // without frames the connection is lost
const LINE_POINTS = 60; // of the small lines, one a second

const SAID = {
  connecting: "Connecting",
  serving: "Live",
  stalled: "No step ends: the engine may hang",
  restarting: "The model's process died: another one is started",
  draining: "Draining: no new requests",
  closed: "The engine is closed",
  dead: "The engine has died",
  gone: "The engine has ended",
  lost: "No connection, trying again",
};

const $ = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (part, all) => (all ? `${number((100 * part) / all)} %` : "–");
const say = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text;
};
const element = (name, className = "", text = "") => {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
};

// ------------------------------------------------------------------------------ connection

let state = "connecting";
let key = sessionStorage.getItem("mtpbatch-key");
let stream = new AbortController();

function show(now) {
  state = now;
  $("state").dataset.state = now;
  say("state-text", SAID[now]);
}

async function stayConnected() {
  for (let failures = 0; ; ) {
    if (document.hidden) await once(document, "visibilitychange");
    let heard = false;
    for await (const frame of frames()) {
      heard = true;
      take(frame);
    }
    failures = heard ? 0 : failures + 1;
    // Servers end streams now and then, in good health too: then the next one is opened at once.
    if (heard && state === "serving") continue;
    await new Promise((go) => setTimeout(go, Math.min(5000, 500 * 2 ** failures)));
  }
}

// Those of one stream, until it ends for whatever reason.
async function* frames() {
  stream = new AbortController();
  let watchdog;
  const listen = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => stream.abort(), SILENCE);
  };
  // EventSource cannot send a key.
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  listen();
  try {
    const answer = await connected(fetch("live/events", { headers, cache: "no-store", signal: stream.signal }));
    if (!answer) return;
    if (answer.status === 401 || answer.status === 403) {
      clearTimeout(watchdog);
      await askForKey();
      return;
    }
    if (!answer.ok) {
      show(answer.status === 503 ? "gone" : "lost");
      return;
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const part = await connected(reader.read());
      if (!part || part.done) return;
      listen();
      const events = (text + part.value).split("\n\n");
      text = events.pop();
      for (const event of events) yield JSON.parse(event.slice("data: ".length));
    }
  } finally {
    clearTimeout(watchdog);
  }
}

// What a promise of the network's gives, if the connection holds.
async function connected(promise) {
  try {
    return await promise;
  } catch {
    if (!document.hidden) show("lost");
    return null;
  }
}

async function askForKey() {
  $("key").hidden = false;
  $("key-wrong").hidden = key === null;
  $("key-input").focus();
  await once($("key"), "submit");
  key = $("key-input").value;
  sessionStorage.setItem("mtpbatch-key", key);
  $("key").hidden = true;
}

const once = (target, event) =>
  new Promise((go) => target.addEventListener(event, go, { once: true }));

$("key").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream.abort(); // who does not look costs nothing
});

// ---------------------------------------------------------------------------------- frames

let setup = null;
let lanes = []; // by sequence id: who has it (run), and what steps did (blocks), oldest first
let history = []; // [milliseconds, stats] of the last 20 seconds and some more
let clock = null; // the server's, less performance.now()
let newest = 0; // of the server's clock

function take(frame) {
  show(frame.state);
  if (frame.setup) begin(frame);
  newest = frame.now;
  const ahead = frame.now - performance.now();
  // Frames come late by chance, never early: follow the earliest, and slowly the rest.
  clock = clock === null || ahead > clock || clock - ahead > 1000 ? ahead : clock + (ahead - clock) / 20;
  for (const [seq, run] of Object.entries(frame.lanes ?? {})) lanes[seq].run = run;
  for (const slot of frame.slots ?? []) takeSlot(slot);
  for (const [request, reason] of Object.entries(frame.ends ?? {})) takeEnd(request, reason);
  if (frame.stats) takeStats(frame.now, frame.stats);
}

function begin(frame) {
  // After an interruption what was there goes on, if the server does.
  const goesOn = setup?.feed === frame.setup.feed;
  setup = frame.setup;
  if (goesOn) return;
  clock = null;
  history = [];
  lanes = Array.from(Object.keys(frame.lanes), () => ({ run: null, blocks: [] }));
  tape.fit();
}

function takeSlot([begin, end, parts]) {
  for (const [seq, request, steps, prompt, drafted, accepted, generated, tokens] of parts) {
    const { blocks } = lanes[seq];
    const before = blocks.at(-1);
    const block = { seq, request, begin, end, steps, prompt, drafted, accepted, generated, tokens };
    block.first = before?.request !== request;
    block.since = block.first ? begin : before.end; // it had the lane, and waited for its step
    blocks.push(block);
    tape.add(block);
  }
}

function takeEnd(request, reason) {
  for (const { blocks } of lanes) {
    const last = blocks.findLast((block) => block.request === request);
    if (last) {
      last.reason = reason;
      tape.mark(last);
    }
  }
}

function takeStats(now, stats) {
  history.push([now, stats]);
  // One more than 20 seconds old is kept, to compare with.
  while (history.length > 1 && history[1][0] < now - MEMORY) history.shift();
}

// --------------------------------------------------------------------------------- figures

// Stats of so many milliseconds ago, or the oldest there are.
const statsBefore = (milliseconds) =>
  history.findLast(([at]) => at <= newest - milliseconds) ?? history[0];

function rate(field) {
  const [then, before] = statsBefore(2000);
  const seconds = (newest - then) / 1000;
  return seconds > 0 ? (history.at(-1)[1][field] - before[field]) / seconds : 0;
}

const gain = (stats, before) => {
  const generated = stats.generated_tokens - (before?.generated_tokens ?? 0);
  const steps = generated - (stats.accepted - (before?.accepted ?? 0));
  return steps > 0 ? generated / steps : null;
};

function showFigures() {
  if (!history.length) return;
  const stats = history.at(-1)[1];
  const before = history[0][1];
  const recent = gain(stats, before);
  const overall = gain(stats);
  say("rate", number(rate("generated_tokens")));
  say("rate-more", `+ ${number(rate("prompt_tokens"))} prompt`);
  say("running", number(stats.running));
  say("running-more", `of ${number(stats.n_seq)} sequences`);
  say("waiting", number(stats.waiting));
  say("waiting-more", `${number(stats.preemptions)} pauses`);
  say("gain", recent === null ? "–" : number(recent, 2));
  say("gain-more", overall === null ? "" : `${number(overall, 2)} overall`);
  say("cells", number(stats.kv_cells_used));
  say("cells-more", `of ${number(stats.n_cells)}`);
  $("cells-meter").value = stats.kv_cells_used / stats.n_cells;
  say("snapshots", number(stats.snapshot_bytes / 2 ** 20, 1));
  say("snapshots-more", `of ${number(setup.snapshot_limit / 2 ** 20)} MiB`);
  $("snapshots-meter").value = setup.snapshot_limit ? stats.snapshot_bytes / setup.snapshot_limit : 0;
  showAcceptance(stats, before);
  showEnded(stats);
}

function showAcceptance(stats, before) {
  const depths = stats.drafted_by_depth.length;
  $("acceptance-none").hidden = depths > 0;
  $("acceptance").querySelector("table").hidden = $("acceptance-key").hidden = depths === 0;
  rows("acceptance", depths, (depth, [name, bar, recent, overall]) => {
    const drafted = stats.drafted_by_depth[depth];
    const accepted = stats.accepted_by_depth[depth];
    const draftedNow = drafted - before.drafted_by_depth[depth];
    const acceptedNow = accepted - before.accepted_by_depth[depth];
    name.textContent = depth + 1;
    fill(bar, draftedNow ? acceptedNow / draftedNow : 0, drafted ? accepted / drafted : null);
    recent.textContent = percent(acceptedNow, draftedNow);
    overall.textContent = percent(accepted, drafted);
    overall.title = `${number(accepted)} of ${number(drafted)}`;
  });
}

function showEnded(stats) {
  const ended = Object.entries(stats.finished);
  const most = Math.max(1, ...ended.map(([, count]) => count));
  rows("ended", ended.length, (index, [name, bar, count]) => {
    name.textContent = ended[index][0];
    fill(bar, ended[index][1] / most, null);
    count.textContent = number(ended[index][1]);
  });
  say(
    "totals",
    `${number(stats.generated_tokens)} tokens generated in ${number(stats.steps)} steps. ` +
      `${number(stats.prompt_tokens)} tokens of prompts computed, ${number(stats.prefix_hits)} reused.`,
  );
}

// A table's rows, as many as there are to be; write() is given each one's cells.
function rows(id, count, write) {
  const body = $(id).querySelector("tbody");
  const columns = $(id).querySelectorAll("thead th").length;
  while (body.rows.length > count) body.deleteRow(-1);
  while (body.rows.length < count) {
    const row = body.insertRow();
    for (let column = 0; column < columns; column++) row.insertCell();
  }
  for (let index = 0; index < count; index++) write(index, body.rows[index].cells);
}

// A cell with a bar, and a mark on it.
function fill(cell, share, mark) {
  if (!cell.firstChild) {
    cell.className = "bar";
    cell.setAttribute("aria-hidden", "true");
    cell.append(element("div"));
    cell.firstChild.append(element("i"), element("s"));
  }
  const [bar, line] = cell.firstChild.children;
  bar.style.width = `${100 * share}%`;
  line.hidden = mark === null;
  line.style.left = `${100 * (mark ?? 0)}%`;
}

const lines = { "rate-line": [], "running-line": [], "waiting-line": [], "gain-line": [] };

// Once a second: the small lines, and what is for those who read the lanes instead of seeing them.
function showLines() {
  if (!history.length || state === "lost") return;
  const stats = history.at(-1)[1];
  const before = statsBefore(2000)[1];
  const values = {
    "rate-line": rate("generated_tokens"),
    "running-line": stats.running,
    "waiting-line": stats.waiting,
    "gain-line": gain(stats, before) ?? 0,
  };
  for (const [id, value] of Object.entries(values)) {
    const points = lines[id];
    points.push(value);
    if (points.length > LINE_POINTS) points.shift();
    const top = Math.max(...points, 1);
    const left = LINE_POINTS - points.length;
    const placed = points.map((point, index) => `${left + index},${19 - (18 * point) / top}`);
    $(id).firstElementChild.setAttribute("points", placed.join(" "));
  }
  const now = `${number(stats.running)} of ${number(stats.n_seq)} sequences run, ${number(stats.waiting)} requests wait.`;
  canvas.setAttribute("aria-label", now);
  if ($("lane-table").open) showLaneTable();
}

function showLaneTable() {
  rows("lane-table", lanes.length, (seq, cells) => {
    const { run, blocks } = lanes[seq];
    const last = run && blocks.findLast((block) => block.request === run.request_id);
    const doing = run ? (last?.generated ? "generates" : "prompt") : "idle";
    const texts = run
      ? [run.request_id, doing, number(run.prompt_tokens), number(run.cached_tokens), number(last?.tokens ?? 0)]
      : ["–", doing, "", "", ""];
    [seq, ...texts].forEach((text, column) => {
      cells[column].textContent = text;
    });
  });
}

// ---------------------------------------------------------------------------------- canvas

const canvas = document.querySelector("#lanes canvas");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let frozen = null; // the moment that is shown while it is paused

const shown = () => frozen ?? (clock === null ? newest : performance.now() + clock - BEHIND);

// Steps are painted once, onto a tape that has its beginning behind its end; what is shown is a part
// of it. So a frame on the screen costs the same, however many steps it shows.
const tape = {
  canvas: document.createElement("canvas"),
  cleared: 0, // up to this moment
  painted: [], // each lane up to this pixel of the endless time line

  fit() {
    const ratio = devicePixelRatio;
    this.window = innerWidth < 600 ? MEMORY / 2 : MEMORY; // from the left edge to the right one
    say("window", `the last ${this.window / 1000} seconds`);
    const count = lanes.length;
    const width = canvas.parentElement.clientWidth;
    this.lane = count <= 4 ? 44 : count <= 8 ? 32 : count <= 16 ? 22 : count <= 32 ? 14 : count <= 64 ? 10 : 6;
    this.gap = this.lane > 12 ? 4 : 1;
    this.gutter = 28;
    const height = count * (this.lane + this.gap) + 18;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    this.ratio = ratio;
    this.plot = canvas.width - Math.round(this.gutter * ratio);
    this.scale = this.plot / this.window; // pixels of a millisecond
    this.canvas.width = Math.round(this.scale * (this.window + AHEAD));
    this.canvas.height = canvas.height;
    this.brush = this.canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    this.colours = Object.fromEntries(
      ["prompt", "sampled", "accepted", "rejected", "band", "text", "quiet", "line", "surface"].map((name) => [
        name,
        style.getPropertyValue(`--${name}`).trim(),
      ]),
    );
    this.repaint();
  },

  repaint() {
    this.brush.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.painted = [];
    this.cleared = shown() + AHEAD / 2;
    const [from, to] = [shown() - this.window, this.cleared];
    for (const { blocks } of lanes) {
      for (const block of blocks) {
        if (block.end > from && block.begin < to) this.paint(block);
      }
    }
    draw();
  },

  add(block) {
    if (frozen !== null) return; // repaint() will paint it
    this.clear(Math.max(block.end, newest) + AHEAD / 4); // what is too short to be seen is widened
    if (block.end > this.cleared - this.window) this.paint(block);
  },

  // Make room on the tape up to a moment.
  clear(until) {
    const from = Math.round(this.cleared * this.scale);
    const width = Math.round(until * this.scale) - from;
    if (width <= 0) return;
    this.cleared = until;
    this.wrapped(from, Math.min(width, this.canvas.width), (x, w) =>
      this.brush.clearRect(x, 0, w, this.canvas.height),
    );
  },

  // Call for a range of the endless time line its one or two parts on the tape.
  wrapped(from, width, call) {
    const length = this.canvas.width;
    const x = ((from % length) + length) % length;
    const w = Math.min(width, length - x);
    call(x, w, 0);
    if (w < width) call(0, width - w, w);
  },

  paint(block) {
    const { seq, first, prompt, steps, drafted, accepted, generated } = block;
    const line = Math.max(1, Math.round(1.5 * this.ratio));
    const [since, begun, end] = [block.since, block.begin, block.end].map((at) => Math.round(at * this.scale));
    const begin = first || begun - since > 1 ? begun : since; // no gap where rounding alone makes one
    // What is too short for a pixel leaves it to what is there, but for begins and prompts.
    const free = this.painted[seq] ?? since;
    if (end <= free && !first && !prompt) return;
    let x = Math.max(begin, free);
    this.fill(seq, "band", Math.max(since, free), x, 0, 1);
    if (first) {
      this.fill(seq, "text", x, x + line, 0, 1);
      x += line;
    }
    const right = Math.max(end, x + (prompt ? line : 1));
    this.painted[seq] = right;
    if (prompt) {
      this.fill(seq, "prompt", x, right, 0, 1);
    } else {
      // Heights are tokens a step: the lane's is the most that one can give.
      const unit = 1 / (steps * (1 + setup.n_draft_max));
      this.fill(seq, "band", x, right, 0, 1);
      this.fill(seq, "sampled", x, right, 0, (generated - accepted) * unit);
      this.fill(seq, "accepted", x, right, (generated - accepted) * unit, generated * unit);
      this.fill(seq, "rejected", x, right, generated * unit, (generated + drafted - accepted) * unit);
    }
    if (block.reason) this.mark(block);
  },

  // A part of a lane: pixels of the endless time line, and shares of the lane's height.
  fill(seq, colour, left, right, from, to) {
    if (right <= left || to <= from) return;
    const height = this.lane * this.ratio;
    const bottom = Math.round(seq * (this.lane + this.gap) * this.ratio + height);
    const top = Math.round(bottom - to * height);
    this.brush.fillStyle = this.colours[colour];
    this.wrapped(left, right - left, (x, w) =>
      this.brush.fillRect(x, top, w, Math.max(1, Math.round(bottom - from * height) - top)),
    );
  },

  // Where a request was cut short.
  mark({ seq, end, reason }) {
    if (frozen !== null || reason === "stop" || reason === "length" || reason === "paused") return;
    const size = Math.round(Math.min(this.lane, 16) * this.ratio);
    const y = (seq * (this.lane + this.gap) + this.lane / 2) * this.ratio;
    this.brush.font = `800 ${size}px system-ui, sans-serif`;
    this.brush.textBaseline = "middle";
    this.brush.lineWidth = size / 4;
    this.brush.strokeStyle = this.colours.surface;
    this.brush.fillStyle = this.colours.text;
    this.wrapped(Math.round(end * this.scale) - size, 1, (x) => {
      this.brush.strokeText("×", x, y);
      this.brush.fillText("×", x, y);
    });
  },
};

function draw() {
  const { ratio, plot, scale, colours } = tape;
  if (!colours) return;
  const brush = canvas.getContext("2d");
  const left = canvas.width - plot;
  const from = Math.round((shown() - tape.window) * scale);
  brush.clearRect(0, 0, canvas.width, canvas.height);
  if (frozen === null) tape.clear(shown() + BEHIND);
  tape.wrapped(from, plot, (x, w, done) =>
    brush.drawImage(tape.canvas, x, 0, w, canvas.height, left + done, 0, w, canvas.height),
  );
  brush.fillStyle = colours.quiet;
  brush.font = `${11 * ratio}px system-ui, sans-serif`;
  brush.textBaseline = "middle";
  brush.textAlign = "right";
  const pitch = tape.lane + tape.gap;
  const every = pitch > 12 ? 1 : pitch > 10 ? 2 : 4;
  for (let seq = 0; seq < lanes.length; seq++) {
    const y = seq * pitch * ratio;
    if (seq % every === 0) brush.fillText(seq, left - 8 * ratio, y + (tape.lane * ratio) / 2);
    brush.globalAlpha = 0.6;
    brush.fillStyle = colours.line;
    brush.fillRect(left, Math.round(y + tape.lane * ratio), plot, Math.max(1, Math.round(ratio / 2)));
    brush.globalAlpha = 1;
    brush.fillStyle = colours.quiet;
  }
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    brush.textAlign = share === 1 ? "left" : share === 0 ? "right" : "center";
    const ago = `−${(share * tape.window) / 1000} s`;
    const text = share > 0 ? ago : frozen === null ? "now" : "paused";
    brush.fillText(text, canvas.width - plot * share, canvas.height - 7 * ratio);
  }
}

function forget() {
  const horizon = newest - MEMORY - AHEAD;
  for (const { blocks } of lanes) {
    const kept = blocks.findIndex(
      (block) => block.end > horizon || (frozen !== null && block.end > frozen - MEMORY && block.begin < frozen),
    );
    blocks.splice(0, kept < 0 ? Math.max(0, blocks.length - 1) : kept);
  }
}

// What is under the pointer, in words.
function point(event) {
  const place = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - place.left, event.clientY - place.top];
  const seq = Math.floor(y / (tape.lane + tape.gap));
  const at = shown() - tape.window + ((x - tape.gutter) * tape.ratio) / tape.scale;
  const block = lanes[seq]?.blocks.findLast((one) => one.since <= at);
  const tip = $("tip");
  tip.hidden = !block || x < tape.gutter || at > block.end + 100;
  if (tip.hidden) return;
  const did = block.prompt
    ? `${number(block.prompt)} tokens of its prompt`
    : `${number(block.generated)} tokens, ${number(block.accepted)} of ${number(block.drafted)} drafts accepted`;
  const steps = block.steps === 1 ? "1 step" : `${block.steps} steps`;
  tip.textContent = `Sequence ${seq}, ${block.request}: ${steps}, ${did}${block.reason ? `; ended: ${block.reason}` : ""}`;
  tip.style.top = `${(seq + 1) * (tape.lane + tape.gap) + 4}px`;
  tip.style.left = `${Math.max(0, Math.min(x - 20, place.width - 260))}px`;
}

canvas.addEventListener("pointermove", point);
canvas.addEventListener("pointerdown", point);
canvas.addEventListener("pointerleave", () => ($("tip").hidden = true));

$("pause").addEventListener("click", () => {
  frozen = frozen === null ? shown() : null;
  $("pause").textContent = frozen === null ? "Pause" : "Go on";
  if (lanes.length) tape.repaint();
});

new ResizeObserver(() => lanes.length && tape.fit()).observe($("lanes"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lanes.length && tape.fit());

function animate() {
  if (!calm.matches && lanes.length) draw();
  requestAnimationFrame(animate);
}

setInterval(showFigures, 250);
setInterval(() => {
  showLines();
  forget();
  if (calm.matches && lanes.length) draw();
}, 1000);
animate();
stayConnected();
