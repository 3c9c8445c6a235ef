// The slang page: a scene goes in, a few dictionary entries stream out; choose one, roll again, share, keep.
import { $, Answering, copy, json, newSeed, onStatus, Refused, scrollTo, toast } from "../site.js";

const form = $("ask"), dial = $("creativity"), words = $("creativity-word");
const PARTS = ["slang", "description", "example"], CHOICES = 3;
let last = null; // the question on the page, its answer, and what was kept of it
let run = "", sharedRun = "";

const answering = new Answering(() => last && ask(last.question));

function sayCreativity() {
  const value = Number(dial.value);
  const word = value <= 0.3 ? "safe" : value <= 0.6 ? "calm" : value <= 0.9 ? "balanced" : value <= 1.2 ? "bold" : "wild";
  words.textContent = `${word} · ${value.toFixed(1)}`;
  dial.setAttribute("aria-valuetext", `${word}, ${value.toFixed(1)}`);
}
dial.addEventListener("input", sayCreativity);

const questionOf = (seed) => ({
  adapter: "slang",
  fields: { context: form.context.value.trim(), condition: form.condition.value.trim() },
  seed,
  temperature: Number(dial.value),
  compare: form.compare.checked,
  choices: CHOICES,
});

form.addEventListener("submit", (event) => { event.preventDefault(); ask(questionOf(newSeed())); });
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
});
$("again").addEventListener("click", () => ask(questionOf(newSeed())));
$("scene")?.addEventListener("click", () => {
  const scenes = JSON.parse($("scene").dataset.scenes);
  form.context.value = scenes[(scenes.indexOf(form.context.value) + 1) % scenes.length];
});

// --- the answer ---

async function ask(question) {
  last = { question, text: { after: "", before: "" }, fields: {}, choices: new Map(), keep: null, id: null, thumb: 0 };
  const mine = last;
  $("before").hidden = !question.compare;
  document.querySelector(".workbench").classList.toggle("compare", question.compare);
  $("tools").hidden = true;
  $("facts").textContent = "";
  for (const side of ["after", "before"]) show(side, "", null), $(side).setAttribute("aria-busy", "true");
  if (innerWidth < 800) scrollTo($("after"), "start");
  const current = (does) => (side, data) => { if (mine === last) does(side, data); };
  const ended = await answering.ask(question, {
    part: current((side, data) => {
      if (data.choice != null) return growChoice(data);
      mine.text[side] += data.text;
      if (side === "after") mine.fields = data.fields ?? {};
      show(side, mine.text[side], data.fields);
    }),
    choice: current((side, data) => Object.assign(mine.choices.get(data.choice), data, { complete: true })),
    dropped: current((side, data) => {
      mine.choices.get(data.choice).element.remove();
      mine.choices.delete(data.choice);
    }),
    done: current((side, data) => {
      if (side !== "after") return;
      if (data.asked) return offer(data);
      mine.keep = data.keep;
      sayFacts(`${data.tokens} tokens`, data.not_new);
    }),
  });
  if (mine !== last) return;
  for (const side of ["after", "before"]) {
    $(side).setAttribute("aria-busy", "false");
    if (!mine.text[side] && !$(`${side}-text`).childElementCount) show(side, ended === "done" ? "(nothing)" : "", null);
  }
  for (const { element, complete } of mine.choices.values()) element.querySelector("button").hidden = !complete;
  showTools();
  if (ended === "done") $("announce").textContent = mine.fields.slang ? `Done: ${mine.fields.slang}.`
    : mine.choices.size ? `Done: choose among ${[...mine.choices.values()].map((one) => one.fields.slang).join(", ")}.` : "No new word came of it.";
}

function showTools() {
  $("tools").hidden = !$("after-text").childElementCount;
  $("copy").hidden = $("share").hidden = !last.text.after;
  $("keep").hidden = !last.keep;
  document.querySelectorAll("#tools .thumb").forEach((button) => (button.hidden = !last.keep));
  showKept();
}

function sayFacts(made, notNew) {
  const novelty = notNew == null ? "" : notNew ? ` · not new: ${notNew}` : " · a new term";
  $("facts").textContent = `${made} · seed ${last.question.seed}${novelty}`;
}

// --- several answers, of which one is kept ---

function growChoice({ choice, fields, text }) {
  const one = last.choices.get(choice) ?? { element: $("choice").content.cloneNode(true).firstElementChild, text: "" };
  if (!last.choices.has(choice)) {
    last.choices.set(choice, one);
    one.element.querySelector("button").addEventListener("click", () => { // the choice is a vote
      pick(one);
      keep(1);
      $("keep").focus(); // the button that was pressed is gone
    });
    $("after-text").append(one.element);
  }
  one.fields = fields;
  one.text += text;
  one.element.querySelector(".parts").replaceChildren(...paragraphs(fields));
}

function offer({ asked, dropped }) {
  const why = Object.entries(dropped).map(([reason, count]) => `${count} ${reason}`).join(", ");
  $("facts").textContent = `${asked} coined${why && `; left out: ${why}`}`;
  const left = [...last.choices.values()];
  if (left.length === 1) pick(left[0]);
  else if (!left.length) $("after-text").replaceChildren(paragraph("empty", "No new word came of it. Roll again, or say more about the scene."));
}

// The chosen answer takes the place of all: what can be done with it is what can be done with one that was asked for alone.
function pick(one) {
  const { fields, text, keep, seed, not_new } = one;
  Object.assign(last, { fields, keep, question: { ...last.question, seed, choices: 1 } });
  last.text.after = text;
  show("after", text, fields);
  sayFacts(last.choices.size > 1 ? `chosen of ${last.choices.size}` : $("facts").textContent, not_new);
  showTools();
}

