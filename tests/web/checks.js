// Checks of the canvas in a page without a host. Results: [[name, what is wrong, or ""]] sent to /results.
import { Editor } from "/web/canvas/editor.js";
import * as g from "/web/canvas/geometry.js";
import { maskOf } from "/web/canvas/painter.js";

const results = [];
const show = (value) => JSON.stringify(value);
function equal(found, wanted, what = "") {
  if (show(found) !== show(wanted)) throw new Error(`${what} ${show(found)} instead of ${show(wanted)}`);
}
function near(found, wanted, reach, what = "") {
  const flat = [found, wanted].map((v) => [v].flat(3));
  if (flat[0].length !== flat[1].length || !flat[0].every((v, i) => Math.abs(v - flat[1][i]) <= reach)) {
    throw new Error(`${what} ${show(found)} is not within ${reach} of ${show(wanted)}`);
  }
}
async function check(name, act) {
  try {
    await act();
    results.push([name, ""]);
  } catch (error) {
    results.push([name, `${error}\n${error.stack}`]);
  }
}

// A page that nobody looks at may get no frames: checks draw by themselves.
const frame = () => new Promise((done) => setTimeout(done, 5));

/** An image of one colour with a red square at (40, 30), 40 pixels wide. */
async function photo(width, height, ground = "#2050d0") {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = ground;
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#ff0000";
  context.fillRect(40, 30, 40, 40);
  const image = new Image();
  image.src = canvas.toDataURL();
  await image.decode();
  return image;
}

async function open(mode, size = [200, 160]) {
  const root = document.getElementById("editor");
  root.replaceChildren();
  const heard = [];
  const editor = new Editor(root, { mode, onChange: (values, done) => heard.push([structuredClone(values), done]) });
  editor.setImage("image", await photo(...size));
  await frame();
  return { editor, heard };
}

/** A pointer event at a point of the shown image. */
function pointer(editor, type, point, more = {}) {
  const rect = editor.canvas.getBoundingClientRect();
  const [x, y] = g.toScreen(editor.view, point);
  const place = { clientX: rect.left + (x * rect.width) / editor.canvas.clientWidth, clientY: rect.top + (y * rect.height) / editor.canvas.clientHeight };
  editor.canvas.setPointerCapture = () => {};
  editor.canvas.dispatchEvent(new PointerEvent(type, { pointerId: 1, button: 0, bubbles: true, cancelable: true, ...place, ...more }));
}

async function pull(editor, points, more = {}) {
  pointer(editor, "pointerdown", points[0], more);
  for (const point of points.slice(1)) pointer(editor, "pointermove", point, more);
  pointer(editor, "pointerup", points[points.length - 1], more);
  await frame();
}

function press(editor, key, more = {}) {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more });
  editor.keys.dispatchEvent(event);
  return event;
}

const button = (editor, name) => editor.root.querySelector(`[data-act=${name}]`);

