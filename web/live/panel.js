// The panel of a live stream: source, input and output, live settings, readouts. Knows nothing of ComfyUI: see ../live.js and page.html.
//
// new Panel(element, { settings, address, start, stop, onSettings, compact }): `address(id)` gives the websocket's URL, `start()` begins a
// run (its id comes by connect), `onSettings(values)` gets what was changed here or elsewhere.
import { Connection, LEFT } from "./connection.js";
import { Source } from "./source.js";
import { REPEAT, middle, percentile } from "./wire.js";

const STYLE = `
.slipstream-live { --ratio: 1; display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; box-sizing: border-box; font: 12px/16px sans-serif;
  color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #202020); padding: 6px; border-radius: 6px; overflow: auto; }
.slipstream-live .bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.slipstream-live button, .slipstream-live select, .slipstream-live textarea, .slipstream-live input[type=text], .slipstream-live input[type=number] {
  font: inherit; color: inherit; background: var(--comfy-input-bg, #333); border: 1px solid var(--border-color, #555); border-radius: 4px; padding: 3px 7px; }
.slipstream-live button { cursor: pointer; }
.slipstream-live .bar select { max-width: 150px; }
.slipstream-live button:disabled { opacity: 0.4; cursor: default; }
.slipstream-live button.main { background: #2a6fb0; border-color: #4aa8ff; color: #fff; }
.slipstream-live button.on { background: #a33; border-color: #f66; color: #fff; }
.slipstream-live .stage { flex: 1 1 0; min-height: 150px; display: flex; gap: 4px; justify-content: center; position: relative; background: #111; border-radius: 4px; overflow: hidden; }
.slipstream-live .stage > * { flex: 1 1 0; min-width: 0; width: 100%; height: 100%; object-fit: contain; }
/* The input is shown as the model gets it: the middle part with the proportions of the frames. */
.slipstream-live .stage .input { container-type: size; display: grid; place-items: center; }
.slipstream-live .stage .input video { width: min(100cqw, 100cqh * var(--ratio)); aspect-ratio: var(--ratio); object-fit: cover; }
.slipstream-live[data-view=output] .stage .input, .slipstream-live[data-source=pushed] .stage .input { display: none; }
.slipstream-live .hint { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center; text-align: center; padding: 16px; color: #aaa; pointer-events: none; }
.slipstream-live .hint:empty { display: none; }
.slipstream-live.running[data-view=both]:not([data-source=pushed]) .hint { left: 50%; width: 50%; box-sizing: border-box; }
.slipstream-live .says { flex: none; min-height: 16px; overflow-wrap: anywhere; user-select: text; }
.slipstream-live .says.bad { color: #f9a; }
.slipstream-live .readouts { color: #bbb; font-variant-numeric: tabular-nums; user-select: text; min-height: 32px; flex: none; }
.slipstream-live .readouts b { color: #fff; font-weight: 600; }
.slipstream-live .settings { display: grid; grid-template-columns: max-content 1fr 52px; gap: 3px 8px; align-items: center; }
.slipstream-live .settings textarea, .slipstream-live .settings .wide { grid-column: 2 / 4; width: 100%; box-sizing: border-box; resize: vertical; }
.slipstream-live .settings output { text-align: right; font-variant-numeric: tabular-nums; }
.slipstream-live .settings .off { opacity: 0.4; }
.slipstream-live details { flex: 0 1 auto; min-height: 20px; overflow-y: auto; }
.slipstream-live summary { cursor: pointer; padding: 2px 0; }
.slipstream-live code { user-select: all; background: #111; padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere; }
.slipstream-live:fullscreen { padding: 10px; }
.slipstream-live:fullscreen[data-view=output] { padding: 0; background: #000; }
.slipstream-live:fullscreen[data-view=output] > :not(.stage) { display: none; }
.slipstream-live:fullscreen[data-view=output] .stage { background: #000; border-radius: 0; }
`;
const SOURCES = { camera: "Camera", screen: "Screen", file: "Video file", pushed: "Pushed frames" };
const VIEWS = { both: "Side by side", output: "Output only" };
// name, label, kind or [least, most, step], what it does
const SETTINGS = [
  ["prompt", "Prompt", "text", "What the image shows. Faded in over the frames of Crossfade."],
  ["negative", "Negative", "text", "What to avoid; used by onetime and full guidance."],
  ["crossfade", "Crossfade", [0, 60, 1], "Frames over which a new prompt is faded in."],
  ["strength", "Strength", [0.02, 1, 0.01], "How much of a frame is repainted."],
  ["steps", "Steps", [1, 8, 1], "Denoising steps of a frame. Each after the first adds a frame of delay."],
  ["t_index_list", "Index list", "list", "In place of strength and steps: indices of the LCM grid, such as 32,45. Empty: not used."],
  ["guidance", "Guidance", ["self", "onetime", "full", "none"], "The kind of the guidance."],
  ["guidance_scale", "Scale", [1, 8, 0.05], "Of the guidance; 1 is off."],
  ["delta", "Delta", [0, 1, 0.05], "Below 1 softens self and onetime guidance."],
  ["seed", "Seed", "number", "Of the noise, which is the same for all frames."],
  ["feedback", "Feedback", [0, 0.95, 0.05], "Share of the last result in a new frame: less flicker, more trails."],
  ["motion", "Motion", [0, 1, 0.05], "How much less a fast moving frame is repainted."],
  ["similarity", "Similarity", [0.8, 1, 0.001], "Frames alike beyond this are skipped; 1 skips none."],
];
const READOUTS = {
  in: "Frames a second that reach the stream.",
  out: "Frames a second that are shown.",
  "capture to display": "The time from the camera to the screen, by the clock of this browser: half of the frames take less than p50, 95 of 100 less than p95.",
  "in the server": "The time from a frame's arrival to its result: half of the frames take less than p50, 95 of 100 less than p95.",
  dropped: "Frames that came faster than the model takes them. The newest one counts, so that the delay does not grow.",
  skipped: "Frames like the one before, which Similarity leaves out.",
  stages: "Milliseconds that each part takes for a frame. They work at the same time: the longest one decides.",
  "limited by": "What to make faster for more frames a second.",
};
const TYPING = 350; // ms without a key until a text is sent
const ANSWERED = 3000; // ms within which a stream answers a changed setting
const RECENT = 4000; // ms that delays are measured over
const CAMERA = "slipstream.camera"; // where the browser remembers the camera: its id means nothing elsewhere
const RATE = 31; // frames a second that are sent at most

