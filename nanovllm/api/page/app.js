// Connects the parts of the page: chat, settings, charts, the server's state.

import { Chat } from "./chat.js";
import { startCharts } from "./charts.js";
import { byId, element } from "./dom.js";
import { ideas } from "./ideas.js";
import { model, state } from "./server.js";
import { Settings } from "./settings.js";
import { ChatStore } from "./storage.js";

const EVERY_MS = 2000;
const MAX_RESTORE_MS = 2000;
const MAX_IMAGE_BYTES = 10 << 20;
const STATES = {
  ready: ["ready", ""],
  draining: ["draining", "The server is starting or shutting down. Messages cannot be sent now."],
  broken: ["broken", "The server's engine has failed. Messages cannot be sent."],
  gone: ["not reachable", "The server does not respond. The page retries every two seconds."],
};

const prompt = byId("prompt");
let images = [];
let now = { state: "waiting", name: null, sees: false };

const settings = new Settings(() => { now.name = null; });
const chat = new Chat({
  settings: () => settings.read(),
  changed: showControls,
  refused: takeBack,
  store: new ChatStore(),
});

function showControls() {
  byId("stop").hidden = !chat.isBusy;
  byId("send").hidden = chat.isBusy;
  byId("send").disabled = now.state !== "ready" || !prompt.value.trim();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
  showControls();
}

function send(text) {
  if (chat.isBusy || now.state !== "ready" || !text.trim()) return;
  const attached = images;
  images = [];
  prompt.value = "";
  grow();
  showNote("");
  showImages();
  chat.send(text.trim(), attached);
}

// A turn that the server refused goes back into the box, before newer text.
function takeBack(error, { text, images: sent }) {
  images = [...sent, ...images];
  prompt.value = [text, prompt.value].filter(Boolean).join("\n\n");
  showNote(error.message);
  showImages();
  grow();
  prompt.focus();
  if (error.status === 401) settings.open(error.message);
}

function showIdeas() {
  byId("ideas").replaceChildren(...ideas(now).map(({ text, image }) => element("button", {
    type: "button", class: "idea", onclick: () => takeIdea(text, image),
  }, text)));
}

// A question about a picture needs a picture first.
function takeIdea(text, needsImage) {
  if (!needsImage || images.length) {
    send(text);
    return;
  }
  prompt.value = text;
  grow();
  prompt.focus();
  byId("files").click();
}

// --- images

function showImages() {
  byId("attached").hidden = images.length === 0;
  byId("attached").replaceChildren(...images.map((src, i) => element("li", {},
    element("img", { src, alt: `Image ${i + 1}` }),
    element("button", {
      type: "button", class: "icon", "aria-label": `Remove image ${i + 1}`,
      onclick: () => { images.splice(i, 1); showImages(); prompt.focus(); },
    }, "×"))));
  chat.follow(); // the height of the box has changed
}

async function attach(files) {
  for (const file of files) {
    if (!now.sees || !file.type.startsWith("image/")) continue;
    if (file.size > MAX_IMAGE_BYTES) {
      showNote(`${file.name} has ${(file.size / (1 << 20)).toFixed(1)} MiB: at most 10 are sent.`);
      continue;
    }
    images.push(await new Promise((resolve) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.readAsDataURL(file);
    }));
  }
  showImages();
}

function showNote(text) {
  byId("composer-note").textContent = text;
  byId("composer-note").hidden = !text;
}

// --- the state of the server

function showBanner(text) {
  byId("banner").textContent = text;
  byId("banner").hidden = !text;
}

function showState(found) {
  const [word, text] = STATES[found];
  const status = byId("status");
  if (now.state !== found) {
    status.dataset.state = found;
    status.textContent = word;
    showBanner(text);
    now.state = found;
    if (found !== "ready") now.name = null; // the server may return with another model
  }
  showControls();
}

async function look() {
  showState(await state());
  if (now.state === "ready" && now.name === null) {
    try {
      now = { ...now, ...await model() };
      byId("model").textContent = now.name;
      byId("welcome-model").textContent = now.name;
      byId("attach").hidden = !now.sees;
      showIdeas();
    } catch (error) {
      if (error.status === 401 && !byId("settings").open) settings.open(error.message);
    }
  }
  setTimeout(look, EVERY_MS);
}

// --- events

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(prompt.value); });
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("paste", (event) => { attach(event.clipboardData.files); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) chat.stop();
});
document.addEventListener("dragover", (event) => { event.preventDefault(); });
document.addEventListener("drop", (event) => { event.preventDefault(); attach(event.dataTransfer.files); });
byId("stop").addEventListener("click", () => { chat.stop(); prompt.focus(); });
byId("new-chat").addEventListener("click", () => { chat.clear(); showNote(""); prompt.focus(); });
byId("show-settings").addEventListener("click", () => settings.open());
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => { attach([...event.target.files]); event.target.value = ""; });

function showCharts(isShown) {
  document.body.classList.toggle("with-charts", isShown);
  byId("show-charts").setAttribute("aria-expanded", String(isShown));
}
byId("show-charts").addEventListener("click", () => {
  showCharts(!document.body.classList.contains("with-charts"));
});
byId("hide-charts").addEventListener("click", () => { showCharts(false); byId("show-charts").focus(); });
showCharts(matchMedia("(min-width: 60rem)").matches);

startCharts();
grow();
const late = new Promise((resolve) => { setTimeout(resolve, MAX_RESTORE_MS); });
Promise.race([chat.restore(), late]).then(look); // messages are sent only after this
prompt.focus();