/** The colour that the editor shows at a point of the image. */
function colour(editor, point) {
  editor.draw();
  const [x, y] = g.toScreen(editor.view, point).map((v) => Math.round((v * editor.canvas.width) / editor.canvas.clientWidth));
  return [...editor.canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
}

// ------------------------------------------------------------------------------------------------- geometry, as in Python

const cases = await (await fetch("/cases.json")).json();

await check("points are read as in Python", () => {
  for (const [text, wanted] of cases.points) equal(g.parsePoints(text), wanted, text);
  for (const [text, wanted] of cases.pairs) equal(g.parsePairs(text, ""), wanted, text);
});
await check("what is written is what Python writes", () => {
  for (const [points, wanted] of cases.written) equal(JSON.parse(g.formatPoints(points)), JSON.parse(wanted));
});
await check("a placement takes points to where Python takes them", () => {
  for (const [placement, from, wanted] of cases.placed) near(g.placed(placement, from), wanted, 1e-4, show(placement));
});
await check("a drawing covers what it covers in Python", () => {
  for (const [shapes, size, area, box] of cases.drawings) {
    const mask = maskOf(shapes, size, null);
    const bytes = mask.canvas.getContext("2d").getImageData(0, 0, ...size).data;
    const found = bytes.filter((v, i) => i % 4 === 3 && v >= 128).length;
    near(found, area, (box[2] - box[0] + box[3] - box[1]) / 2, show(shapes)); // a quarter of a pixel along the edge of its box
    near(mask.box, box, 1, show(shapes));
  }
});
await check("a subject is placed where Python places it", () => {
  for (const [photo, sides, size, filling] of cases.canvases) equal(g.seedCanvas(photo, sides), { size, filling }, show(sides));
  for (const [subject, canvas, scale, share, wanted] of cases.seeds) equal(g.seedBox(subject, canvas, scale, share), wanted, show(subject));
});
await check("what may change around drags is what Python takes", () => {
  for (const [pairs, size, wanted] of cases.around) near(g.around(pairs, size).map((s) => s.width), wanted, 1e-6);
});

// --------------------------------------------------------------------------------------------------------- geometry alone

await check("an image is fitted whole and centred, and points go there and back", () => {
  const view = g.fitted([200, 100], [312, 212]);
  equal(view, { scale: 1.5, x: 6, y: 31 });
  near(g.toImage(view, g.toScreen(view, [17, 33])), [17, 33], 1e-9);
  const closer = g.zoomed(view, [100, 100], 2);
  near(g.toImage(closer, [100, 100]), g.toImage(view, [100, 100]), 1e-9);
  equal(closer.scale, 3);
});
await check("a corner pulled to twice its distance doubles the size, within limits", () => {
  const at = { centre: [50, 50], scale: 1, angle: 0, shift: [10, 0] };
  equal(g.scaledBy(at, [70, 60], [80, 70]), 2);
  equal(g.scaledBy(at, [70, 60], [1060, 1050]), 8);
  equal(g.scaledBy(at, [70, 60], [60, 50]), 0.125);
});
await check("a quarter turn of the handle is 90 degrees, clockwise, and angles stay over (-180, 180]", () => {
  const at = { centre: [50, 50], scale: 1, angle: 0, shift: [0, 0] };
  equal(g.turnedBy(at, [50, 20], [80, 50]), 90);
  equal(g.turnedBy({ ...at, angle: 170 }, [50, 20], [80, 50]), -100);
  equal(g.turnedBy(at, [50, 20], [61, 22], 15), 15);
});
await check("a press takes hold of the turn handle, a corner, the inside, or nothing", () => {
  const handles = g.handlesOf({ centre: [50, 50], scale: 1, angle: 0, shift: [0, 0] }, [40, 40, 60, 60], { scale: 2, x: 0, y: 0 });
  equal(handles.turn, [100, 54]);
  const grips = [[100, 56], [82, 82], [100, 100], [10, 10]].map((at) => g.gripAt(handles, at)); // prettier-ignore
  equal(grips, ["turn", "scale", "move", null]);
});
await check("boxes are clipped to the image and never empty", () => {
  equal(g.boxBetween([90, 80], [-5, 20], [80, 60]), [0, 20, 80, 60]);
  equal(g.boxBetween([5, 5], [5.2, 40], [80, 60]), null);
});
await check("a stroke leaves points out that are close together", () => {
  let points = [];
  for (let x = 0; x <= 60; x++) points = g.extended(points, [x, 0], 60);
  equal(points.map(([x]) => x), [0, 10, 20, 30, 40, 50, 60]); // prettier-ignore
});
await check("history goes back and forth, and forgets what was undone", () => {
  const history = new g.History();
  for (const state of [1, 2, 2, 3]) history.push({ state });
  equal([history.go(-1), history.go(-1), history.go(-1)], [{ state: 2 }, { state: 1 }, null]);
  history.push({ state: 9 });
  equal([history.can(1), history.go(-1), history.go(1)], [false, { state: 1 }, { state: 9 }]);
});
await check("a text that is no drawing or no points is empty", () => {
  equal([g.parseDrawing("here"), g.parseDrawing(""), g.parseDrawing("[1]"), g.parsePoints("")], [[], [], [], []]);
});

// ------------------------------------------------------------------------------------------------------------ move

await check("a box is stored, and what is pulled next is the object", async () => {
  const { editor, heard } = await open("move");
  button(editor, "box").click();
  await pull(editor, [[40, 30], [60, 50], [80, 70]]); // prettier-ignore
  equal(editor.state.shapes, [{ box: [40, 30, 80, 70] }]);
  equal(editor.tool, "place");
  await pull(editor, [[60, 50], [80, 60], [110, 65]]); // prettier-ignore
  equal([editor.state.dx, editor.state.dy], [50, 15]);
  equal(heard.filter(([values]) => "dx" in values).at(-1)[0], { dx: 50, dy: 15 });
  const [red, , blue] = colour(editor, [110, 65]);
  if (red < 200 || blue > 90) throw new Error(`the ghost is not there: ${red}, ${blue}`);
});
await check("a stroke is as wide as the brush, and an eraser takes away", async () => {
  const { editor } = await open("move");
  await pull(editor, [[20, 80], [60, 80], [120, 80]]); // prettier-ignore
  equal(editor.state.shapes.length, 1);
  near(editor.mask.box, [20 - 6.5, 80 - 6.5, 120 + 6.5, 80 + 6.5], 1.5);
  button(editor, "erase").click();
  await pull(editor, [[20, 80], [40, 80]]); // prettier-ignore
  equal(Object.keys(editor.state.shapes[1]), ["erase", "width"]);
  near(editor.mask.box[0], 42, 2); // the round end leaves the corners of the stroke
  equal(editor.tool, "erase");
});
await check("a lasso needs an area", async () => {
  const { editor } = await open("move");
  button(editor, "outline").click();
  await pull(editor, [[20, 20], [21, 20]]); // prettier-ignore
  equal(editor.state.shapes, []);
  await pull(editor, [[20, 20], [90, 20], [90, 90], [20, 90]]); // prettier-ignore
  near(editor.mask.box, [20, 20, 90, 90], 1);
});
async function boxed(more = {}) {
  const { editor, heard } = await open("move");
  editor.setState({ shapes: [{ box: [40, 30, 80, 70] }], ...more });
  editor.setTool("place");
  await frame();
  return { editor, heard };
}
await check("a corner resizes and the knob turns", async () => {
  const { editor } = await boxed();
  await pull(editor, [[80, 70], [90, 80], [100, 90]]); // prettier-ignore
  equal(editor.state.scale, 2);
  const { turn } = g.handlesOf(editor.placement, editor.mask.box, editor.view);
  await pull(editor, [g.toImage(editor.view, turn), [120, 30], [140, 50]]);
  equal(editor.state.angle, 90);
});
await check("without an angle there is no knob", async () => {
  const { editor } = await boxed();
  editor.rotates = false;
  const { turn } = g.handlesOf(editor.placement, editor.mask.box, editor.view);
  await pull(editor, [g.toImage(editor.view, turn), [140, 50]]);
  equal([editor.state.angle, editor.state.dx], [0, 0]);
});
await check("undo and redo restore shapes and values, by button and by key", async () => {
  const { editor, heard } = await boxed();
  await pull(editor, [[60, 50], [70, 50]]); // prettier-ignore
  await pull(editor, [[70, 50], [90, 50]]); // prettier-ignore
  equal(editor.state.dx, 30);
  press(editor, "z", { ctrlKey: true });
  equal(editor.state.dx, 10);
  button(editor, "undo").click();
  equal(editor.state.dx, 0);
  press(editor, "Z", { ctrlKey: true, shiftKey: true });
  press(editor, "y", { ctrlKey: true });
  equal(editor.state.dx, 30);
  equal(heard.at(-1)[0].dx, 30);
  button(editor, "clear").click();
  equal([editor.state.shapes, editor.state.dx], [[], 0]);
  press(editor, "z", { ctrlKey: true });
  equal([editor.state.shapes.length, editor.state.dx], [1, 30]);
});
await check("arrow keys move by one pixel, with shift by ten", async () => {
  const { editor } = await boxed();
  for (const [key, shiftKey] of [["ArrowRight", true], ["ArrowLeft", false], ["ArrowDown", false]]) press(editor, key, { shiftKey }); // prettier-ignore
  equal([editor.state.dx, editor.state.dy], [9, 1]);
});
await check("Escape ends a pull where it began, and Delete clears", async () => {
  const { editor } = await boxed();
  pointer(editor, "pointerdown", [60, 50]);
  pointer(editor, "pointermove", [90, 50]);
  equal(editor.state.dx, 30);
  press(editor, "Escape");
  pointer(editor, "pointerup", [90, 50]);
  equal(editor.state.dx, 0);
  press(editor, "Delete");
  equal(editor.state.shapes, []);
});
await check("keys that are not the canvas's are left to the page", async () => {
  const { editor } = await boxed();
  equal([press(editor, "s", { ctrlKey: true }), press(editor, "q")].map((e) => e.defaultPrevented), [false, false]);
  equal(press(editor, "ArrowUp").defaultPrevented, true);
});
await check("values that were typed elsewhere are shown and can be undone", async () => {
  const { editor } = await boxed();
  editor.setState({ dx: 70 });
  const [red] = colour(editor, [130, 50]);
  if (red < 200) throw new Error(`the ghost is not there: ${red}`);
  press(editor, "z", { ctrlKey: true });
  equal(editor.state.dx, 0);
});
await check("nothing before a saved drawing is there to be undone", async () => {
  const { editor } = await open("move");
  editor.begin({ shapes: [{ box: [40, 30, 80, 70] }] });
  editor.begin({ dx: 12 });
  press(editor, "z", { ctrlKey: true });
  equal([editor.state.shapes.length, editor.state.dx, editor.undoButton.disabled], [1, 12, true]);
});
await check("an object cannot be pulled out of sight, and its way is said without a minus", async () => {
  const { editor } = await boxed();
  await pull(editor, [[60, 50], [0, 0], [-300, -300]]); // prettier-ignore
  equal([editor.state.dx, editor.state.dy, editor.hint], [-60, -50, "60 left, 50 up"]);
  await pull(editor, [[5, 5], [60, 50]]); // prettier-ignore
  equal([editor.state.dx, editor.state.dy], [-5, -5]);
});
await check("a drawing of another image says so until it is drawn again", async () => {
  const { editor } = await boxed({ dx: 5 });
  editor.drawnOn = [768, 512];
  equal(editor.hint, "Drawn on 768 x 512 pixels: check it, or press Clear.");
  editor.drawnOn = [...editor.sourceSize];
  equal(editor.hint, "5 right, 0 down");
});
await check("words about the image that is shown stand in the corner", async () => {
  const { editor } = await open("paste");
  editor.setImage("reference", await photo(200, 160));
  editor.notes = { image: "Image of the last run", reference: "" };
  const corner = () => {
    editor.draw();
    const { canvas } = editor;
    const { data } = canvas.getContext("2d").getImageData(0, canvas.height - 18, 100, 18);
    return data.filter((v, i) => i % 4 === 0 && v > 150).length; // letters
  };
  equal([editor.note, corner()], ["", 0]);
  editor.setTool("place");
  equal(editor.note, "Image of the last run");
  if (corner() < 20) throw new Error("no words are drawn");
});
await check("points of another image say so until they are pulled again", async () => {
  const { editor } = await open("drag");
  await pull(editor, [[50, 50], [90, 55]]); // prettier-ignore
  editor.drawnOn = [768, 512];
  equal(editor.hint, "Drawn on 768 x 512 pixels: check it, or press Clear.");
  equal([g.formatDrawing([], [768, 512], true), g.formatDrawing([], [768, 512])], ['{"size":[768,512],"shapes":[]}', ""]);
});
await check("a point outside the image, and a subject larger than its canvas, are named", async () => {
  const drag = (await open("drag")).editor;
  drag.setState({ pairs: [[[20, 20], [30, 30]], [[900, 20], [30, 30]]] }); // prettier-ignore
  equal(drag.hint, "Point 2 lies outside the image. Press Clear.");
  const { editor } = await open("seed");
  editor.setState({ width: 64, height: 64, scale: 1, x: 0, y: 0, shapes: [{ box: [40, 30, 108, 70] }] });
  editor.setTool("place");
  equal(editor.hint, "x 0, y 0, 100 %");
  editor.setState({ scale: 1.1 });
  equal(editor.hint, "Larger than the canvas: pull a corner inwards.");
});
await check("the connected mask is the object, with what is painted", async () => {
  const { editor } = await open("move");
  const white = Object.assign(document.createElement("canvas"), { width: 200, height: 160 });
  const context = white.getContext("2d");
  context.fillRect(0, 0, 200, 160);
  context.fillStyle = "#fff";
  context.fillRect(10, 20, 30, 40);
  const image = new Image();
  image.src = white.toDataURL();
  await image.decode();
  editor.setMask(image);
  equal(editor.mask.box, [10, 20, 40, 60]);
  editor.setState({ shapes: [{ box: [100, 20, 120, 30] }] });
  equal(editor.mask.box, [10, 20, 120, 60]);
});
await check("a page that is scaled draws where the pointer is", async () => {
  const { editor } = await open("move");
  editor.root.style.transform = "scale(0.6)";
  editor.root.style.transformOrigin = "0 0";
  button(editor, "box").click();
  await pull(editor, [[40, 30], [80, 70]]); // prettier-ignore
  editor.root.style.transform = "";
  equal(editor.state.shapes, [{ box: [40, 30, 80, 70] }]);
});
await check("a wheel zooms where the canvas has the focus, and is left to the page elsewhere", async () => {
  const { editor } = await open("move");
  const before = editor.view.scale;
  const wheel = () => editor.canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -200, bubbles: true, cancelable: true }));
  equal([wheel(), editor.view.scale === before], [true, true]);
  editor.keys.focus();
  equal([wheel(), editor.view.scale > before], [false, true]);
});
await check("two fingers zoom and pan instead of painting", async () => {
  const { editor } = await open("move");
  const before = editor.view.scale;
  pointer(editor, "pointerdown", [80, 80], { pointerId: 1 });
  pointer(editor, "pointerdown", [120, 80], { pointerId: 2 });
  pointer(editor, "pointermove", [160, 80], { pointerId: 2 });
  pointer(editor, "pointerup", [160, 80], { pointerId: 2 });
  pointer(editor, "pointerup", [80, 80], { pointerId: 1 });
  if (editor.view.scale <= before) throw new Error("not zoomed");
  equal(editor.state.shapes, []);
});
await check("what the first finger did before the second came, or before the page took it away, is taken back", async () => {
  for (const ends of ["pinch", "pointercancel", "b", "z"]) {
    const { editor } = await open("drag");
    await pull(editor, [[50, 50], [90, 55]]); // prettier-ignore
    pointer(editor, "pointerdown", [120, 80], { pointerType: "touch" });
    pointer(editor, "pointermove", [126, 84], { pointerType: "touch" });
    equal(editor.state.pairs.length, 2, ends);
    if (ends === "pinch") pointer(editor, "pointerdown", [60, 80], { pointerId: 2, pointerType: "touch" });
    else if (ends === "pointercancel") pointer(editor, "pointercancel", [126, 84]);
    else press(editor, ends, { ctrlKey: ends === "z" });
    equal(editor.state.pairs, [[[50, 50], [90, 55]]], ends); // prettier-ignore
    pointer(editor, "pointermove", [140, 90], { pointerType: "touch" });
    for (const pointerId of [2, 1]) pointer(editor, "pointerup", [126, 84], { pointerId, pointerType: "touch" });
    equal(editor.state.pairs.length, 1, ends);
    equal(editor.state.shapes, [], ends);
  }
});
await check("a finger takes hold from further away than the mouse, and a small object can be moved", async () => {
  const { editor } = await open("move", [800, 640]);
  await pull(editor, [[40, 30], [60, 50]]); // prettier-ignore
  editor.setState({ shapes: [{ box: [40, 30, 60, 50] }], dx: 0, dy: 0 });
  editor.setTool("place");
  const off = 16 / editor.view.scale;
  await pull(editor, [[60 + off, 50 + off / 4], [120, 90]]); // prettier-ignore
  equal(editor.state.scale, 1, "the mouse");
  await pull(editor, [[60 + off, 50 + off / 4], [120, 90]], { pointerType: "touch" }); // prettier-ignore
  if (editor.state.scale <= 1) throw new Error("the finger did not take hold of the corner");
  editor.setState({ scale: 1 });
  await pull(editor, [[50, 40], [70, 45]], { pointerType: "touch" }); // prettier-ignore
  equal([editor.state.dx, editor.state.dy, editor.state.scale], [20, 5, 1]);
});

