// The slang page: a scene goes in, a dictionary entry streams out; roll again, share, keep.
import { $, Answering, copy, json, newSeed, onStatus, Refused, scrollTo, toast } from "../site.js";

const form = $("ask"), dial = $("creativity"), words = $("creativity-word");
const PARTS = ["slang", "description", "example"];
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
  last = { question, text: { after: "", before: "" }, fields: {}, keep: null, id: null, thumb: 0 };
  const mine = last;
  $("before").hidden = !question.compare;
  document.querySelector(".workbench").classList.toggle("compare", question.compare);
  $("tools").hidden = true;
  $("facts").textContent = "";
  for (const side of ["after", "before"]) show(side, "", null), $(side).setAttribute("aria-busy", "true");
  if (innerWidth < 800) scrollTo($("after"), "start");
  const ended = await answering.ask(question, {
    part(side, data) {
      if (mine !== last) return;
      mine.text[side] += data.text;
      if (side === "after") mine.fields = data.fields ?? {};
      show(side, mine.text[side], data.fields);
    },
    done(side, data) {
      if (mine !== last || side !== "after") return;
      mine.keep = data.keep;
      $("facts").textContent = `${data.tokens} tokens · seed ${question.seed}`;
    },
  });
  if (mine !== last) return;
  for (const side of ["after", "before"]) {
    $(side).setAttribute("aria-busy", "false");
    if (!mine.text[side]) show(side, ended === "done" ? "(nothing)" : "", null);
  }
  $("tools").hidden = !mine.text.after;
  $("keep").hidden = !mine.keep;
  document.querySelectorAll("#tools .thumb").forEach((button) => (button.hidden = !mine.keep));
  showKept();
  if (ended === "done" && mine.fields.slang) $("announce").textContent = `Done: ${mine.fields.slang}.`;
}

function show(side, text, fields) {
  const box = $(`${side}-text`), parts = PARTS.filter((name) => fields?.[name]);
  box.replaceChildren(...(parts.length ? parts.map((name) => paragraph(name === "slang" ? "term" : name, fields[name]))
    : text ? [paragraph("raw", text)] : []));
}

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
  ask(questionOf(Number(shared.get("seed")) % 2 ** 31));
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