function show(side, text, fields) {
  const parts = paragraphs(fields);
  $(`${side}-text`).replaceChildren(...(parts.length ? parts : text ? [paragraph("raw", text)] : []));
}

const paragraphs = (fields) => PARTS.filter((name) => fields?.[name])
  .map((name) => paragraph(name === "slang" ? "term" : name, fields[name]));

function paragraph(kind, text) {
  const element = document.createElement("p");
  element.className = kind;
  element.dir = "auto";
  if (kind === "term") {
    const mark = document.createElement("mark");
    mark.textContent = text;
    element.append(mark);
  } else element.textContent = text;
  return element;
}

const asText = ({ slang, description, example }) =>
  [slang && `${slang}: ${description ?? ""}`, example && `Example: ${example}`].filter(Boolean).join("\n");
$("copy").addEventListener("click", () => copy(last.fields.slang ? asText(last.fields) : last.text.after));

// --- sharing: everything that decides the answer, behind the #, which browsers send to no server ---

$("share").addEventListener("click", async () => {
  const { fields, seed, temperature, compare } = last.question;
  const link = new URL(location.pathname, location.href);
  link.hash = new URLSearchParams({
    context: fields.context, seed, creativity: temperature, ...(run && { run }), ...(compare && { compare: 1 }),
    ...(fields.condition !== form.condition.dataset.default && { condition: fields.condition }),
  });
  history.replaceState(null, "", link);
  if (navigator.share && matchMedia("(pointer: coarse)").matches) {
    try { return await navigator.share({ title: last.fields.slang, text: asText(last.fields), url: link.href }); }
    catch (error) { if (error.name === "AbortError") return; }
  }
  copy(link.href, "Link copied. It gives this very answer again.");
});

function openLink() {
  const shared = new URLSearchParams(location.hash.slice(1));
  if (!/^\d{1,10}$/.test(shared.get("seed") ?? "")) return;
  form.context.value = (shared.get("context") ?? "").slice(0, 2000);
  form.condition.value = (shared.get("condition") ?? form.condition.dataset.default).slice(0, 2000);
  const creativity = Number(shared.get("creativity"));
  if (creativity) dial.value = creativity;
  form.compare.checked = shared.has("compare");
  sharedRun = shared.get("run") ?? "";
  sayCreativity();
  ask({ ...questionOf(Number(shared.get("seed")) % 2 ** 31), choices: 1 }); // the very answer that was shared
}
addEventListener("hashchange", openLink);
onStatus((status) => {
  run = status.adapters.find((adapter) => adapter.name === "slang")?.run ?? "";
  if (sharedRun && run && sharedRun !== run) toast("The model was trained anew since this link was made: its word may differ.");
  sharedRun = "";
});

// --- keeping ---

async function keep(thumb) {
  const mine = last;
  try {
    mine.id = (await json("POST", "/api/dictionary", { token: mine.keep, thumb })).id;
    mine.thumb = thumb;
    toast(thumb < 0 ? "Noted. It stays out of the training rows." : "It is in your dictionary.");
  } catch (error) { tell(error); }
  if (mine === last) showKept();
  list();
}
$("keep").addEventListener("click", () => keep(last.thumb));
document.querySelectorAll("#tools .thumb").forEach((button) => button.addEventListener("click", () => {
  const thumb = Number(button.dataset.thumb);
  keep(last.thumb === thumb ? 0 : thumb);
}));

function showKept() {
  $("keep").setAttribute("aria-pressed", String(Boolean(last?.id)));
  $("keep").querySelector("span").textContent = last?.id ? "Kept" : "Keep";
  press($("tools"), last?.id ? last.thumb : 0);
}

function press(box, thumb) {
  box.querySelectorAll(".thumb").forEach((button) =>
    button.setAttribute("aria-pressed", String(Number(button.dataset.thumb) === thumb)));
}

const tell = (error) => {
  if (!(error instanceof Refused)) throw error;
  toast(error.message);
};

// --- the dictionary ---

let listing = 0;
async function list() {
  const mine = ++listing, asked = $("search").value.trim();
  let entries;
  try { entries = await json("GET", `/api/dictionary?q=${encodeURIComponent(asked)}`); }
  catch (error) { return tell(error); }
  if (mine !== listing) return;
  $("entries").replaceChildren(...entries.map(item));
  $("count").textContent = entries.length || "";
  $("export").hidden = $("search").hidden = !entries.length && !asked;
  if (!entries.length && asked) {
    const none = document.createElement("li");
    none.textContent = "Nothing of that kind is in it.";
    $("entries").append(none);
  }
}

function item(entry) {
  const element = $("entry").content.cloneNode(true).firstElementChild;
  for (const [kind, name] of [["term", "slang"], ["description", "description"], ["example", "example"], ["context", "context"]]) {
    element.querySelector(`.${kind}`).textContent = entry[name];
  }
  element.classList.toggle("down", entry.thumb < 0);
  press(element, entry.thumb);
  const change = async (method, path, body) => {
    try { await json(method, path, body); } catch (error) { tell(error); }
    if (last?.id === entry.id) {
      if (body) last.thumb = body.thumb; else last.id = null;
      showKept();
    }
    list();
  };
  element.querySelectorAll(".thumb").forEach((button) => button.addEventListener("click", () => {
    const thumb = Number(button.dataset.thumb);
    change("PUT", `/api/dictionary/${entry.id}`, { thumb: entry.thumb === thumb ? 0 : thumb });
  }));
  element.querySelector(".copy").addEventListener("click", () => copy(asText(entry)));
  element.querySelector(".remove").addEventListener("click", () => change("DELETE", `/api/dictionary/${entry.id}`));
  return element;
}

let typing;
$("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(list, 150); });

sayCreativity();
list();
openLink();
