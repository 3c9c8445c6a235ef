// The chat: a dialogue with any model that is served. It lives in this tab alone, and survives a reload.
import { $, Answering, composer, copy, newSeed, onStatus, scrollTo } from "../site.js";

const MOST = 21; // messages that the model is given; the oldest are left out, and the first is the visitor's
let messages = [], bubbles = [], seed = 0;
const models = new Map(); // name → what the site's status says of it
const BASE = "Base model, not fine-tuned";
const KEPT = "chat"; // in the tab's own storage
const answering = new Answering(() => messages.length && ask(seed));

composer($("ask"), $("message"), (text) => { settle(); say(text); ask(newSeed()); });
document.querySelectorAll("#starters .chip").forEach((chip) => chip.addEventListener("click", () => { say(chip.textContent); ask(newSeed()); }));
$("regenerate").addEventListener("click", () => { forgetAnswer(); ask(newSeed()); });
$("copy").addEventListener("click", () => copy(messages.at(-1).content));
$("new").addEventListener("click", begin);
$("adapter").addEventListener("change", () => { begin(); sayModel(); });

function begin() {
  answering.stop();
  answering.alert("");
  messages = [];
  bubbles.forEach((bubble) => bubble.remove());
  bubbles = [];
  store();
  $("tools").hidden = $("forgotten").hidden = true;
  $("starters").hidden = $("adapter").value !== "chat";
  $("message").focus();
}

function store() {
  try { sessionStorage.setItem(KEPT, JSON.stringify({ adapter: $("adapter").value, messages })); } catch { /* for this page alone */ }
}

function restore() {
  let kept;
  try { kept = JSON.parse(sessionStorage.getItem(KEPT)); } catch { /* storage is forbidden */ }
  if (!kept) return;
  if (![...$("adapter").options].some(({ value }) => value === kept.adapter)) $("adapter").append(new Option(kept.adapter || BASE, kept.adapter));
  $("adapter").value = kept.adapter;
  messages = kept.messages;
  $("starters").hidden = kept.adapter !== "chat";
  if (!messages.length) return;
  for (const { role, content } of messages) add(role, content);
  if (messages.at(-1).role === "user") answering.alert("The page was left before the answer was complete. What you typed is kept; try again.");
  else $("tools").hidden = false;
}

// A message follows one that got no answer, or half of one: the dialogue goes on with what there is.
function settle() {
  answering.stop();
  if (messages.at(-1)?.role !== "user") return;
  const half = bubbles.at(-1).classList.contains("assistant") ? bubbles.at(-1).textContent : "";
  messages.push({ role: "assistant", content: half || "…" });
  store();
}

function say(text) {
  messages.push({ role: "user", content: text });
  store();
  add("user", text);
}

function add(role, text) {
  $("starters").hidden = true;
  const bubble = document.createElement("p");
  bubble.className = `bubble ${role}`;
  bubble.dir = "auto";
  bubble.textContent = text;
  $("log").append(bubble);
  bubbles.push(bubble);
  scrollTo(bubble);
  return bubble;
}

// What the model thinks stands folded above its answer; it is not part of the dialogue.
function addThought(bubble) {
  const details = document.createElement("details");
  details.className = "thought assistant";
  details.append(document.createElement("summary"), document.createElement("p"));
  details.firstChild.textContent = "Thought";
  bubble.before(details);
  bubbles.splice(bubbles.indexOf(bubble), 0, details);
  return details.lastChild;
}

function forgetAnswer() {
  if (messages.at(-1)?.role === "assistant") messages.pop();
  while (bubbles.at(-1)?.classList.contains("assistant")) bubbles.pop().remove();
}

async function ask(chosen) {
  seed = chosen;
  forgetAnswer();
  const dialogue = messages, bubble = add("assistant", "");
  bubble.setAttribute("aria-busy", "true");
  $("tools").hidden = true;
  let text = "", thought = null;
  const thinking = $("think").checked && Boolean(models.get($("adapter").value)?.thinks);
  const ended = await answering.ask({ adapter: $("adapter").value || null, messages: dialogue.slice(-MOST), seed, thinking }, {
    thought(side, data) { (thought ??= addThought(bubble)).textContent += data.text; },
    part(side, data) {
      const low = innerHeight + scrollY > document.body.scrollHeight - 160;
      bubble.textContent = text += data.text;
      if (low) scrollTo(bubble, "end");
    },
    done(side, data) { $("forgotten").hidden = !data.forgotten; },
  });
  bubble.setAttribute("aria-busy", "false");
  if (dialogue !== messages || bubbles.at(-1) !== bubble) return; // another dialogue, or message, since
  if (ended === "failed") {
    if (!text) forgetAnswer();
    return;
  }
  if (!text) bubble.textContent = ended === "stopped" ? "Stopped." : "(nothing)";
  messages.push({ role: "assistant", content: text || "…" });
  store();
  $("tools").hidden = false;
}

// What is talked with: its name in the list says little to somebody who did not train it.
function sayModel() {
  const model = models.get($("adapter").value);
  $("no-turns").hidden = model?.has_turns !== false;
  $("thinking").hidden = !model?.thinks;
  $("model").textContent = !model ? `${$("adapter").value} is not being served at the moment.` : model.name ? `${model.title}: fine-tuned from ${model.base}${model.run && `, in the run ${model.run}`}.`
    : `${model.base || "The base model"} as it is, without fine-tuning.`;
}

onStatus((status) => {
  if (!status.ready) return;
  const chosen = $("adapter").value, base = { name: "", base: status.adapters[0]?.base };
  models.clear();
  for (const model of [...status.adapters, base]) models.set(model.name, model);
  const names = [...models.keys()];
  if (!models.has(chosen) && messages.length) names.unshift(chosen); // the dialogue stays, whatever became of its model
  if (names.join("\n") !== [...$("adapter").options].map((option) => option.value).join("\n")) {
    $("adapter").replaceChildren(...names.map((name) => new Option(name ? models.get(name)?.title ?? name : BASE, name)));
  }
  $("adapter").value = names.includes(chosen) ? chosen : names[0];
  if (!messages.length) $("starters").hidden = $("adapter").value !== "chat";
  sayModel();
});

restore();
