const find = selector => document.querySelector(selector);
const pause = seconds => new Promise(resolve => setTimeout(resolve, seconds * 1000));
const about = await (await fetch("/about")).json();
const list = [];

// What the program answers; an error's message is what it says is wrong.
async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The connection has broken off. Is the program still running?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ error: `The program has failed (status ${answer.status}).` }));
  throw Object.assign(new Error(told.error), { busy: answer.status === 503 });
}

class Photograph {
  constructor(file) {
    this.file = file;
    this.stop = new AbortController();
    this.element = find("#photograph").content.firstElementChild.cloneNode(true);
    this.at("h2").textContent = file.name;
    this.at(".remove").onclick = () => this.remove();
    this.say("waiting", 0, 1);
    find("#photographs").append(this.element);
  }

  at(selector) {
    return this.element.querySelector(selector);
  }

  say(text, done, of) {
    this.at(".status").textContent = text;
    const bar = this.at("progress");
    if (of) [bar.max, bar.value] = [of, done];
    else bar.removeAttribute("value");
  }

  end(text, failed) {
    this.say(text);
    this.at("progress").hidden = true;
    this.element.classList.toggle("failed", Boolean(failed));
  }

  // From the file to the result; nothing is thrown.
  async separate() {
    this.weights = find("#weights").value;
    try {
      if (this.file.size > about.megabytes * 2 ** 20) throw new Error(`Larger than ${about.megabytes} megabytes.`);
      this.token = await this.send();
      const result = await this.wait();
      if (result.state !== "done") throw new Error(result.error);
      this.show(result);
    } catch (error) {
      if (!this.stop.signal.aborted) this.end(error.message, true);
    }
    if (this.stop.signal.aborted) this.forget();
  }

  async send() {
    const address = `/separate?weights=${encodeURIComponent(this.weights)}`;
    const headers = { "Content-Type": "application/octet-stream" };
    for (;;) {
      this.say("sending");
      try {
        const answer = await ask(address, { method: "POST", body: this.file, headers, signal: this.stop.signal });
        return (await answer.json()).token;
      } catch (error) {
        if (!error.busy) throw error;
        this.say("The program is busy with other photographs; this one waits for a place.");
        await pause(3);
      }
    }
  }

  async wait() {
    for (;;) {
      const result = await (await ask(`/result/${this.token}`, { signal: this.stop.signal })).json();
      if (result.state === "done" || result.state === "failed") return result;
      if (result.state === "waiting") this.say(`waiting, ${result.ahead} before it`, 0, 1);
      else if (result.tiles > 1) this.say(`tile ${result.tile + 1} of ${result.tiles}`, result.tile, result.tiles);
      else this.say("separating");
      await pause(0.5);
    }
  }

  show({ width, height, seconds, notes }) {
    const by = about.weights.length > 1 ? `, with ${this.weights}` : "";
    this.end(`${width} × ${height} pixels in ${seconds.toFixed(1)} s${by}`);
    const stage = this.at(".stage");
    stage.style.aspectRatio = `${width} / ${height}`;
    stage.style.maxWidth = `min(75vh * ${width / height}, max(${2 * width}px, 16rem))`; // not blown up without measure
    for (const name of ["before", "transmission", "reflection"]) {
      this.at(`img.${name}`).src = `/result/${this.token}/${name}.jpg`;
    }
    const wipe = this.at(".wipe"), strength = this.at(".strength input");
    wipe.oninput = () => this.wipe(wipe.value / 10);
    strength.oninput = () => this.weaken(Number(strength.value));
    strength.value = Math.round(100 * about.strength);
    for (const button of this.element.querySelectorAll(".layers button")) button.onclick = () => this.choose(button);
    for (const button of this.element.querySelectorAll(".save")) {
      button.onclick = () => this.download(button.dataset.layer).catch(error => this.end(error.message, true));
    }
    this.at(".again").hidden = about.weights.length < 2;
    this.at(".again").onclick = () => add([this.file]);
    this.at(".notes").append(...notes.map(note => Object.assign(document.createElement("li"), { textContent: note })));
    this.wipe(50);
    this.weaken(Number(strength.value));
    this.at(".result").hidden = false;
    this.done = true;
  }

  wipe(percent) {
    this.at(".after").style.clipPath = `inset(0 0 0 ${percent}%)`;
    this.at(".handle").style.left = `${percent}%`;
  }

  // I + S (T - I): the transmission, of opacity S, over the photograph.
  weaken(percent) {
    this.strength = percent / 100;
    this.at("img.transmission").style.opacity = this.strength;
    this.at(".strength output").textContent = `${percent} %`;
  }

  choose(chosen) {
    const reflection = chosen.dataset.layer === "reflection";
    for (const button of this.element.querySelectorAll(".layers button")) button.ariaPressed = button === chosen;
    this.at("img.reflection").hidden = !reflection;
    this.at("img.transmission").hidden = reflection;
    this.at(".strength").hidden = reflection;
    this.at(".tag.right").textContent = reflection ? "reflection" : "behind the glass";
  }

  async download(layer) {
    await ask(`/result/${this.token}`); // is it still there?
    const weaker = layer === "transmission" && this.strength < 1;
    const link = document.createElement("a");
    link.href = `/result/${this.token}/${layer}.png${weaker ? `?strength=${this.strength}` : ""}`;
    const stem = this.file.name.replace(/\.[^.]*$/, "");
    const ending = layer === "reflection" ? "reflection" : "behind-the-glass";
    link.download = `${stem}-${ending}${weaker ? `-${Math.round(100 * this.strength)}` : ""}.png`;
    link.click();
  }

  forget() {
    if (this.token) fetch(`/result/${this.token}`, { method: "DELETE", keepalive: true }).catch(() => {});
    this.token = undefined;
  }

  remove() {
    this.stop.abort();
    this.forget();
    this.element.remove();
    list.splice(list.indexOf(this), 1);
    count();
  }
}

// One photograph of a page at a time, so that others get their turns.
let running = false;
async function run() {
  if (running) return;
  running = true;
  for (let next; (next = list.find(photograph => !photograph.begun)); count()) {
    next.begun = true;
    await next.separate();
  }
  running = false;
}

function add(files) {
  find("#trouble").textContent = files.length ? "" : "Drop files here: photographs. Addresses are not fetched.";
  list.push(...[...files].map(file => new Photograph(file)));
  run();
}

function count() {
  find("#all").hidden = list.filter(photograph => photograph.done).length < 2;
}

find("#limits").textContent = `up to ${about.megabytes} megabytes and ${about.megapixels} megapixels each`;
find("#weights").append(...about.weights.map(name => new Option(name, name, false, name === about.chosen)));
find("#choice").hidden = about.weights.length < 2;
find("#examples").hidden = !about.examples.length;
for (const name of about.examples) {
  const button = document.createElement("button"), image = document.createElement("img");
  const kind = name.replace(/^example_\d+_|\.jpg$/g, "").replaceAll("_", " ");
  Object.assign(image, { src: `/${name}`, alt: "" });
  button.append(image, kind);
  button.onclick = async () => add([new File([await (await ask(`/${name}`)).blob()], name)]);
  find("#examples").append(button);
}
find("#files").onchange = event => {
  add(event.target.files);
  event.target.value = "";
};
find("#all").onclick = async () => {
  for (const photograph of list.filter(photograph => photograph.done)) {
    await photograph.download("transmission").catch(error => photograph.end(error.message, true));
    await pause(0.5);
  }
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", event => event.clipboardData.files.length && add(event.clipboardData.files));
addEventListener("pagehide", event => {
  if (!event.persisted) for (const photograph of list) photograph.forget();
});
