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
  $("asked").textContent = question;
  for (const id of ["conclusion", "answer-box", "empty"]) show(id, false);
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
    const body = JSON.stringify({ model, messages, stream: true });
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
