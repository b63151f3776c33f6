"use strict";
// Everything that comes from the data is put in as text or as an attribute's value, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const foreign = (tag, text, className = "") => make(tag, { class: `foreign ${className}`.trim() }, text);
const percent = (value) => (value === null ? "not recorded" : `${(100 * value).toFixed(0)}%`);
const names = (list) => (list.length ? list.join(", ") : "nothing that can be read");
const veil = (png) => make("img", { class: "veil", src: `data:image/png;base64,${png}`, alt: "" });

function meter(value) {
  const bar = make("i");
  bar.style.width = `${Math.max(0, Math.min(100, 100 * value))}%`;
  return make("span", { class: "meter", "aria-hidden": "true" }, bar);
}
function mark(correct) {
  return make("span", { class: correct ? "mark" : "mark wrong" }, correct ? "\u2713" : "\u2717",
    make("span", { class: "hidden-text" }, correct ? " right" : " wrong"));
}
function pill(correct) {
  return make("span", { class: `pill ${correct ? "right" : "wrong"}` }, correct ? "\u2713 answer right" : "\u2717 answer wrong");
}
function options(select, values, all) {
  select.append(make("option", { value: "" }, all), ...values.map((value) => make("option", { value }, value)));
}
const difficulty = ["simple", "medium", "complex"];
const distinct = (values) => [...new Set(values.filter((value) => value !== null))].sort(
  (a, b) => difficulty.indexOf(a) - difficulty.indexOf(b) || (a < b ? -1 : 1));

// ---- samples: a filtered list, and one of them in full

const filters = byId("filters");
let shown = [];
let current = null;
let withAttention = true;

