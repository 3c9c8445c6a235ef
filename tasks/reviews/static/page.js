// The page of reviews: a question, the answer as it streams, and beside it the reviews that it can be checked against.
import { $, Answering, composer, json, newSeed, scrollTo } from "../site.js";

const task = document.querySelector(".reviews").dataset.task;
const QUOTE = /(["“][^"“”\n]{4,}["”])/;
let last = null;
const answering = new Answering(() => last && ask(last.text, last.seed, last.element));

composer($("ask"), $("question"), (text) => ask(text));
document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => ask(chip.textContent)));
document.querySelectorAll(".aspect").forEach((bar) => bar.addEventListener("click", () => ask(bar.dataset.question)));

async function ask(text, seed = newSeed(), element = null) {
  if (!element) {
    element = $("exchange").content.cloneNode(true).firstElementChild;
    element.querySelector(".question").textContent = text;
    $("log").append(element);
  }
  last = { text, seed, element };
  const box = element.querySelector(".answer"), shown = element.querySelector(".text");
  let said = "";
  shown.textContent = "";
  element.querySelector(".evidence").hidden = true;
  box.setAttribute("aria-busy", "true");
  scrollTo(element, "start");
  const ended = await answering.ask({ adapter: task, fields: { question: text }, seed }, {
    part(side, data) { shown.textContent = said += data.text; },
    done() {},
  });
  box.setAttribute("aria-busy", "false");
  if (!said) shown.textContent = ended === "done" ? "(nothing)" : ended === "stopped" ? "Stopped." : "";
  if (said) await showEvidence(element, text, said);
}

async function showEvidence(element, question, answer) {
  let found;
  try { found = await json("POST", "/api/evidence", { task, question, answer }); }
  catch { return; } // the answer stands without it; the page says why it is missing
  const box = element.querySelector(".found"), shown = element.querySelector(".text");
  const known = new Map(found.quotes.map(({ quote, reviews }) => [quote, reviews]));
  shown.replaceChildren(...answer.split(QUOTE).map((piece) => {
    if (!QUOTE.test(piece)) return piece;
    const reviews = known.get(piece.slice(1, -1));
    return make(reviews?.length ? "mark" : "span", piece, reviews?.length ? "" : "unfound");
  }));
  box.replaceChildren();
  if (known.size) {
    box.append(list("", [...known].map(([quote, reviews]) => reviews.length
      ? cited(quote, `review ${reviews.join(" or ")}`) : cited(quote, "not found among the reviews’ quotes", "unfound"))));
  }
  found.aspects.forEach((aspect, place) => {
    const part = make("details", ""), quotes = [...aspect.praise.map((one) => [one, "good"]), ...aspect.criticism.map((one) => [one, "bad"])];
    part.open = place === 0;
    part.append(
      make("summary", aspect.name),
      make("p", `${aspect.mentions} of ${found.reviews} reviews name it: ${aspect.praised} praise, ${aspect.criticised} criticise`, "note"),
      list("", quotes.filter(([one]) => !known.has(one.quote)).map(([one, side]) => cited(one.quote, `review ${one.review}`, side))),
    );
    if (aspect.reviews.length) part.append(make("p", `Rows about it rest on reviews ${aspect.reviews.join(", ")}.`, "note"));
    box.append(part);
  });
  if (!known.size && !found.aspects.length) box.append(make("p", "Neither the question nor the answer names anything that the reviews speak of.", "note"));
  element.querySelector(".evidence").hidden = false;
}

function make(name, text, kind = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function list(kind, items) {
  const element = make("ul", "", kind);
  element.append(...items);
  return element;
}

function cited(quote, source, side = "") {
  const element = make("li", "", side);
  element.append(make("q", quote), " ", make("cite", source));
  return element;
}