export class Panel {
  connection = null;
  running = false;
  delays = []; // [time shown, delay]
  times = []; // when frames were sent
  shown = 0;
  sent = {}; // settings that the stream has not answered yet
  pending = {}; // settings that were changed while no stream could take them: the next hello sends them
  joined = false; // whether the stream has said hello

  constructor(root, options) {
    Object.assign(this, { root, options, settings: { ...options.settings }, controls: {}, timers: {} });
    root.classList.add("slipstream-live");
    this.build();
    this.source = new Source(this.video, (captured) => this.captured(captured));
    this.grabber = document.createElement("canvas");
    this.camera = localStorage.getItem(CAMERA) ?? "";
    this.listing = () => this.listCameras();
    navigator.mediaDevices?.addEventListener("devicechange", this.listing);
    this.setView("both");
    this.setSource("camera");
    this.state();
  }

  // -- parts

  build() {
    const make = (tag, props = {}, ...children) => {
      const element = Object.assign(document.createElement(tag), props);
      element.append(...children);
      return element;
    };
    const choice = (name, entries, change) => {
      const select = make("select", { title: name, onchange: () => change(select.value) });
      select.dataset.act = name;
      for (const [value, text] of Object.entries(entries)) select.append(make("option", { value, textContent: text }));
      return select;
    };
    const button = (name, text, title, click) => {
      const element = make("button", { type: "button", textContent: text, title, onclick: click });
      element.dataset.act = name;
      return element;
    };
    this.startButton = button("start", "Start", "Open the source and run", () => this.start());
    this.startButton.className = "main";
    this.stopButton = button("stop", "Stop", "End the stream; the last frames are kept", () => this.stop());
    this.sourceSelect = choice("source", SOURCES, (value) => this.setSource(value));
    this.cameraSelect = choice("camera", {}, (value) => this.setCamera(value));
    this.cameraSelect.title = "Which camera; this browser remembers it";
    this.viewSelect = choice("view", VIEWS, (value) => this.setView(value));
    this.fileInput = make("input", { type: "file", accept: "video/*", hidden: true, onchange: () => this.fileChosen() });
    this.fileButton = button("file", "Choose file", "A video of this computer; it is not uploaded, only its frames are", () => this.fileInput.click());
    this.recordButton = button("record", "Record", "Record the output; the video is saved by the browser", () => this.record());
    const full = button("full", "Full screen", "Show the panel on the whole screen; with Output only, the output alone. Esc ends it", () => this.fullScreen());
    const bar = make("div", { className: "bar" });
    bar.append(this.startButton, this.stopButton, this.sourceSelect, this.cameraSelect, this.fileButton, this.fileInput, this.viewSelect, full, this.recordButton);
    this.video = make("video");
    this.canvas = make("canvas", { className: "output", width: 512, height: 512 });
    this.hint = make("div", { className: "hint" });
    const stage = make("div", { className: "stage" }, make("div", { className: "input" }, this.video), this.canvas, this.hint);
    this.says = make("div", { className: "says" });
    this.says.setAttribute("role", "status");
    this.readouts = make("div", { className: "readouts" });
    this.grid = make("div", { className: "settings" });
    for (const [name, label, kind, tip] of SETTINGS) this.addSetting(make, name, label, kind, tip);
    const folded = make("details", { open: !this.options.compact }, make("summary", { textContent: "Live settings" }), this.grid);
    this.root.append(make("style", { textContent: STYLE }), bar, stage, this.says, this.readouts, folded);
    // The graph must not move while somebody works here.
    for (const name of ["pointerdown", "wheel", "keydown", "dblclick"]) this.root.addEventListener(name, (e) => e.stopPropagation());
  }

