// The chat: a dialogue that lives in this page alone, with any adapter that is served.
import { $, Answering, composer, copy, newSeed, onStatus, scrollTo } from "../site.js";

const MOST = 21; // messages that the model is given; the oldest are left out, and the first is the visitor's
let messages = [], bubbles = [], seed = 0;
const turns = new Map(); // adapter → whether it was trained on dialogues
const thinkers = new Set(); // adapters that can think before they answer
const answering = new Answering(() => messages.length && ask(seed));

composer($("ask"), $("message"), (text) => { settle(); add("user", text); ask(newSeed()); });
document.querySelectorAll("#starters .chip").forEach((chip) => chip.addEventListener("click", () => { add("user", chip.textContent); ask(newSeed()); }));
$("regenerate").addEventListener("click", () => { forgetAnswer(); ask(newSeed()); });
$("copy").addEventListener("click", () => copy(messages.at(-1).content));
$("new").addEventListener("click", begin);
$("adapter").addEventListener("change", () => { begin(); sayTurns(); });

function begin() {
  answering.stop();
  answering.alert("");
  messages = [];
  bubbles.forEach((bubble) => bubble.remove());
  bubbles = [];
  $("tools").hidden = $("forgotten").hidden = true;
  $("starters").hidden = $("adapter").value !== "chat";
  $("message").focus();
}

// A message follows one that got no answer, or half of one: the dialogue goes on with what there is.
function settle() {
  answering.stop();
  if (messages.at(-1)?.role !== "user") return;
  const half = bubbles.at(-1).classList.contains("assistant") ? bubbles.at(-1).textContent : "";
  messages.push({ role: "assistant", content: half || "…" });
}

function add(role, text) {
  $("starters").hidden = true;
  if (role === "user") messages.push({ role, content: text });
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
  const thinking = $("think").checked && thinkers.has($("adapter").value);
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
  $("tools").hidden = false;
}

function sayTurns() {
  $("no-turns").hidden = turns.get($("adapter").value) !== false;
  $("thinking").hidden = !thinkers.has($("adapter").value);
}

onStatus((status) => {
  const chosen = $("adapter").value, known = turns.size;
  for (const adapter of status.adapters) {
    turns.set(adapter.name, adapter.has_turns);
    if (adapter.thinks) thinkers.add(adapter.name);
  }
  if (turns.size === known) return;
  $("adapter").replaceChildren(
    ...[...turns.keys()].map((name) => new Option(status.adapters.find((one) => one.name === name)?.title ?? name, name)),
    new Option("Base model, not fine-tuned", ""));
  $("adapter").value = turns.has(chosen) ? chosen : turns.keys().next().value;
  sayTurns();
});