// ------------------------------------------------------------------------------------------------------------ drag

await check("points are pulled, moved, pinned and deleted", async () => {
  const { editor } = await open("drag");
  await pull(editor, [[50, 50], [60, 50], [90, 55]]); // prettier-ignore
  await pull(editor, [[120, 100]]);
  equal(editor.state.pairs, [[[50, 50], [90, 55]], [[120, 100], [120, 100]]]); // prettier-ignore
  await pull(editor, [[90, 55], [100, 60]]); // prettier-ignore
  equal(editor.state.pairs[0], [[50, 50], [100, 60]]); // prettier-ignore
  press(editor, "ArrowRight");
  equal(editor.state.pairs[0][1], [101, 60]);
  await pull(editor, [[50, 50], [40, 50]]); // prettier-ignore
  equal(editor.state.pairs[0][0], [40, 50]);
  press(editor, "Delete");
  equal(editor.state.pairs, [[[120, 100], [120, 100]]]); // prettier-ignore
  press(editor, "z", { ctrlKey: true });
  equal(editor.state.pairs.length, 2);
});
await check("a point stays within the image", async () => {
  const { editor } = await open("drag");
  await pull(editor, [[50, 50], [260, -40]]); // prettier-ignore
  equal(editor.state.pairs, [[[50, 50], [200, 0]]]); // prettier-ignore
});

