// The page: what is shown, the conversation, the experts. All state is here; the server keeps files alone.
import { CloudView, HUES, readPoints } from "./cloud.js";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const percent = (share) => `${Math.round(100 * share)} %`;
const IDEAS = {
  image: ["List every object with its box.", "Describe the image.", "What is the category of the pictured object?"],
  cloud: ["Describe the object.", "What is the category of the object?", "What is next to it?"],
};

const state = { models: [], shown: null, added: true, turns: [], samples: [], reference: "", answering: false };
let view = null; // of a cloud, made when the first one is shown

async function fetched(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `The server answered ${answer.status}.`);
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// What is shown

async function send(file) {
  const most = state.models[0]?.octavius.limits.upload_bytes;
  if (most && file.size > most) return problem(`${file.name}: a file may have ${most >> 20} MB, this one has ${Math.ceil(file.size / 2 ** 20)}.`);
  const form = new FormData();
  form.append("unit", $("unit").value);
  form.append("file", file);
  await show(() => fetched("v1/files", { method: "POST", body: form }));
}

async function show(request, reference = "") {
  problem("");
  $("busy").hidden = false;
  try {
    const { octavius: info } = await (await request()).json();
    const content = await (await fetched(`v1/files/${info.id}/content`)).arrayBuffer();
    Object.assign(state, { shown: info, added: false, reference });
    if (info.kind === "image") showImage(info, content);
    else showCloud(info, content);
    $("stage").dataset.kind = info.kind;
    $("empty").hidden = true;
    $("picture").hidden = info.kind !== "image";
    $("scene").hidden = info.kind !== "cloud";
    $("objects").hidden = info.kind !== "cloud";
    $("another").hidden = false;
    if (info.kind === "cloud") view.show(readPoints(content), info.objects);
    ideas(info.kind);
  } catch (error) {
    problem(error.message);
  } finally {
    $("busy").hidden = true;
    $("file").value = "";
  }
}

function showImage(info, content) {
  URL.revokeObjectURL($("image").src);
  $("image").src = URL.createObjectURL(new Blob([content], { type: "image/jpeg" }));
  $("image").alt = `The image ${info.name}`;
  const ratio = info.width / info.height;
  $("image").style.width = info.width < 420 ? `${Math.round(Math.min(420, 420 * ratio))}px` : ""; // a small one is enlarged
  $("shown").textContent = `${info.name}, ${info.width} × ${info.height} pixels`;
  drawBoxes([]);
}

function showCloud(info) {
  view ??= new CloudView($("cloud"));
  $("shown").textContent = `${info.name}, ${info.points.toLocaleString()} points, ${info.objects.length} object${info.objects.length === 1 ? "" : "s"}`;
  const order = info.objects.map((object, index) => [object.attention, index]).sort((a, b) => b[0] - a[0]);
  $("objectlist").replaceChildren(...order.map(([share, index]) => {
    const row = bar(`Object ${index + 1}`, share, HUES[index % HUES.length], "li");
    row.classList.add("wide");
    row.addEventListener("pointerenter", () => view.pick(index));
    row.addEventListener("pointerleave", () => view.pick(-1));
    return row;
  }));
}

function drawBoxes(boxes) {
  const cut = (value) => Math.min(1, Math.max(0, value));
  $("boxes").replaceChildren(...boxes.map(({ label, box }, index) => {
    const [x1, y1, x2, y2] = box.map(cut);
    const element = make("div", { className: "box", title: label }, ...(label ? [make("span", { textContent: label })] : []));
    Object.assign(element.style, { left: `${100 * x1}%`, top: `${100 * y1}%`, width: `${100 * (x2 - x1)}%`, height: `${100 * (y2 - y1)}%` });
    element.style.setProperty("--hue", HUES[index % HUES.length]);
    return element;
  }));
}

function ideas(kind, question = "") {
  const texts = question ? [question] : IDEAS[kind];
  $("ideas").replaceChildren(...texts.map((text) => {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      $("question").value = text;
      $("form").requestSubmit();
    });
    return button;
  }));
}