  addSetting(make, name, label, kind, tip) {
    const title = make("label", { textContent: label, title: tip });
    const output = make("output");
    let input;
    if (kind === "text") input = make("textarea", { rows: 2, title: tip, oninput: () => this.typed(name) });
    else if (kind === "list") input = make("input", { type: "text", className: "wide", title: tip, oninput: () => this.typed(name) });
    else if (kind === "number") input = make("input", { type: "number", className: "wide", min: 0, step: 1, title: tip, onchange: () => this.change(name) });
    else if (typeof kind[0] === "string") {
      input = make("select", { className: "wide", title: tip, onchange: () => this.change(name) });
      for (const value of kind) input.append(make("option", { value, textContent: value }));
    } else {
      const [min, max, step] = kind;
      input = make("input", { type: "range", min, max, step, title: tip, oninput: () => this.change(name) });
    }
    input.dataset.setting = name;
    input.setAttribute("aria-label", label);
    input.onblur = () => this.show(name); // what was refused
    title.append(" ");
    this.grid.append(title, input);
    if (input.type === "range") this.grid.append(output);
    this.controls[name] = { input, output, title };
    this.show(name);
  }

  // -- settings

  show(name) {
    if (this.timers[name]) return; // still typed
    const { input, output, title } = this.controls[name];
    const value = this.settings[name];
    const text = Array.isArray(value) ? value.join(",") : String(value ?? "");
    if (document.activeElement !== input || input.type === "range") if (input.value !== text) input.value = text;
    output.value = text;
    const why = this.without?.[name];
    input.disabled = Boolean(why);
    for (const part of [input, title]) part.classList.toggle("off", Boolean(why));
    if (why) title.title = input.title = why;
  }

  /** Take settings over that were changed elsewhere: typed into the node, or sent by the stream. */
  setSettings(settings) {
    for (const [name, value] of Object.entries(settings)) {
      if (!(name in this.controls) || this.timers[name]) continue;
      this.settings[name] = value;
      this.show(name);
    }
  }

  typed(name) {
    clearTimeout(this.timers[name]);
    this.timers[name] = setTimeout(() => this.change(name), TYPING);
  }

  change(name) {
    const { input } = this.controls[name];
    clearTimeout(this.timers[name]);
    delete this.timers[name];
    const numeric = input.type === "range" || input.type === "number";
    this.put({ [name]: numeric ? Number(input.value) : input.value });
    this.show(name);
  }

  /** Change settings as if by hand. */
  put(values) {
    Object.assign(this.settings, values);
    if (!this.joined) this.options.onSettings?.(values); // else the stream's answer is written, and what it refuses is not
    this.send(values);
  }

