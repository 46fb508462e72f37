/* One photo: the frame that every crop must keep, and the brush for its mask. */
"use strict";

const editor = document.getElementById("editor");
const stage = editor.querySelector(".stage");
const frame = editor.querySelector(".box");
const canvas = editor.querySelector("canvas");
const width = Number(editor.dataset.width);
const height = Number(editor.dataset.height);
const say = (text) => { document.getElementById("told").textContent = text; };

async function put(what, body) {
  const answer = await fetch(`${editor.dataset.photo}/${what}`, { method: "PUT", body });
  say(answer.ok ? editor.dataset.saved : await answer.text());
  return answer.ok;
}

/* Left, top, right, bottom in pixels of the photo. */
let box = editor.dataset.box ? editor.dataset.box.split(" ").map(Number) : null;

function showBox() {
  frame.hidden = box === null;
  if (box === null) return;
  const [left, top, right, bottom] = box;
  frame.style.left = `${(100 * left) / width}%`;
  frame.style.top = `${(100 * top) / height}%`;
  frame.style.width = `${(100 * (right - left)) / width}%`;
  frame.style.height = `${(100 * (bottom - top)) / height}%`;
  frame.setAttribute("aria-valuetext", box.map(Math.round).join(", "));
}

function place(left, top, wide, high) {
  const w = Math.min(Math.max(wide, 8), width);
  const h = Math.min(Math.max(high, 8), height);
  const x = Math.min(Math.max(left, 0), width - w);
  const y = Math.min(Math.max(top, 0), height - h);
  box = [x, y, x + w, y + h].map(Math.round);
  showBox();
}

let saving;
function saveBox() {
  clearTimeout(saving);
  saving = setTimeout(() => put("box", box === null ? "" : JSON.stringify(box)), 250);
}

const scale = () => width / stage.clientWidth;
frame.addEventListener("pointerdown", (event) => {
  const sizes = event.target.classList.contains("grip");
  const [left, top, right, bottom] = box;
  const begin = [event.clientX, event.clientY];
  frame.setPointerCapture(event.pointerId);
  const move = (at) => {
    const x = (at.clientX - begin[0]) * scale();
    const y = (at.clientY - begin[1]) * scale();
    if (sizes) place(left, top, Math.min(right - left + x, width - left), Math.min(bottom - top + y, height - top));
    else place(left + x, top + y, right - left, bottom - top);
  };
  const end = () => {
    frame.removeEventListener("pointermove", move);
    saveBox();
  };
  frame.addEventListener("pointermove", move);
  frame.addEventListener("pointerup", end, { once: true });
  frame.addEventListener("pointercancel", end, { once: true });
  event.preventDefault();
  frame.focus();
});
frame.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!steps || box === null) return;
  event.preventDefault();
  const step = Math.max(1, Math.round(width / 100));
  const [left, top, right, bottom] = box;
  const [x, y] = steps.map((one) => one * step);
  if (event.shiftKey) place(left, top, Math.min(right - left + x, width - left), Math.min(bottom - top + y, height - top));
  else place(left + x, top + y, right - left, bottom - top);
  saveBox();
});
document.getElementById("box-on").addEventListener("click", () => {
  const side = 0.7 * Math.min(width, height);
  if (box === null) place((width - side) / 2, (height - side) / 2, side, side);
  saveBox();
  frame.focus();
});
document.getElementById("box-off").addEventListener("click", () => { box = null; showBox(); saveBox(); });

/* The face that was found: a frame of dashes, and a crop with some room around it. */
const ROOM = 1.9;
function showFace() {
  const button = document.getElementById("box-face");
  if (!button) return;
  const [left, top, right, bottom] = button.dataset.face.split(" ").map(Number);
  const face = stage.querySelector(".face");
  face.hidden = false;
  face.style.left = `${(100 * left) / width}%`;
  face.style.top = `${(100 * top) / height}%`;
  face.style.width = `${(100 * (right - left)) / width}%`;
  face.style.height = `${(100 * (bottom - top)) / height}%`;
  button.addEventListener("click", () => {
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    const [wide, high] = [(ROOM * (right - left)) / 2, (ROOM * (bottom - top)) / 2];
    const [from, above] = [Math.max(0, x - wide), Math.max(0, y - high)];
    place(from, above, Math.min(width, x + wide) - from, Math.min(height, y + high) - above);
    saveBox();
    frame.focus();
  });
}
document.body.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "faces") showFace();
});

/* The mask is painted in the photo's own pixels, white on black. */
const ink = canvas.getContext("2d");
if (editor.dataset.hasMask) {
  const stored = new Image();
  stored.onload = () => ink.drawImage(stored, 0, 0, width, height);
  stored.src = `${editor.dataset.photo}/mask`;
}
const brush = () => editor.querySelector("input[name=brush]:checked").value;
editor.addEventListener("change", () => canvas.classList.toggle("brush", brush() !== ""));
let last = null;
function stroke(event) {
  const at = [event.offsetX * scale(), event.offsetY * scale()];
  ink.lineCap = "round";
  ink.lineWidth = (document.getElementById("brush-size").value / 100) * width;
  ink.strokeStyle = brush() === "paint" ? "#fff" : "#000";
  ink.beginPath();
  ink.moveTo(...(last || at));
  ink.lineTo(...at);
  ink.stroke();
  last = at;
}
canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
canvas.addEventListener("pointermove", (event) => { if (event.buttons) stroke(event); });
canvas.addEventListener("pointerup", () => { last = null; });
document.getElementById("mask-save").addEventListener("click", () => {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [width, height];
  const paper = whole.getContext("2d");
  paper.fillRect(0, 0, width, height);
  paper.drawImage(canvas, 0, 0);
  whole.toBlob((blob) => put("mask", blob), "image/png");
});
document.getElementById("mask-off").addEventListener("click", async () => {
  if (await put("mask", "")) ink.clearRect(0, 0, width, height);
});

document.getElementById("caption-save").addEventListener("click", () => put("caption", document.getElementById("caption").value));
showBox();