// The conversation

function bar(name, share, hue, tag = "li") {
  const fill = make("b");
  fill.style.width = `${100 * Math.min(share, 1)}%`;
  const row = make(tag, { className: share > 0 ? "bar" : "bar idle" }, make("span", { textContent: name }), make("i", { ariaHidden: "true" }, fill), make("span", { textContent: percent(share) }));
  if (hue) fill.style.setProperty("--hue", hue);
  row.dataset.share = share;
  return row;
}

// The experts that the settings ask for: "gate", "none", or {expert: weight}.
function experts() {
  const mode = document.querySelector("input[name=mode]:checked").value;
  const [first, second, share] = [$("first").value, $("second").value, $("balance").value / 100];
  if (mode === "one") return { [first]: 1 };
  if (mode === "two") return first === second ? { [first]: 1 } : { [first]: share, [second]: 1 - share };
  return mode;
}

// The answers to make for one question: a title and the fields of the request that differ.
function columns() {
  const chosen = experts();
  const titles = { gate: "LoRA-MoE", none: "Frozen model" };
  const list = [{ title: titles[chosen] ?? `Expert ${Object.keys(chosen).join(" and ")}`, fields: { experts: chosen } }];
  if ($("withsingle").checked) list.push({ title: "Single LoRA", fields: { model: state.models[1].id } });
  if ($("withblind").checked) list.push({ title: "Blind", fields: { blind: true, experts: chosen } });
  return list;
}

async function ask(question) {
  const parts = state.shown && !state.added ? [{ type: "file", file: { file_id: state.shown.id } }] : [];
  const content = [...parts, { type: "text", text: question }];
  const messages = [...state.turns, { role: "user", content }];
  const answers = make("div", { className: "answers" });
  const turn = make("article", { className: "turn" }, make("p", { className: "asked", textContent: question }), answers);
  if (state.reference && parts.length) turn.append(make("p", { className: "reference", textContent: `Reference: ${state.reference}` }));
  $("log").append(turn);
  drawBoxes([]);
  const list = columns();
  const done = await Promise.all(list.map((column) => answer(column, list.length > 1, messages, answers)));
  turn.scrollIntoView({ block: "nearest", behavior: "smooth" });
  if (done[0] === null) return;
  state.turns = [...messages, { role: "assistant", content: done[0].text || "…" }];
  state.added = true;
  if (state.shown?.kind === "image") drawBoxes(done[0].boxes);
}

async function answer({ title, fields }, titled, messages, place) {
  const text = make("p", { className: "text" });
  const bars = make("ol", { className: "bars", ariaLabel: "Weights of the experts" });
  const meta = make("p", { className: "meta" });
  const card = make("div", { className: "answer open" }, ...(titled || title !== "LoRA-MoE" ? [make("h3", { textContent: title })] : []), text, bars, meta);
  place.append(card);
  try {
    const body = { model: state.models[0].id, messages, stream: true, stream_options: { include_usage: true }, max_tokens: 128, ...fields };
    const reply = await fetched("v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    let last = {}, usage = {};
    for await (const chunk of events(reply.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.octavius?.experts && !bars.children.length) {
        const single = fields.model !== undefined;
        bars.replaceChildren(...(single ? [] : chunk.octavius.experts.map((share, index) => bar(`Expert ${index}`, share, HUES[index % HUES.length]))));
      }
      text.textContent += chunk.choices[0]?.delta.content ?? "";
      if (chunk.octavius?.boxes) last = chunk.octavius;
      if (chunk.usage) usage = chunk.usage;
      $("log").scrollTop = $("log").scrollHeight;
    }
    const rate = last.seconds > 0 ? `, ${Math.round((usage.completion_tokens - 1) / last.seconds)} a second` : "";
    meta.textContent = `${usage.completion_tokens} tokens${rate}${last.time_limit ? ", cut at the time limit" : ""}`;
    if (!text.textContent) text.textContent = "(no words)";
    return { text: text.textContent, boxes: last.boxes ?? [] };
  } catch (error) {
    card.classList.add("failed");
    text.textContent = error.message;
    return null;
  } finally {
    card.classList.remove("open");
  }
}

// Server-sent events of a streamed answer, parsed.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", ended = false; !ended; ) {
    const { value, done } = await reader.read();
    ended = done;
    const blocks = (rest + (value ?? "")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
  }
}