  /** Send changed settings, and remember them until the stream has them: what it says before is older. */
  send(values) {
    if (!this.joined || !this.connection?.ready) return Object.assign(this.pending, values);
    for (const [name, value] of Object.entries(values)) this.sent[name] = { text: String(value), at: performance.now() };
    this.connection.send({ type: "set", ...values });
  }

  isOlder(name, value) {
    const mine = this.sent[name];
    if (!mine) return false;
    if (mine.text === String(value) || performance.now() - mine.at > ANSWERED) delete this.sent[name];
    return name in this.sent;
  }

  // -- source and run

  setSource(kind) {
    if (this.source?.opened && this.source.kind !== kind) this.source.close();
    this.sourceSelect.value = kind;
    this.kind = this.root.dataset.source = kind;
    this.fileButton.hidden = kind !== "file";
    this.listCameras();
    this.options.onPanel?.({ source: kind });
    if (this.connection) {
      this.connection.view = kind === "pushed";
      if (kind === "pushed" || !this.producer) this.connection.send({ type: kind === "pushed" ? "view" : "produce" });
      if (kind === "pushed") this.producer = false; // now, not with the answer: the camera may be chosen again before it
    }
    if (this.running && kind !== "pushed") this.openSource();
    this.state();
  }

  setCamera(id) {
    this.camera = id;
    localStorage.setItem(CAMERA, id);
    if (this.source.opened) this.openSource();
  }

  /** Show the cameras where there is a choice. */
  async listCameras() {
    const cameras = this.kind === "camera" ? await this.source.cameras() : [];
    this.cameraSelect.replaceChildren(...cameras.map(([id, name]) => new Option(name, id)));
    this.cameraSelect.hidden = cameras.length < 2;
    const open = this.source.camera || this.camera;
    if (cameras.some(([id]) => id === open)) this.cameraSelect.value = open;
  }

  setView(view) {
    this.viewSelect.value = this.root.dataset.view = this.view = view;
    this.options.onPanel?.({ view });
  }

  fileChosen() {
    const file = this.fileInput.files[0];
    this.fileButton.textContent = file ? file.name.slice(0, 24) : "Choose file";
    if (this.running && file) this.openSource();
  }

  async openSource() {
    this.opening = true;
    try {
      const open = () => this.source.open(this.kind, this.fileInput.files[0], this.camera);
      await open();
      // Closed meanwhile: this page was told that another one sends, and then that it does.
      if (!this.source.opened && this.kind === "camera" && this.producer) await open();
      await this.listCameras();
      if (this.producer) this.say(this.note);
      return true;
    } catch (error) {
      this.say(error.message, true);
      return false;
    } finally {
      this.opening = false;
    }
  }

  async start() {
    if (this.running) return;
    this.say("");
    if (this.kind !== "pushed" && !(await this.openSource())) return;
    this.running = true;
    this.state();
    try {
      await this.options.start();
    } catch (error) {
      this.ended(error.message);
    }
  }

  stop() {
    if (this.connection && !this.connection.ended) this.connection.send({ type: "stop" });
    else this.ended("Stopped.");
    this.options.stop?.();
  }

  /** Join the stream of a run; one that is no longer wanted, as Stop was pressed before it began, is ended. */
  connect(id, unwanted = false) {
    this.connection?.close();
    this.id = id;
    this.running = true;
    [this.delays, this.times, this.shown, this.joined] = [[], [], 0, false];
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    const on = {
      open: () => (unwanted ? connection.send({ type: "stop" }) : this.say("")),
      text: (message) => this.told(message),
      result: (result) => this.result(result),
      closed: (reason) => connection === this.connection && this.ended(reason),
    };
    const connection = new Connection(this.options.address(id), on, this.kind === "pushed");
    this.connection = connection;
    this.state();
  }

  ended(reason, bad = !/^(Stopped|Left|There is no such)/.test(reason)) {
    this.running = false;
    this.connection = null;
    this.producer = this.joined = false;
    this.source.close();
    this.stopRecording();
    this.say(reason, bad);
    if (reason !== LEFT) this.options.onEnd?.(reason); // a stream that was left may be taken up again
    this.state();
  }

