"use strict";
// Texts from the server and from people are only ever set as textContent.

const $ = (id) => document.getElementById(id);
let facts = { models: [], key: false, kept: false, cards: [], messages: 200 };
let messages = []; // of the conversation, as they are sent
let stopping = null; // aborts the reply under way

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function option(value, text) {
  const made = element("option", "", text);
  made.value = value;
  return made;
}

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function begin() {
  facts = await (await fetch("page.json")).json();
  for (const name of facts.models) $("model").append(option(name, name));
  $("model-field").hidden = facts.models.length < 2;
  $("key-field").hidden = !facts.key;
  $("consent").hidden = !facts.kept;
  for (const card of facts.cards) $("scenario").append(option(card.id, `${card.name}, ${card.age}: ${card.topic}`));
  showModel();
  reset();
  document.documentElement.dataset.ready = "";
}

function showModel() {
  $("title").textContent = $("model").value || "the model";
}

function showNotice() {
  $("notice").textContent = !facts.kept
    ? "Nothing of this conversation is kept. You talk to a machine."
    : $("keep").checked
      ? "This conversation, your ratings and your comments are kept by whoever runs this server, and may be read by people. You talk to a machine."
      : "You talk to a machine. This conversation is not kept unless you agree; without that, replies cannot be rated.";
}

function showCard() {
  const card = facts.cards.find((card) => card.id === $("scenario").value);
  $("card").hidden = !card;
  if (!card) return;
  const list = element("dl", "");
  const rows = [["Situation", card.situation], ["What happened", card.trigger], ["You hope for", card.hope], ["How you talk", card.speech]];
  for (const [name, text] of rows) list.append(element("dt", "", name), element("dd", "", text));
  $("card").replaceChildren(element("h2", "", `You are ${card.name}, ${card.age}: ${card.topic}`), list);
}

function reset() {
  stopping?.abort();
  messages = [];
  $("log").replaceChildren();
  lock(false);
  showNotice();
  showCard();
  $("text").focus();
}

function lock(locked) {
  for (const id of ["keep", "model", "scenario"]) $(id).disabled = locked;
}

function show(role, text) {
  const message = element("article", `message ${role}`);
  const said = element("p", "said", text);
  message.append(element("span", "who", role === "user" ? "You" : $("title").textContent), said);
  $("log").append(message);
  message.scrollIntoView({ block: "end" });
  return { message, said };
}

// The data of server-sent events, as they arrive.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

async function ask(said) {
  const body = { model: $("model").value, messages, stream: true, store: facts.kept && $("keep").checked };
  if ($("scenario").value) body.metadata = { scenario: $("scenario").value };
  stopping = new AbortController();
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal: stopping.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let name = "", text = "";
  for await (const data of events(response)) {
    if (data === "[DONE]") return { name, text };
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    name = chunk.id;
    text += chunk.choices[0]?.delta.content ?? "";
    said.textContent = text;
    said.scrollIntoView({ block: "end" });
  }
  throw new Error("The connection ended in the middle of the reply.");
}

async function send() {
  const text = $("text").value.trim();
  if (!text || stopping) return;
  $("text").value = "";
  lock(true);
  show("user", text);
  messages.push({ role: "user", content: text });
  const { message, said } = show("assistant", "");
  message.setAttribute("aria-busy", "true");
  $("send").hidden = true;
  $("stop").hidden = false;
  const conversation = messages;
  try {
    const reply = await ask(said);
    if (conversation !== messages) return;
    messages.push({ role: "assistant", content: reply.text });
    $("status").textContent = `Reply: ${reply.text}`;
    if (facts.kept && $("keep").checked) addTools(message, reply.name);
  } catch (error) {
    if (conversation !== messages) return;
    const stopped = error.name === "AbortError";
    const reason = stopped ? "Stopped." : `No reply: ${error.message}`;
    message.append(element("p", "problem", reason));
    $("status").textContent = reason;
    if (stopped && said.textContent) messages.push({ role: "assistant", content: said.textContent });
    else {
      messages.pop();
      $("text").value = text;
    }
  } finally {
    message.removeAttribute("aria-busy");
    stopping = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("text").focus();
  }
}

function addTools(message, reply) {
  const tools = $("reply-tools").content.firstElementChild.cloneNode(true);
  const [up, down] = tools.querySelectorAll("button");
  const form = tools.querySelector("form"), comment = form.querySelector("input"), saved = tools.querySelector(".saved");
  let rating = 0, sent = Promise.resolve();
  function rate(value) {
    rating = value;
    saved.textContent = "";
    up.setAttribute("aria-pressed", value === 1);
    down.setAttribute("aria-pressed", value === -1);
    form.hidden = value === 0;
    const body = JSON.stringify({ reply, rating, comment: value ? comment.value : "" });
    sent = sent.then(() => post(value, body)); // one after the other: the last one counts
  }
  async function post(value, body) {
    try {
      const response = await fetch("v1/feedback", { method: "POST", headers: headers(), body });
      saved.textContent = response.ok ? (value ? "Saved." : "Taken back.") : (await response.json()).error.message;
    } catch (error) {
      saved.textContent = `Not saved: ${error.message}`;
    }
  }
  up.addEventListener("click", () => rate(rating === 1 ? 0 : 1));
  down.addEventListener("click", () => rate(rating === -1 ? 0 : -1));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    rate(rating);
  });
  message.append(tools);
  message.scrollIntoView({ block: "end" });
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => stopping?.abort());
$("again").addEventListener("click", reset);
$("model").addEventListener("change", showModel);
$("scenario").addEventListener("change", showCard);
$("keep").addEventListener("change", showNotice);
begin();
