"use strict";
const $ = (id) => document.getElementById(id);
const LIMIT = 24;
const fresh = () => ({ text: "", row: null, picture: null, offset: 0, weight: 0.5, strength: null });
let state = fresh();
let about = {};
let asked = 0; // the number of the last request: older answers are dropped
const pictures = new Map(); // what was uploaded, for the browser's Back; by a number in its history

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(message, wrong = false) {
  $("status").textContent = message;
  $("status").classList.toggle("wrong", wrong);
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is pymcip serve still running?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// Search as the state says, and show what is found; `remember`: as a step of the browser's Back.
async function search(changes, remember = true) {
  Object.assign(state, { offset: 0 }, changes);
  if (remember) history.pushState({ ...state }, "");
  const query = new URLSearchParams({ offset: state.offset, limit: LIMIT });
  if (state.text) query.set("text", state.text);
  if (state.row !== null) query.set("row", state.row);
  const picture = pictures.get(state.picture);
  if (hasPicture() && state.text) query.set("weight", state.weight);
  if (hasPicture() && state.strength !== null) query.set("strength", state.strength);
  showQuery();
  const number = ++asked;
  say("Searching…");
  const started = performance.now();
  try {
    const options = picture ? { method: "POST", body: picture.file } : {};
    const found = await ask(`/api/search?${query}`, options);
    if (number !== asked) return;
    show(found);
    const seconds = ((performance.now() - started) / 1000).toFixed(2);
    say(state.text || hasPicture() ? `Nearest first, in ${seconds} s` : "Some of the images. Type a text, or click a picture to find others like it");
  } catch (error) {
    if (number !== asked) return;
    $("results").replaceChildren();
    $("pages").hidden = true;
    say(error.message, true);
  }
}

const hasPicture = () => state.row !== null || pictures.has(state.picture);

function showQuery() {
  $("text").value = state.text;
  const picture = pictures.get(state.picture);
  $("chip").hidden = !hasPicture();
  if (picture) $("chosen").src = picture.shown;
  else if (state.row !== null) $("chosen").src = `/thumbnails/${state.row}`;
  $("mix").hidden = !(hasPicture() && state.text);
  $("look").hidden = !(hasPicture() && about.appended);
  $("weight").value = state.weight;
  $("strength").value = state.strength ?? 1;
  $("strength").classList.toggle("idle", state.strength === null);
  $("amount").textContent = state.strength ?? "automatic";
  $("auto").hidden = state.strength === null;
}

function show(found) {
  const pair = found.baseline !== null;
  const sections = [section(found.hits, pair && ["Now", about.model], (hit) => moved(hit, found.compared, true))];
  if (pair) sections.unshift(section(found.baseline, ["Before", about.baseline], (hit) => moved(hit, found.compared, false)));
  $("results").className = pair ? "pair" : "";
  $("results").replaceChildren(...sections);
  const last = state.offset + found.hits.length;
  $("pages").hidden = found.total <= LIMIT;
  $("where").textContent = `${state.offset + 1} to ${last} of ${found.total}`;
  $("back").disabled = state.offset === 0;
  $("more").disabled = last >= found.total;
  scrollTo(0, 0);
}

function section(hits, title, mark) {
  const items = hits.map((hit) => {
    const name = hit.path.split("/").pop();
    const image = make("img", { src: hit.thumbnail, alt: hit.label ?? name, loading: "lazy", decoding: "async" });
    image.onerror = () => { image.alt = `${name}: no picture`; };
    const button = make("button", { className: "hit", type: "button", title: hit.captions.join("\n") || "Find others like it" }, image);
    button.onclick = () => search({ row: hit.row, picture: null });
    button.dataset.path = hit.path;
    const line = make("span", { className: "line" }, make("span", { className: "label", textContent: hit.label ?? "", title: hit.label ?? "" }));
    if (hit.score !== null) line.append(make("span", { className: "score", textContent: hit.score.toFixed(3), title: "Inner product with the query" }));
    const path = make("button", { className: "copy", type: "button", textContent: name, title: `Copy ${hit.path}`, tabIndex: -1 });
    path.onclick = () => copy(hit.path);
    return make("li", {}, button, line, make("span", { className: "line" }, path, ...mark(hit)));
  });
  const list = make("ol", {}, ...items);
  if (!title) return make("section", {}, list);
  return make("section", {}, make("h2", { textContent: `${title[0]}: ${short(title[1])}`, title: title[1] }), list);
}

// The last part of a model's name that says something: a run's folder, of what it has exported.
const short = (model) => model.replace(/\/exported\/hub\/?$/, "").split("/").pop();

// Where a hit stands in the other list: in the tuned one, how far up or down it has come.
function moved(hit, compared, tuned) {
  if (compared === null || hit.score === null) return [];
  const beyond = hit.other === null;
  const steps = (beyond ? compared : hit.other) - hit.rank;
  const up = tuned ? steps > 0 : steps < 0;
  if (steps === 0) return [];
  const place = beyond ? `not among the first ${compared}` : `place ${hit.other + 1}`;
  const text = `${up ? "▲" : "▼"}${beyond ? (tuned ? " new" : " gone") : ` ${Math.abs(steps)}`}`;
  return [make("span", { className: up ? "up" : "down", textContent: text, title: `${tuned ? "Before" : "Now"}: ${place}` })];
}

async function copy(path) {
  try {
    await navigator.clipboard.writeText(path);
    say(`Copied: ${path}`);
  } catch {
    say(path); // to be copied by hand: the browser allows no more on this address
  }
}

function take(file) {
  if (!file) return;
  const number = pictures.size + 1;
  pictures.set(number, { file, shown: URL.createObjectURL(file) });
  search({ picture: number, row: null, text: $("text").value.trim() });
}

$("form").onsubmit = (event) => { event.preventDefault(); search({ text: $("text").value.trim() }); };
$("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
$("choose").onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
$("remove").onclick = () => { search({ row: null, picture: null }); $("text").focus(); };
$("weight").onchange = () => search({ weight: Number($("weight").value) });
$("strength").oninput = () => { $("amount").textContent = $("strength").value; };
$("strength").onchange = () => search({ strength: Number($("strength").value) });
$("auto").onclick = () => search({ strength: null });
$("back").onclick = () => search({ offset: Math.max(0, state.offset - LIMIT) });
$("more").onclick = () => search({ offset: state.offset + LIMIT });
addEventListener("popstate", (event) => { state = { ...fresh(), ...event.state }; search({ offset: state.offset }, false); });
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) { event.preventDefault(); take(file); }
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const focused = document.activeElement;
  if (event.key === "/" && !focused.matches("input")) {
    event.preventDefault();
    $("text").select();
  } else if (event.key === "ArrowDown" && focused === $("text")) {
    event.preventDefault();
    document.querySelector(".hit")?.focus();
  } else if (focused.matches(".hit")) {
    if (event.key === "c") copy(focused.dataset.path);
    const arrow = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!arrow) return;
    event.preventDefault();
    step(focused, ...arrow);
  }
});

// Move the focus to the nearest picture in a direction; up from the first line, to the text.
function step(from, right, down) {
  const at = from.getBoundingClientRect();
  let best = null, least = Infinity;
  for (const hit of document.querySelectorAll(".hit")) {
    const box = hit.getBoundingClientRect();
    const x = box.left - at.left, y = box.top - at.top;
    const along = right * x + down * y, aside = Math.abs(down * x + right * y);
    if (along > 4 && (right === 0 || aside < at.height / 2) && along + 9 * aside < least) {
      best = hit;
      least = along + 9 * aside;
    }
  }
  if (best) best.focus();
  else if (down < 0) $("text").focus();
}

(async () => {
  try {
    about = await ask("/api/about");
    $("about").textContent = `${about.images.toLocaleString("en")} images · ${short(about.model)} · pymcip ${about.version}`;
  } catch (error) {
    say(error.message, true);
    return;
  }
  history.replaceState({ ...state }, "");
  search({}, false);
})();
