// What the live panel does with Chromium's fake camera and a stream of a toy model whose prompt is a brightness; see test_live.py.
import { Panel } from "../../web/live/panel.js";
import { Source } from "../../web/live/source.js";
import { middle, pack, percentile, unpack } from "../../web/live/wire.js";

const results = [];
const cases = await (await fetch("/cases.json")).json();
const hex = (bytes) => [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
const equal = (a, b) => {
  if (JSON.stringify(a) !== JSON.stringify(b)) throw new Error(`got ${JSON.stringify(a)}, expected ${JSON.stringify(b)}`);
};
const truth = (value, what) => {
  if (!value) throw new Error(what);
};
async function until(condition, what, seconds = 15) {
  const end = performance.now() + 1000 * seconds;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`waited in vain: ${what}`);
    await new Promise((done) => setTimeout(done, 20));
  }
}
async function check(name, run) {
  try {
    await run();
    results.push([name, ""]);
  } catch (error) {
    results.push([name, `${error}\n${error.stack}`]);
  }
}
const written = [];
function panelIn(id) {
  const panel = new Panel(document.getElementById(id), {
    settings: {},
    address: (stream) => `${location.origin.replace(/^http/, "ws")}/slipstream/live/${stream}`,
    start: () => panel.connect(cases.id),
    onSettings: (values) => id === "one" && written.push(values),
  });
  return panel;
}
const $ = (panel, name) => panel.root.querySelector(`[data-act=${name}], [data-setting=${name}]`);
const brightness = (panel) => panel.canvas.getContext("2d").getImageData(4, 4, 1, 1).data[0];
function type(panel, name, value) {
  const input = $(panel, name);
  input.value = value;
  input.dispatchEvent(new Event("input"));
  input.dispatchEvent(new Event("change"));
}

await check("messages as Python writes them", () => {
  for (const [kind, sequence, captured, body, wanted] of cases.packed) {
    const message = pack(kind, sequence, captured, new TextEncoder().encode(body));
    equal(hex(message), wanted);
    const found = unpack(message.buffer);
    equal([found.kind, found.sequence, found.captured, new TextDecoder().decode(found.body)], [kind, sequence, captured, body]);
  }
  equal(unpack(new ArrayBuffer(23)), null);
  equal(unpack(new ArrayBuffer(30)), null);
});
await check("percentiles as Python computes them", () => {
  for (const [values, percent, wanted] of cases.percentiles) equal(percentile(values, percent), wanted);
  equal(percentile([], 50), null);
});
await check("the middle part of a frame", () => {
  equal(middle(640, 480, 128, 128), [80, 0, 480, 480]);
  equal(middle(100, 100, 200, 100), [0, 25, 100, 50]);
});