  told(message) {
    if (message.type === "hello") this.hello(message);
    else if (message.type === "role") this.role(message.producer);
    else if (message.type === "settings") this.changed(message.settings);
    else if (message.type === "statistics") this.report(message);
    else if (message.type === "refused") this.refused(message);
    else if (message.type === "warning") this.say(message.reason, true);
    else if (message.type === "note") this.say(message.reason);
    else if (message.type === "lost") this.lost(message.seconds);
    else if (message.type === "paused") this.paused();
  }

  lost(seconds) {
    this.joined = false;
    this.say(`The connection is lost; next try in ${seconds} s.`, true);
  }

  paused() {
    if (this.kind !== "pushed" && !this.producer) this.connection.send({ type: "produce" });
    if (this.kind !== "pushed") return;
    this.state();
    this.says.prepend("No program sends frames any more. ");
  }

  refused({ kind, reason }) {
    if (kind === "setting") this.sent = {}; // the settings that follow hold
    this.say(reason, true);
    this.answered = kind === "setting";
  }

  hello({ settings, size, note, without }) {
    this.without = without;
    [this.grabber.width, this.grabber.height] = size;
    this.root.style.setProperty("--ratio", size[0] / size[1]);
    [this.note, this.joined, this.answered] = [note, true, false];
    const own = Object.entries(this.pending).filter(([name]) => !(name in without));
    this.pending = {};
    if (own.length) this.send(Object.fromEntries(own));
    this.changed(settings);
    this.say(note);
  }

  changed(settings) {
    // What was wrong with the settings before is no longer true, unless it is the reason why these ones follow.
    if (!this.answered && this.says.classList.contains("bad")) this.say(this.note);
    this.answered = false;
    const usable = Object.fromEntries(Object.entries(settings).filter(([name, value]) => !(name in (this.without ?? {})) && !this.isOlder(name, value)));
    this.setSettings(usable);
    for (const name of Object.keys(this.without ?? {})) if (name in this.controls) this.show(name);
    this.options.onSettings?.(usable);
  }

  role(producer) {
    this.producer = producer;
    if (producer && this.kind !== "pushed" && !this.source.opened && !this.opening) {
      // A screen or a file can be chosen by hand only.
      if (this.kind === "camera") this.openSource();
      else this.say(this.kind === "file" ? "Choose a video file." : "Press Stop, then Start to choose the screen.", true);
    }
    if (!producer && this.kind === "camera") this.source.close(); // it is opened again when this page is to send
    if (!producer && this.kind !== "pushed") this.say("Another page or program sends the frames; this one shows them.");
    this.state();
  }

  // -- frames up

  captured(captured) {
    const now = performance.now();
    const connection = this.connection;
    if (!connection || !this.producer || this.kind === "pushed" || this.grabbing) return;
    if (now - (this.grabbed ?? 0) < 1000 / RATE - 4 || !connection.free) return;
    this.grabbed = now;
    this.grabbing = true;
    const { video, grabber } = this;
    const part = middle(video.videoWidth, video.videoHeight, grabber.width, grabber.height);
    grabber.getContext("2d").drawImage(video, ...part, 0, 0, grabber.width, grabber.height);
    grabber.toBlob(
      async (blob) => {
        try {
          if (blob) connection.sendFrame(captured, await blob.arrayBuffer());
          this.times.push(now);
        } finally {
          this.grabbing = false;
        }
      },
      "image/jpeg",
      0.85,
    );
  }

  // -- frames down

  async result(result) {
    // The newest wins; one that repeats an image does not take the place of that image.
    const repeats = result.kind === REPEAT && this.waiting;
    this.waiting = repeats ? { ...this.waiting, captured: result.captured } : result;
    if (this.drawing) return;
    this.drawing = true;
    while (this.waiting) {
      const next = this.waiting;
      this.waiting = null;
      try {
        await this.draw(next);
      } catch {
        this.say("A frame that came back could not be shown.", true);
      }
    }
    this.drawing = false;
  }

  async draw({ kind, captured, body }) {
    if (kind !== REPEAT) {
      const image = await createImageBitmap(new Blob([body], { type: "image/jpeg" }));
      const { canvas } = this;
      if (canvas.width !== image.width || canvas.height !== image.height) [canvas.width, canvas.height] = [image.width, image.height];
      canvas.getContext("2d").drawImage(image, 0, 0);
      image.close();
    }
    this.shown += 1;
    this.hint.textContent = "";
    const now = performance.now();
    // A pushed frame has the clock of another program.
    if (this.producer && this.kind !== "pushed") this.delays.push([now, now - captured]);
    this.options.onShown?.(this.shown);
  }