// ------------------------------------------------------------------------------------------- paint on one, place on another

await check("an object of one image is placed on another", async () => {
  const { editor } = await open("paste", [300, 300]);
  equal(editor.size, null);
  editor.setImage("reference", await photo(200, 160, "#20d050"));
  await frame();
  equal(editor.size, [200, 160]);
  button(editor, "box").click();
  await pull(editor, [[40, 30], [80, 70]]); // prettier-ignore
  await frame();
  equal(editor.size, [300, 300]);
  await pull(editor, [[60, 50], [200, 220]]); // prettier-ignore
  equal([editor.state.dx, editor.state.dy], [140, 170]);
  const [red] = colour(editor, [200, 220]);
  if (red < 200) throw new Error(`the ghost is not there: ${red}`);
});
await check("a subject is placed on a canvas, resized and mirrored", async () => {
  const { editor } = await open("seed");
  editor.setState({ width: 128, height: 96, scale: 1, x: 0, y: 0, shapes: [{ box: [40, 30, 80, 70] }] });
  editor.setTool("place");
  await frame();
  equal(editor.size, [128, 96]);
  await pull(editor, [[20, 20], [64, 48]]); // prettier-ignore
  near([editor.state.x, editor.state.y], [0.5, 0.5], 0.06);
  editor.mirrors = true;
  button(editor, "mirror").click();
  equal(editor.state.mirror, true);
  press(editor, "z", { ctrlKey: true });
  equal(editor.state.mirror, false);
});

await fetch("/results", { method: "POST", body: JSON.stringify(results) });