const one = panelIn("one");
await check("before the start", () => {
  equal([$(one, "start").disabled, $(one, "stop").disabled, $(one, "record").disabled], [false, true, true]);
  truth(one.hint.textContent.includes("press Start"), "no hint");
});
await check("frames of the camera are shown, with their delay", async () => {
  $(one, "start").click();
  await until(() => one.shown > 5, "frames");
  truth(one.producer, "it is the producer");
  truth(one.delays.length && one.delays.every(([, delay]) => delay > 0 && delay < 5000), `delays ${JSON.stringify(one.delays.slice(0, 5))}`);
  await until(() => /capture to display p50 \d+ ms, p95 \d+ ms/.test(one.readouts.textContent), "readouts");
  truth(one.readouts.textContent.includes("limited by"), one.readouts.textContent);
  equal([one.canvas.width, one.canvas.height], cases.size);
  truth(one.says.textContent.includes("a toy"), one.says.textContent);
});
await check("of several cameras one is chosen, and remembered", async () => {
  const select = $(one, "camera");
  const cameras = await one.source.cameras();
  truth(cameras.length >= cases.cameras, `only ${JSON.stringify(cameras)}`);
  equal([select.hidden, select.value], [cameras.length < 2, cameras.length < 2 ? select.value : one.source.camera]);
  if (cameras.length > 1) {
    const [other] = cameras.find(([id]) => id !== one.source.camera);
    type(one, "camera", other);
    await until(() => one.source.camera === other && !one.opening, "the other camera");
    const before = one.shown;
    await until(() => one.shown > before + 2, "its frames");
    equal([select.value, localStorage.getItem("slipstream.camera")], [other, other]);
  }
  await one.source.open("camera", null, "one that was taken away");
  truth(one.source.camera, "another one in its place");
  one.setSource("pushed");
  equal(select.hidden, true);
  one.setSource("camera");
  await until(() => select.hidden === cameras.length < 2 && one.producer && one.source.opened, "the choice again");
  localStorage.clear();
});
await check("a prompt fades in over the crossfade", async () => {
  const before = brightness(one);
  const seen = new Set();
  one.options.onShown = () => seen.add(brightness(one));
  type(one, "crossfade", "6");
  type(one, "prompt", "0.9");
  await until(() => brightness(one) > before + 60, "the new prompt");
  await new Promise((done) => setTimeout(done, 300));
  truth(seen.size >= 4, `only ${seen.size} brightnesses on the way`);
  one.options.onShown = null;
});
await check("settings reach the stream and the node", async () => {
  type(one, "strength", "0.25");
  await until(() => written.some((w) => w.strength === 0.25 && "seed" in w), "the answer");
  truth(written.some((w) => w.prompt === "0.9"), "the prompt is written back");
  equal($(one, "strength").parentNode.querySelectorAll("output")[1].value, "0.25");
});
await check("what is refused is said, and the setting goes back", async () => {
  type(one, "t_index_list", "9,9");
  await until(() => one.says.textContent.includes("t_index_list"), "the reason");
  truth(one.says.classList.contains("bad"), "not marked");
  await until(() => JSON.stringify(one.settings.t_index_list) === "[]", "the settings that hold");
  equal(
    written.some((w) => String(w.t_index_list) === "9,9"),
    false,
  );
  type(one, "strength", "0.3");
  await until(() => one.says.textContent === "a toy", "the reason is gone with the next setting that is taken");
  type(one, "t_index_list", "");
  type(one, "prompt", "no number");
  await until(() => one.says.textContent.includes("a number"), "the reason of the stream");
  await until(() => $(one, "prompt").value === "0.9", "the prompt before");
});
await check("what is typed is not overwritten by an older answer", async () => {
  one.put({ prompt: "0.31" });
  one.put({ prompt: "0.32" });
  one.told({ type: "settings", settings: { ...one.settings, prompt: "0.31" } });
  equal([one.settings.prompt, $(one, "prompt").value !== "0.31"], ["0.32", true]);
  await until(() => !("prompt" in one.sent), "the answer");
  one.put({ prompt: "0.9" });
  await until(() => !("prompt" in one.sent), "the answer");
});
const two = panelIn("two");
await check("a second page watches, and changes settings", async () => {
  two.setSource("camera");
  two.connect(cases.id);
  await until(() => two.shown > 2, "frames in the second");
  equal([one.producer, two.producer], [true, false]);
  truth(two.says.textContent.includes("Another page or program sends"), two.says.textContent);
  type(two, "seed", "77");
  await until(() => one.settings.seed === 77, "the seed in the first");
});
await check("pushed frames show how", async () => {
  two.setSource("pushed");
  truth(two.says.textContent.includes(`slipstream push --host ${location.origin}/slipstream/live/`), two.says.textContent);
});
await check("a program takes the place of the page that waits for pushed frames, and gives it back", async () => {
  one.setSource("pushed");
  await until(() => !one.producer, "the place is given up");
  const pushing = new WebSocket(one.options.address(cases.id));
  const told = [];
  pushing.onmessage = ({ data }) => typeof data === "string" && told.push(JSON.parse(data));
  await until(() => told.some((m) => m.type === "role"), "the role");
  truth(told.find((m) => m.type === "role").producer, "the program sends");
  one.setSource("camera");
  await until(() => one.says.textContent.includes("Another page or program sends"), one.says.textContent);
  one.setSource("pushed");
  pushing.close(1000);
  await until(() => one.says.textContent.startsWith("No program sends frames any more."), one.says.textContent);
  truth(!one.producer && !two.producer, "nobody takes the place of a program");
  one.setSource("camera");
  const before = one.shown;
  await until(() => one.producer && one.shown > before + 2, "frames of the camera again");
});
await check("what is changed while the connection is lost reaches the stream", async () => {
  await fetch("/abort", { method: "POST" });
  await until(() => one.connection?.lost, "the loss");
  type(one, "strength", "0.35");
  await until(() => one.joined && two.settings.strength === 0.35, "the setting in the other page");
  equal(one.settings.strength, 0.35);
  await until(() => one.producer, "the producer again");
});
await check("a lost connection comes back by itself", async () => {
  await fetch("/abort", { method: "POST" });
  await until(() => one.connection?.lost, "the loss");
  truth(one.says.textContent.includes("connection is lost"), one.says.textContent);
  await until(() => one.connection.ready && one.producer, "the return");
  const before = one.shown;
  await until(() => one.shown > before + 3, "frames after it");
});
await check("output only, and side by side", () => {
  type(one, "view", "output");
  equal(one.video.clientWidth, 0);
  type(one, "view", "both");
  // The input is the part that the model gets, as large as the output.
  const [width, height] = cases.size;
  truth(Math.abs(one.video.clientWidth / one.video.clientHeight - width / height) < 0.02, `${one.video.clientWidth}x${one.video.clientHeight}`);
  const scale = Math.min(one.canvas.clientWidth / width, one.canvas.clientHeight / height);
  truth(Math.abs(one.video.clientWidth - scale * width) < 2, `${one.video.clientWidth} of ${scale * width}`);
});
await check("the output is recorded", async () => {
  let saved = null;
  const click = HTMLAnchorElement.prototype.click;
  HTMLAnchorElement.prototype.click = function () {
    saved = this.download;
  };
  $(one, "record").click();
  await new Promise((done) => setTimeout(done, 400));
  $(one, "record").click();
  await until(() => saved, "a file");
  HTMLAnchorElement.prototype.click = click;
  truth(/^live\.(mp4|webm)$/.test(saved), saved);
});
await check("Stop ends it for both, with the reason", async () => {
  $(one, "stop").click();
  await until(() => !one.running && !two.running, "the end");
  equal([one.says.textContent, two.says.textContent], ["Stopped.", "Stopped."]);
  equal([one.source.opened, $(one, "start").disabled], [false, false]);
});
await check("it starts again", async () => {
  const before = one.shown;
  type(one, "strength", "0.45"); // no stream can take it yet
  $(one, "start").click();
  await until(() => one.running && one.shown > 2 && one.shown !== before, "frames again");
  await until(() => !("strength" in one.sent), "the answer");
  equal(one.settings.strength, 0.45);
});
await check("when the first page leaves, the second sends", async () => {
  two.setSource("camera");
  two.connect(cases.id);
  equal(two.canvas.getContext("2d").getImageData(4, 4, 1, 1).data[3], 0); // no image of the stream before
  await until(() => two.shown > 1, "frames in the second");
  one.destroy();
  await until(() => two.producer, "the second as producer");
  const before = two.shown;
  await until(() => two.shown > before + 2, "frames of the second");
});
await check("an error is told", async () => {
  await fetch("/fail", { method: "POST" });
  await until(() => !two.running, "the end");
  equal(two.says.textContent, "ZeroDivisionError: a worker failed");
  truth(two.says.classList.contains("bad"), "not marked");
});
await check("a stream that is gone is told", async () => {
  two.connect("gone");
  await until(() => two.says.textContent.includes("no such stream"), two.says.textContent, 10);
});
await check("a video file", async () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [64, 48];
  const parts = [];
  const recorder = new MediaRecorder(canvas.captureStream(30), { mimeType: "video/webm" });
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.start();
  for (let i = 0; i < 12; i++) {
    canvas.getContext("2d").fillStyle = i % 2 ? "red" : "blue";
    canvas.getContext("2d").fillRect(0, 0, 64, 48);
    await new Promise((done) => setTimeout(done, 40));
  }
  await new Promise((done) => ((recorder.onstop = done), recorder.stop()));
  let seen = 0;
  const source = new Source(document.createElement("video"), () => (seen += 1));
  await source.open("file", new File(parts, "clip.webm", { type: "video/webm" }));
  await until(() => seen > 3, "frames of the file");
  source.close();
  const reasons = [];
  await source.open("file", null).catch((e) => reasons.push(e.message));
  await source.open("file", new File(["no video"], "a.mp4")).catch((e) => reasons.push(e.message));
  truth(reasons.length === 2 && reasons[0].includes("Choose a video") && reasons[1].includes("cannot play"), JSON.stringify(reasons));
});
await check("a screen at rest gives its frame again", async () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [64, 48];
  canvas.getContext("2d").fillRect(0, 0, 64, 48);
  const times = [];
  const source = new Source(document.createElement("video"), (captured) => times.push(captured));
  const rest = canvas.captureStream(0); // one frame, and no other
  source.device = async () => rest;
  await source.open("screen");
  const [track] = rest.getVideoTracks();
  (track.requestFrame ? track : rest).requestFrame(); // Firefox asks the stream
  await until(() => times.length > 4, "frames at rest");
  const count = times.length;
  source.close();
  await new Promise((done) => setTimeout(done, 500));
  equal(times.length, count);
  truth(
    times.slice(2).every((time, i) => time - times[i + 1] > 150),
    JSON.stringify(times),
  );
});
await check("a camera that is refused is said", async () => {
  const ask = navigator.mediaDevices.getUserMedia;
  navigator.mediaDevices.getUserMedia = () => Promise.reject(Object.assign(new Error("no"), { name: "NotAllowedError" }));
  two.setSource("camera");
  $(two, "start").click();
  await until(() => two.says.textContent.includes("refused it"), two.says.textContent);
  equal(two.running, false);
  navigator.mediaDevices.getUserMedia = ask;
});
two.destroy();
await fetch("/results", { method: "POST", body: JSON.stringify(results) });