function restart() {
  Object.assign(state, { turns: [], added: false });
  $("log").replaceChildren();
  drawBoxes([]);
  $("question").focus();
}

// Samples, settings, events

function listSamples() {
  const task = $("task").value;
  const chosen = state.samples.filter((sample) => !task || sample.task === task);
  $("samples").replaceChildren(...chosen.map((sample) => {
    const button = make("button", { type: "button" }, sample.question, make("small", { textContent: `${sample.task}, reference: ${sample.reference}` }));
    button.addEventListener("click", async () => {
      restart();
      await show(() => fetched(`samples/${sample.index}`, { method: "POST" }), sample.reference);
      if (!$("problem").hidden) return;
      $("question").value = sample.question;
      ideas("", sample.question);
      document.querySelector(".see").scrollIntoView({ block: "nearest" });
    });
    return make("li", {}, button);
  }));
}

function settings() {
  const mode = document.querySelector("input[name=mode]:checked").value;
  $("pick").hidden = mode !== "one" && mode !== "two";
  $("secondbox").hidden = $("balancebox").hidden = mode !== "two";
  $("balanceout").textContent = `${$("balance").value} %`;
  const texts = { gate: "chosen by the gate", one: `expert ${$("first").value} alone`, two: `experts ${$("first").value} and ${$("second").value}`, none: "none" };
  $("mode").textContent = texts[mode];
}

async function begin() {
  state.models = (await (await fetched("v1/models")).json()).data;
  state.samples = await (await fetched("samples")).json();
  const { octavius: card } = state.models[0];
  const reads = [card.images && "images", card.clouds && "point clouds"].filter(Boolean).join(" and ");
  $("about").textContent = `${card.llm} reads ${reads} through ${card.experts} experts, ${card.top_k} to a question`;
  const limits = card.limits;
  $("limits").textContent = `Limits: files of ${limits.upload_bytes >> 20} MB, images of ${limits.pixels / 1e6} megapixels, clouds of ${limits.points.toLocaleString()} points, ` +
    `${limits.turns} turns, ${limits.shown} images and clouds, ${limits.context} tokens in a conversation; an answer within ${limits.seconds} s; ${limits.rows} answers at once, ${limits.waiting} waiting.`;
  for (const [id, index] of [["first", 0], ["second", Math.min(1, card.experts - 1)]]) {
    $(id).replaceChildren(...Array.from({ length: card.experts }, (_, expert) => make("option", { value: expert, textContent: expert })));
    $(id).value = index;
  }
  $("withsingle").disabled = state.models.length < 2;
  if (state.models.length < 2) $("withsingle").parentElement.append(" (none beside this model)");
  $("unitbox").hidden = !card.clouds;
  $("samplesbox").hidden = !state.samples.length;
  $("task").replaceChildren(make("option", { value: "", textContent: "all" }), ...[...new Set(state.samples.map((sample) => sample.task))].map((task) => make("option", { value: task, textContent: task })));
  listSamples();
  settings();
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.answering) return;
  problem("");
  state.answering = $("send").disabled = true;
  $("question").value = "";
  try {
    await ask(question);
  } finally {
    state.answering = $("send").disabled = false;
    $("question").focus();
  }
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("file").addEventListener("change", () => $("file").files[0] && send($("file").files[0]));
$("another").addEventListener("click", () => $("file").click());
$("new").addEventListener("click", restart);
$("task").addEventListener("change", listSamples);
$("settings").addEventListener("change", settings);
$("balance").addEventListener("input", settings);
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => event.dataTransfer.files[0] && send(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => event.clipboardData.files[0] && send(event.clipboardData.files[0]));
begin().catch((error) => problem(error.message));
