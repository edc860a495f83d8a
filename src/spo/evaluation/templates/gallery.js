"use strict";
// Text enters the page by textContent only: a prompt or a name may be HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("prompts");
const form = document.getElementById("controls");
const controls = form.elements;
const prompts = [...list.children].map((item, index) => ({
  index, item,
  text: item.querySelector("h2").lastChild.textContent.trim(),
  pictures: [...item.querySelectorAll("img")],
  captions: [...item.querySelectorAll(".score")],
}));
const NAMES = ["words", "sort", "variant", "over", "metric"];
const START = { words: "", sort: "order", variant: data.variant, over: data.over, metric: data.metrics[0].key };
let shown = prompts;

const place = (entries, key) => entries.findIndex((entry) => entry.key === key);
const fixed = (value) => value.toFixed(3).replace("-", "−");
const sign = (value) => (value > 0 ? "up" : value < 0 ? "down" : "");

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function difference(value) {
  return element("small", value > 0 ? `+${fixed(value)}` : fixed(value), sign(Number(value.toFixed(3))));
}

function settings() {
  const [variant, over] = [place(data.variants, controls.variant.value), place(data.variants, controls.over.value)];
  return { variant, over, metric: place(data.metrics, controls.metric.value) };
}

// The number by which a prompt is sorted, the largest first.
function rank(scores, sort, { variant, over, metric }) {
  const [own, other] = [scores[variant][metric], scores[over][metric]];
  return { order: 0, gain: own - other, loss: other - own, highest: own, lowest: -own }[sort];
}

function update() {
  const chosen = settings();
  const words = controls.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = prompts.filter(({ text }) => words.every((word) => text.toLowerCase().includes(word)));
  const ranks = shown.map(({ index }) => rank(data.scores[index], controls.sort.value, chosen));
  const order = shown.map((_, i) => i).sort((a, b) => ranks[b] - ranks[a] || a - b);
  shown = order.map((i) => shown[i]);
  const visible = new Set(shown);
  prompts.forEach((prompt) => { prompt.item.hidden = !visible.has(prompt); });
  list.append(...shown.map(({ item }) => item));
  prompts.forEach((prompt) => caption(prompt, chosen));
  controls.count.textContent = shown.length < prompts.length ? `${shown.length} of ${prompts.length}` : prompts.length;
  document.getElementById("nothing").hidden = shown.length > 0;
}

function caption({ index, captions }, { over, metric }) {
  captions.forEach((box, variant) => {
    const [own, other] = [data.scores[index][variant][metric], data.scores[index][over][metric]];
    box.replaceChildren(fixed(own), ...(variant === over ? [] : [" ", difference(own - other)]));
  });
}

// The state is in the address, so that a view can be bookmarked.
function toAddress() {
  const changed = NAMES.filter((name) => controls[name].value !== START[name]);
  const state = new URLSearchParams(changed.map((name) => [name, controls[name].value]));
  if (location.protocol !== "about:") history.replaceState(null, "", `#${state}`);
}

function fromAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) {
    const known = name === "words" || [...controls[name].options].some(({ value }) => value === state.get(name));
    controls[name].value = state.has(name) && known ? state.get(name) : START[name];
  }
  update();
}

const dialog = document.getElementById("large");
const pictures = dialog.querySelector(".pictures");
let current = 0; // its place in `shown`
let single = null; // the only variant in view; null: all

function enlarge(at, variant = 0) {
  current = Math.max(0, Math.min(shown.length - 1, at));
  const prompt = shown[current];
  dialog.querySelector("h2").textContent = prompt.text;
  dialog.querySelector(".place").textContent = `${current + 1} of ${shown.length}`;
  dialog.querySelector("p").textContent = `Prompt ${prompt.index + 1}, seed ${data.seeds[prompt.index]}. ` +
    `Differences are to ${data.variants[settings().over].title}; the best score is bold.`;
  dialog.querySelector('[name="previous"]').disabled = current === 0;
  dialog.querySelector('[name="next"]').disabled = current === shown.length - 1;
  pictures.replaceChildren(...prompt.pictures.map(picture));
  table(data.scores[prompt.index]);
  if (!dialog.open) dialog.showModal();
  view(single);
  pictures.children[single ?? variant].scrollIntoView({ block: "nearest", inline: "center" });
}

function view(variant) {
  single = variant;
  pictures.classList.toggle("single", single !== null);
  [...pictures.children].forEach((box, i) => box.classList.toggle("current", i === single));
}

// The thumbnail is the background until the large image is there, and remains if its file is not.
function picture(thumbnail, variant) {
  const box = element("span", "", "picture");
  const image = element("img");
  image.alt = thumbnail.alt;
  image.style.backgroundImage = `url("${thumbnail.src}")`;
  image.addEventListener("error", () => { image.src = thumbnail.src; }, { once: true });
  image.src = thumbnail.dataset.large;
  box.append(image, element("span", data.variants[variant].title, "title"));
  return box;
}

function table(scores) {
  const { over } = settings();
  const head = element("tr");
  head.append(element("th"), ...data.variants.map(({ title }) => element("th", title)));
  dialog.querySelector("thead").replaceChildren(head);
  dialog.querySelector("tbody").replaceChildren(...data.metrics.map(({ title }, metric) => {
    const row = element("tr");
    const values = scores.map((of) => of[metric]);
    row.append(element("th", title), ...values.map((value, variant) => {
      const cell = element("td", fixed(value), value === Math.max(...values) ? "best" : "");
      if (variant !== over) cell.append(" ", difference(value - values[over]));
      return cell;
    }));
    return row;
  }));
}

for (const [name, entries] of [["variant", data.variants], ["over", data.variants], ["metric", data.metrics]]) {
  controls[name].append(...entries.map(({ key, title }) => new Option(title, key)));
}
form.addEventListener("input", () => { update(); toAddress(); });
form.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", fromAddress);
list.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  const at = shown.findIndex(({ item }) => item.contains(button));
  const box = target.closest(".picture");
  enlarge(at, box ? [...button.children].indexOf(box) : 0);
});
dialog.addEventListener("click", ({ target }) => {
  if (target === dialog || target.name === "close") dialog.close();
  if (target.name === "previous") enlarge(current - 1);
  if (target.name === "next") enlarge(current + 1);
  const box = target.closest(".picture");
  if (box) view(single === null ? [...pictures.children].indexOf(box) : null);
});
dialog.addEventListener("close", () => {
  view(null);
  const { item } = shown[current];
  item.querySelector("button").focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest" });
});
document.addEventListener("keydown", (event) => {
  const [across, down] = [{ ArrowLeft: -1, ArrowRight: 1 }[event.key], { ArrowUp: -1, ArrowDown: 1 }[event.key]];
  if (dialog.open && (across || down)) {
    const count = data.variants.length;
    if (across) enlarge(current + across);
    else view(single === null ? (down > 0 ? 0 : count - 1) : (single + down + count) % count);
  } else if (!dialog.open && event.key === "/" && event.target !== controls.words) {
    controls.words.focus();
  } else return;
  event.preventDefault();
});
fromAddress();
form.hidden = false;