  // -- readouts

  report(s) {
    const now = performance.now();
    this.delays = this.delays.filter(([at]) => now - at < RECENT);
    this.times = this.times.filter((at) => now - at < RECENT);
    const delays = this.delays.map(([, delay]) => delay);
    const ms = (value) => (value === null ? "-" : `${Math.round(value)} ms`);
    const stages = ["encode", "denoise", "decode", "publish"].map((name) => `${name} ${s[`${name}_ms`] ? s[`${name}_ms`].toFixed(1) : "-"}`);
    const where = delays.length ? "capture to display" : "in the server";
    const p = (percent) => (delays.length ? percentile(delays, percent) : s[`latency_p${percent}_ms`] || null);
    this.last = { ...s, p50: percentile(delays, 50), p95: percentile(delays, 95) };
    const lines = [
      [["in", `${s.fps_in.toFixed(1)} fps`], ["out", `${s.fps_out.toFixed(1)} fps`], [where, `p50 ${ms(p(50))}, p95 ${ms(p(95))}`]],
      [["dropped", s.dropped + (this.connection?.left ?? 0)], ["skipped", s.skipped], ["stages", `${stages.join(" + ")} ms`]],
      [["limited by", s.limit || "nothing: no frame comes"]],
    ];
    this.readouts.replaceChildren(
      ...lines.map((parts) => {
        const line = document.createElement("div");
        parts.forEach(([name, value], i) => {
          const [part, strong] = [document.createElement("span"), document.createElement("b")];
          [strong.textContent, part.title] = [value, READOUTS[name]];
          part.append(`${name} `, strong);
          line.append(i ? " · " : "", part);
        });
        return line;
      }),
    );
  }

  say(text, bad = false) {
    this.says.textContent = text;
    this.says.classList.toggle("bad", bad);
  }

  state() {
    const pushed = this.kind === "pushed";
    this.root.classList.toggle("running", this.running);
    this.startButton.disabled = this.running;
    this.stopButton.disabled = !this.running;
    this.recordButton.disabled = !this.running && !this.recorder;
    if (!this.running && !this.shown) this.hint.textContent = pushed ? "Press Start, then push frames." : "Choose a source and press Start.";
    else if (this.running && !this.shown) this.hint.textContent = this.connection ? "Waiting for the first frame." : "Starting: the model is loading, or other runs come first.";
    if (pushed && this.connection) {
      const code = document.createElement("code");
      code.textContent = `slipstream push --host ${this.options.address(this.id).replace(/^ws/, "http")} --input clip.mp4 --output out.mp4`;
      this.says.replaceChildren("Push frames with: ", code);
      this.says.classList.remove("bad");
    }
  }

  // -- record, full screen, end

  record() {
    if (this.recorder) return this.stopRecording();
    if (!window.MediaRecorder || !this.canvas.captureStream) return this.say("This browser cannot record. Use slipstream push --output.", true);
    const type = ["video/mp4;codecs=avc1", "video/webm;codecs=vp9", "video/webm"].find((t) => MediaRecorder.isTypeSupported(t));
    const parts = [];
    const recorder = new MediaRecorder(this.canvas.captureStream(30), { mimeType: type, videoBitsPerSecond: 8_000_000 });
    recorder.ondataavailable = ({ data }) => data.size && parts.push(data);
    recorder.onstop = () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(parts, { type }));
      link.download = `live.${type.includes("mp4") ? "mp4" : "webm"}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
      this.say(`Saved ${link.download}.`);
    };
    recorder.start(1000);
    this.recorder = recorder;
    this.recordButton.textContent = "Stop recording";
    this.recordButton.classList.add("on");
  }

  stopRecording() {
    this.recorder?.stop();
    this.recorder = null;
    this.recordButton.textContent = "Record";
    this.recordButton.classList.remove("on");
    this.state();
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.().catch(() => this.say("The browser refused the full screen.", true));
  }

  destroy() {
    navigator.mediaDevices?.removeEventListener("devicechange", this.listing);
    this.connection?.close();
    this.source.close();
    this.recorder?.stop();
    Object.values(this.timers).forEach(clearTimeout);
  }
}
