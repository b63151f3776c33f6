"use strict";
const $ = (id) => document.getElementById(id);
const model = document.querySelector("main").dataset.model;
let picture = null; // data URL
let turns = []; // messages of the conversation so far
let running = null; // AbortController

const show = (id, wanted) => { $(id).hidden = !wanted; };
const fail = (text) => { $("error").textContent = text; };

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(file);
  });
}

async function take(file) {
  fail("");
  if (!file) return;
  if (!file.type.startsWith("image/")) { fail(`${file.name} is not a picture.`); return; }
  try { picture = await read(file); } catch (error) { fail(error.message); return; }
  $("preview").src = picture;
  show("shown", true);
  forget();
}

function forget() { // another picture is another conversation
  turns = [];
  $("follow").checked = false;
  show("follow-field", false);
}

$("picture").addEventListener("change", () => take($("picture").files[0]));
$("remove").addEventListener("click", () => {
  picture = null;
  $("picture").value = "";
  show("shown", false);
  forget();
  $("picture").focus();
});
const form = $("form");
form.addEventListener("dragover", (event) => { event.preventDefault(); form.classList.add("over"); });
form.addEventListener("dragleave", () => form.classList.remove("over"));
form.addEventListener("drop", (event) => {
  event.preventDefault();
  form.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
$("stop").addEventListener("click", () => running && running.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
});
form.addEventListener("submit", (event) => { event.preventDefault(); if (!running) ask($("question").value.trim()); });

function clear(question) {
  $("steps").replaceChildren();
  $("conclusion").replaceChildren();
  $("asked").textContent = question;
  for (const id of ["conclusion", "answer-box", "empty", "looked", "about-looks"]) show(id, false);
  show("asked", true);
  fail("");
}

function write(reasoning) { // the whole text each time: a line is a step
  const lines = reasoning.split("\n").filter(Boolean);
  const steps = lines.filter((line) => /^Step \d+: /.test(line)).map((line) => line.replace(/^Step \d+: /, ""));
  const list = $("steps");
  while (list.children.length < steps.length) list.append(document.createElement("li"));
  steps.forEach((text, place) => {
    const item = list.children[place];
    if (!item.firstChild) item.append(document.createElement("span"));
    if (item.firstChild.textContent !== text) item.firstChild.textContent = text;
  });
  const last = lines.find((line) => line.startsWith("Conclusion: "));
  show("conclusion", last);
  if (last) $("conclusion").textContent = last;
}

function finish(answer, why, confidence) {
  $("answer").textContent = answer || why || "No answer.";
  $("answer").classList.toggle("none", !answer);
  show("sure", answer && typeof confidence === "number");
  if (typeof confidence === "number") {
    $("meter").value = confidence;
    $("percent").textContent = `${Math.round(100 * confidence)}%`;
  }
  show("answer-box", true);
}

// ---- where the model looked

const VEIL = 0.86, GREY = 246; // as in the report's pages: the picture fades where a step did not look

function veil({ grid: [rows, columns] }, shares) { // one pixel for each cell; the browser smooths it over the picture
  const canvas = $("veil");
  [canvas.width, canvas.height] = [columns, rows];
  const pixels = new ImageData(columns, rows);
  const most = Math.max(...shares) || 1;
  shares.forEach((share, place) => pixels.data.set([GREY, GREY, GREY, 255 * VEIL * (1 - (share / most) ** 0.7)], 4 * place));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function offer(attention, asked) { // steps become buttons: hovering and focusing shows, pressing keeps
  if (!$("steps").children.length) return; // the model wrote no chain
  $("seen").src = asked;
  show("looked", true);
  if (!attention) {
    show("veil", false);
    $("looked-at").textContent = "Where the model looked is not known: the chain is too long to be read at once.";
    return;
  }
  show("about-looks", true);
  const places = [...$("steps").children, $("conclusion")].filter((node) => !node.hidden && node.textContent);
  const buttons = places.slice(0, attention.steps.length).map((node) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "step";
    button.append(node.textContent);
    node.replaceChildren(button);
    return button;
  });
  let kept = -1;
  const look = (place) => {
    show("veil", place >= 0);
    if (place >= 0) veil(attention, attention.steps[place]);
    const name = place < $("steps").children.length ? `Step ${place + 1}` : "Conclusion";
    $("looked-at").textContent = place < 0 ? "Choose a step to see where the model looked."
      : `${name}: clear where the model looked, faded where it did not.`;
  };
  const keep = (place) => {
    kept = place === kept ? -1 : place;
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(at === kept)));
    look(kept);
  };
  buttons.forEach((button, place) => {
    button.addEventListener("click", () => keep(place));
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => look(place));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => look(kept));
  });
  keep(buttons.length ? 0 : -1);
}

$("seen").addEventListener("load", () => {
  $("frame").style.setProperty("--ratio", $("seen").naturalWidth / $("seen").naturalHeight);
});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  if (!question) { fail("Write a question first."); $("question").focus(); return; }
  if (!$("follow").checked) turns = [];
  const content = [{ type: "text", text: question }];
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  const messages = [...turns, { role: "user", content }];
  clear(question);
  running = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  $("status").textContent = "Thinking ...";
  $("result").scrollIntoView({ block: "nearest" }); // below the form on a narrow screen
  const began = performance.now();
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const asked = picture; // another may be chosen meanwhile
    const body = JSON.stringify({ model, messages, stream: true, attention: Boolean(asked) });
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal: running.signal });
    if (!response.ok) {
      if (response.status === 401) { show("key-field", true); $("key").focus(); }
      const told = await response.json().catch(() => ({}));
      throw new Error(told.error ? told.error.message : `The server answered with status ${response.status}.`);
    }
    let reasoning = "";
    let answer = null;
    let ended = false;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      reasoning += choice.delta.reasoning_content || "";
      write(reasoning);
      if (choice.finish_reason) {
        answer = choice.delta.content || "";
        finish(answer, choice.delta.refusal, choice.confidence);
        if (asked) offer(choice.attention, asked);
        ended = true;
      }
    }
    if (!ended) throw new Error("The connection ended before the answer.");
    turns = [...messages, { role: "assistant", content: answer, reasoning_content: reasoning }];
    show("follow-field", true);
    $("status").textContent = `Answered in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    running = null;
    $("ask").disabled = false;
    $("stop").disabled = true;
  }
}
