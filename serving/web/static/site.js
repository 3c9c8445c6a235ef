// What all pages share: the status of the model, the theme, small messages, and answers that stream in.
// Text of models and visitors enters the page as textContent alone; the site's policy forbids anything else.

export const $ = (id) => document.getElementById(id);
export const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

// --- small messages ---

let toastTimer;
export function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("shown"), 3500);
}

export async function copy(text, said = "Copied") {
  try {
    await navigator.clipboard.writeText(text);
    toast(said);
  } catch {
    prompt("Copy this:", text); // no clipboard without https
  }
}

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // below 2**31

// --- requests ---

export class Refused extends Error {} // its message is for the visitor

const REACH = "The site cannot be reached. Are you online? What you typed is kept.";

export async function request(method, path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method, signal,
      ...(body === undefined ? {} : { headers: { "content-type": "application/json" }, body: JSON.stringify(body) }),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(REACH);
  }
  if (response.status === 401) location.reload(); // the sign-in has ended
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Refused(typeof said.detail === "string" ? said.detail : `The site could not do this (${response.status}).`);
  }
  return response;
}

export const json = async (method, path, body) => {
  const response = await request(method, path, body);
  return response.status === 204 ? null : response.json();
};

async function* eventsOf(response) {
  let rest = "";
  for await (const text of chunksOf(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const value = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length)).join("\n");
      const data = value("data: ");
      if (data) yield [value("event: "), JSON.parse(data)];
    }
  }
}

async function* chunksOf(stream) { // Safari's streams cannot be iterated
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// --- an answer on its way: the buttons, the alert, the spoken words around it ---

export class Answering {
  // again: what "Try again" does
  constructor(again) {
    $("alert").querySelector(".retry").addEventListener("click", again);
    $("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
  }

  stop() { this.controller?.abort(); }

  get running() { return Boolean(this.controller); }

  // part(side, data), thought(…), choice(…), dropped(…), done(…), see answers.py; returns "done", "stopped" or "failed".
  // Another answer on its way is stopped first.
  async ask(question, { part, thought, choice, dropped, done }) {
    this.stop();
    const controller = (this.controller = new AbortController());
    this.#show(true);
    this.alert("");
    $("announce").textContent = "Writing…";
    const open = new Set(question.compare ? ["after", "before"] : ["after"]);
    let failed = "";
    try {
      const response = await request("POST", "/api/answer", question, controller.signal);
      for await (const [event, data] of eventsOf(response)) {
        if (event === "waiting") this.waiting(data.seconds, data.ahead);
        if (event === "part") this.waiting(0), part(data.side, data);
        if (event === "thought") this.waiting(0), thought?.(data.side, data);
        if (event === "choice") choice(data.side, data);
        if (event === "dropped") dropped(data.side, data);
        if (event === "done") open.delete(data.side), done(data.side, data);
        if (event === "error") open.delete(data.side), (failed ||= data.message);
      }
      if (open.size && !failed) failed = "The answer broke off. What you typed is kept; try again.";
    } catch (error) {
      if (controller.signal.aborted) {
        if (this.controller === controller) $("announce").textContent = "Stopped.";
      } else failed = error instanceof Refused ? error.message : "The answer broke off. What you typed is kept; try again.";
    }
    if (this.controller === controller) {
      this.controller = null;
      this.#show(false);
      this.waiting(0);
      this.alert(failed);
      if (!failed && !controller.signal.aborted) $("announce").textContent = "Done.";
    }
    return failed ? "failed" : controller.signal.aborted ? "stopped" : "done";
  }

  alert(text) {
    $("alert").querySelector("span").textContent = text;
    $("alert").hidden = !text;
    if (text) $("announce").textContent = "", checkStatus();
  }

  // ahead: questions that others asked before and that are not answered yet either
  waiting(seconds, ahead = 0) {
    document.body.classList.toggle("waiting", seconds > 0);
    if (!seconds) return;
    const words = ahead ? `${ahead} ${ahead === 1 ? "question is" : "questions are"} before yours… ` : "The model is taking its time… ";
    document.body.style.setProperty("--waiting", JSON.stringify(words));
    if ($("announce").textContent !== words) $("announce").textContent = words;
  }

  #show(running) {
    const [shown, other] = running ? ["stop", "go"] : ["go", "stop"], focused = document.activeElement === $(other);
    $("stop").hidden = !running;
    $("go").hidden = running && $("go").classList.contains("round");
    if (focused && $(other).hidden) $(shown).focus(); // the focus does not fall to the page with a button that goes
    document.body.classList.toggle("writing", running);
  }
}

// --- growing text fields; Enter sends, Shift+Enter is a new line ---

export function composer(form, field, send) {
  const fit = () => { field.style.height = "auto"; field.style.height = `${Math.min(field.scrollHeight + 2, 180)}px`; };
  field.addEventListener("input", fit);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text) return field.focus();
    field.value = "";
    fit();
    send(text);
  });
}

export const still = matchMedia("(prefers-reduced-motion: reduce)");
export const scrollTo = (element, block = "nearest") =>
  element.scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block });

// --- the model's status, in the header and to whoever listens ---

const listeners = [];
let status = null, timer;
export function onStatus(listener) { listeners.push(listener); if (status) listener(status); }

async function checkStatus() {
  clearTimeout(timer);
  try {
    const response = await fetch("/api/status");
    status = response.ok ? await response.json() : { ready: false, adapters: [] };
  } catch { status = { ready: false, adapters: [], offline: true }; }
  const element = $("status");
  element.hidden = false;
  element.dataset.state = status.ready ? "ready" : "away";
  const words = status.ready ? "Model ready" : status.offline ? "Site out of reach" : "Model away";
  if (element.querySelector(".words").textContent !== words) element.querySelector(".words").textContent = words;
  listeners.forEach((listener) => listener(status));
  timer = setTimeout(() => document.hidden || checkStatus(), status.ready ? 20000 : 3000);
}
document.addEventListener("visibilitychange", () => document.hidden || checkStatus());
if (document.querySelector("main").dataset.page !== "sign_in") checkStatus();
else document.forms[0].action += location.hash; // what a shared link says goes on to the page that asked for the password

onStatus(({ ready, adapters }) => {
  const notice = $("not-served");
  if (notice) notice.hidden = !ready || adapters.some(({ name }) => name === notice.dataset.task);
});

$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = (root.dataset.theme ?? (dark() ? "dark" : "light")) === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* for this page alone */ }
});