function setUpSamples() {
  const samples = data.samples;
  options(byId("f-answer"), distinct(samples.flatMap((sample) => sample.answers)), "all answers");
  options(byId("f-complexity"), distinct(samples.map((sample) => sample.complexity)), "all");
  options(byId("f-kind"), distinct(samples.map((sample) => sample.kind)), "all kinds");
  for (const event of ["input", "change"]) filters.addEventListener(event, filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filter();
}

function filter() {
  const wanted = Object.fromEntries(["correct", "answer", "complexity", "kind", "text"].map((name) => [name, byId(`f-${name}`).value]));
  const text = wanted.text.trim().toLowerCase();
  shown = data.samples.filter((sample) =>
    (!wanted.correct || (wanted.correct === "right") === sample.correct)
    && (!wanted.answer || sample.answers.includes(wanted.answer))
    && (!wanted.complexity || sample.complexity === wanted.complexity)
    && (!wanted.kind || sample.kind === wanted.kind)
    && (!text || [sample.id, sample.instruction, ...sample.steps].some((part) => part.toLowerCase().includes(text))));
  byId("f-count").textContent = `${shown.length} of ${data.samples.length} samples`;
  byId("list").replaceChildren(...shown.map((sample, place) => {
    const about = [sample.complexity, names(sample.answers)].filter(Boolean).join(" \u00b7 ");
    const button = make("button", { type: "button" }, mark(sample.correct), foreign("span", sample.instruction, "what"),
      foreign("small", about));
    button.addEventListener("click", () => open(place, true));
    return make("li", {}, button);
  }));
  open(Math.max(0, shown.indexOf(current)), false);
}

function open(place, byHand) {
  current = shown[place] || null;
  [...byId("list").querySelectorAll("button")].forEach((button, index) => button.setAttribute("aria-current", String(index === place)));
  byId("detail").replaceChildren(...(current ? detail(current, place) : [make("p", { class: "nothing" }, "No sample fits these filters.")]));
  if (byHand && matchMedia("(max-width: 900px)").matches) byId("detail").scrollIntoView();
}

function step(place, direction) {
  open(place + direction, false);
  byId("list").children[place + direction].scrollIntoView({ block: "nearest" });
  const again = byId(direction < 0 ? "previous" : "next");
  (again.disabled ? byId(direction < 0 ? "next" : "previous") : again).focus();
}

function detail(sample, place) {
  const previous = make("button", { type: "button", id: "previous", disabled: place === 0 }, "Previous");
  const next = make("button", { type: "button", id: "next", disabled: place === shown.length - 1 }, "Next");
  previous.addEventListener("click", () => step(place, -1));
  next.addEventListener("click", () => step(place, 1));
  const about = [`sample ${sample.id}`, sample.complexity, sample.kind].filter(Boolean).join(" \u00b7 ");
  return [
    make("div", { class: "head" }, make("div", {}, pill(sample.correct), " ", foreign("span", about, "dim")),
      make("div", { class: "buttons" }, previous, next)),
    foreign("h3", sample.instruction, "question"),
    chain(sample),
    answers(sample),
    scores(sample),
    gold(sample),
  ].filter((node) => node !== null);
}

function chain(sample) {
  const picture = sample.picture === null ? null : data.pictures[sample.picture];
  const frame = picture
    ? make("div", { class: "frame" }, make("img", { src: picture, alt: `Picture for: ${sample.instruction}` }))
    : make("div", { class: "frame none" }, foreign("span", sample.image ? `picture not found: ${sample.image}` : "text only, no picture"));
  const caption = make("div", { class: "under", "aria-live": "polite" });
  const list = make("ol", { class: "steps", "aria-label": "Steps of the chain" });
  const attention = sample.attention;
  const shares = (number) => sample.things.map(([name, covered], place) => ({ name, covered, share: sample.shares[number][place],
    read: sample.reads[number].includes(place) }));
  const most = (number) => shares(number).filter((thing, _, all) => (sample.reads[number].length ? thing.read
    : thing.share === Math.max(...all.map((other) => other.share)))).map(({ name, share }) => `${share}% on ${name}`).join(", ");
  const things = make("ul", { class: "things", "aria-label": "Attention of this step on each thing" });
  const look = (number) => {
    frame.querySelector(".veil")?.remove();
    [...list.querySelectorAll("button")].forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
    if (attention[number] && withAttention) frame.append(veil(attention[number]));
    things.replaceChildren(...(attention[number] && withAttention ? shares(number) : []).map(({ name, covered, share, read }) =>
      make("li", {}, make("span", {}, foreign(read ? "b" : "span", name), read ? " (this step reads it)" : ""),
        make("span", { class: "dim" }, `${share}%; it covers ${covered}% of the picture`), meter(share / 100))));
    caption.textContent = !attention.length ? (sample.recorded ? `Attention is not shown. ${data.noShare}` : "No attention was recorded for this sample.")
      : !withAttention ? "Attention is hidden."
      : attention[number] ? `Step ${number + 1}: clear where the model looked, faded where it did not. Things may overlap.` : `Step ${number + 1} has no attention.`;
  };
  let chosen = 0;
  sample.steps.forEach((text, number) => {
    const parts = [make("span", { class: "no" }, String(number + 1))];
    if (attention.length) {
      const thumb = make("span", { class: "thumb", "aria-hidden": "true" });
      if (picture) thumb.append(make("img", { src: picture, alt: "" }));
      if (attention[number]) thumb.append(veil(attention[number]));
      parts.push(thumb);
    }
    const validator = sample.validator[number];
    const says = make("span", { class: "says" });
    if (validator !== undefined && validator !== null) {
      says.append(make("span", { title: data.validatorNote }, `valid ${percent(validator)}`), meter(validator));
    }
    const told = attention[number] ? most(number) : "";
    parts.push(make("span", {}, foreign("span", text), told ? foreign("small", told, "looked dim") : ""), says);
    const button = make("button", { type: "button", class: attention.length ? "step" : "step bare", "aria-pressed": "false" }, ...parts);
    button.addEventListener("click", () => { chosen = number; look(number); });
    list.append(make("li", {}, button));
  });
  if (!sample.steps.length) list.append(make("li", { class: "nothing" }, "The model wrote no chain that can be read."));
  const box = make("input", { type: "checkbox", id: "attention", checked: withAttention && attention.length > 0, disabled: !attention.length });
  box.addEventListener("change", () => { withAttention = box.checked; look(chosen); });
  look(0);
  return make("div", { class: "two" }, make("div", {}, frame, caption, things, make("label", { class: "toggle" }, box, "Show attention")), list);
}

function answers(sample) {
  const entry = (name, ...value) => make("div", {}, make("dt", {}, name), make("dd", {}, ...value));
  const confidence = sample.confidence === null ? "" : ` (${percent(sample.confidence)} sure)`;
  const list = make("dl", { class: "facts" },
    entry("Model's answer", mark(sample.correct), " ", foreign("b", names(sample.answers)), confidence),
    entry("Right answer", foreign("b", names(sample.gold))));
  if (sample.head.length) list.append(entry("Answer head alone", foreign("span", names(sample.head))));
  if (sample.baseline) list.append(entry("Without reasoning", mark(sample.baseline.correct), " ", foreign("span", names(sample.baseline.answers))));
  return list;
}

function scores(sample) {
  if (!sample.scores.length && !sample.reasons.length) return null;
  const list = make("dl", { class: "facts" });
  for (const [name, value] of sample.scores) {
    list.append(make("div", {}, foreign("dt", name.replaceAll("_", " ")),
      make("dd", {}, value === null ? "not a number" : value.toFixed(3), ...(value === null ? [] : [meter(value)]))));
  }
  const reasons = sample.reasons.length
    ? make("div", {}, make("h3", {}, "What cost points"), make("ul", { class: "reasons" }, ...sample.reasons.map((text) => foreign("li", text))))
    : null;
  return make("div", {}, list, ...(reasons ? [reasons] : []));
}

function gold(sample) {
  if (!sample.goldSteps.length) return null;
  return make("details", {}, make("summary", {}, "Gold chain"), make("ol", {}, ...sample.goldSteps.map((text) => foreign("li", text))));
}

// ---- side by side

function setUpComparison() {
  const left = byId("c-left"), right = byId("c-right"), which = byId("c-sample");
  const sets = data.sets.map((set) => ({ name: set.name, samples: new Map((set.samples || data.samples).map((sample) => [sample.id, sample])) }));
  const common = (a, b) => [...sets[a].samples.keys()].filter((id) => sets[b].samples.has(id));
  for (const select of [left, right]) select.append(...sets.map((set, index) => make("option", { value: index }, set.name)));
  const offer = () => {
    const a = Number(left.value);
    [...right.options].forEach((option, index) => { option.disabled = index === a || !common(a, index).length; });
    if (right.selectedOptions[0]?.disabled !== false) right.value = String([...right.options].findLastIndex((option) => !option.disabled));
    const ids = right.value === "" ? [] : common(a, Number(right.value));
    const before = which.value;
    which.replaceChildren(...ids.map((id) => make("option", { value: id }, `${id}: ${sets[a].samples.get(id).instruction}`.slice(0, 90))));
    if (ids.includes(before)) which.value = before;
    show();
  };
  const show = () => {
    const pair = [left, right].map((select) => sets[Number(select.value)]);
    if (right.value === "" || !which.value) {
      byId("c-pair").replaceChildren(make("p", { class: "nothing" }, "These two have no sample in common."));
      byId("c-count").textContent = "";
      return;
    }
    const ids = [...pair[0].samples.keys()].filter((id) => pair[1].samples.has(id));
    const right_ = pair.map((set) => ids.filter((id) => set.samples.get(id).correct).length);
    byId("c-count").textContent = `right: ${right_[0]} of ${ids.length}, then ${right_[1]} of ${ids.length}`;
    const both = pair.map((set) => set.samples.get(which.value));
    byId("c-pair").replaceChildren(...both.map((sample, side) => {
      const other = both[1 - side];
      const list = make("ol", { class: "steps" }, ...sample.steps.map((text, number) => {
        const differs = other.steps[number] !== text;
        return make("li", { class: differs ? "step differs" : "step" }, make("span", { class: "no" }, String(number + 1)),
          make("span", {}, foreign("span", text), ...(differs ? [make("span", { class: "hidden-text" }, " (differs)")] : [])));
      }));
      return make("article", { class: "card" }, make("div", { class: "head" }, foreign("h3", pair[side].name), pill(sample.correct)),
        make("div", {}, foreign("b", names(sample.answers)), sample.confidence === null ? "" : ` (${percent(sample.confidence)} sure)`, list));
    }));
    byId("c-question").textContent = both[0].instruction;
    byId("c-gold").textContent = names(both[0].gold);
  };
  left.addEventListener("change", offer);
  right.addEventListener("change", offer);
  which.addEventListener("change", show);
  left.value = "0";
  offer();
}

if (filters) setUpSamples();
if (byId("c-left")) setUpComparison();
