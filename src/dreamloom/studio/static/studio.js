/* What the studio's pages do beyond links and forms. No text stands here: it comes with the page. */
"use strict";

const told = () => document.getElementById("told");
let fading;
function tell(text) {
  if (!told()) return;
  told().textContent = text;
  clearTimeout(fading);
  if (text) fading = setTimeout(() => { told().textContent = ""; }, 8000);
}

document.body.addEventListener("htmx:responseError", (event) => tell(event.detail.xhr.responseText));
document.body.addEventListener("htmx:sendError", () => tell(told().dataset.lost));
document.body.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful && told().textContent === told().dataset.lost) tell("");
  if (event.detail.target === told()) tell(told().textContent);
});

/* A list that is shown anew every two seconds keeps the focus where it was. */
let focused = "";
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const active = document.activeElement;
  focused = event.detail.target.contains(active) ? active.getAttribute("aria-label") || "" : "";
});
document.body.addEventListener("htmx:afterSettle", (event) => {
  if (!focused) return;
  const same = event.detail.target.querySelector(`[aria-label="${CSS.escape(focused)}"]`);
  if (same) same.focus();
});

/* A command that is copied as it stands. */
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(text.textContent);
    tell(button.dataset.copied);
  } catch {
    getSelection().selectAllChildren(text);
  }
});

/* Forms that ask before they destroy. */
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.ask;
  if (question && !window.confirm(question)) event.preventDefault();
});

/* The stream of events; where it does not pass, the page asks every two seconds. */
let polling = null;
function poll() {
  document.querySelectorAll("[hx-trigger*=poll]").forEach((one) => window.htmx.trigger(one, "poll"));
  window.dispatchEvent(new Event("poll-curve"));
}
document.body.addEventListener("htmx:sseError", () => {
  if (polling === null) polling = setInterval(poll, 2000);
});
document.body.addEventListener("htmx:sseOpen", () => {
  clearInterval(polling);
  polling = null;
});

/* The losses: what was there when the page was made, then what the stream adds. */
function startCurve(box) {
  const labels = JSON.parse(box.dataset.labels);
  const rows = { update: [], subject: [], prior: [] };
  let plot = null;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const smooth = (values) => {
    let mean = null;
    return values.map((value) => {
      if (value === null) return mean;
      mean = mean === null ? value : 0.95 * mean + 0.05 * value;
      return mean;
    });
  };
  const data = () => {
    const some = [rows.update, rows.subject, smooth(rows.subject)];
    if (rows.prior.some((value) => value !== null)) some.push(rows.prior, smooth(rows.prior));
    return some;
  };
  const draw = () => {
    if (!rows.update.length) {
      box.textContent = box.dataset.empty;
      return;
    }
    const shown = data();
    if (plot && plot.series.length === shown.length) {
      plot.setData(shown);
      return;
    }
    if (plot) plot.destroy();
    box.textContent = "";
    const line = (label, name, width, alpha) => ({
      label, stroke: colour(name), width, alpha, points: { show: false }, spanGaps: true,
    });
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line") } };
    const series = [
      { label: labels[0] },
      line(labels[1], "--accent", 1, 0.35),
      line(`${labels[1]}, ${labels[3]}`, "--accent", 2, 1),
    ];
    if (shown.length > 3) {
      series.push(line(labels[2], "--warm", 1, 0.35), line(`${labels[2]}, ${labels[3]}`, "--warm", 2, 1));
    }
    const options = {
      width: box.clientWidth - 36, height: 250, series, axes: [axis, { ...axis, size: 60 }],
      scales: { x: { time: false } }, cursor: { drag: { x: true, y: false } },
    };
    plot = new window.uPlot(options, shown, box);
  };
  const add = (event) => {
    const place = rows.update.indexOf(event.update);
    if (place >= 0) for (const name of Object.keys(rows)) rows[name].length = place;
    rows.update.push(event.update);
    rows.subject.push(event.subject);
    rows.prior.push(event.prior);
  };
  const load = () => fetch(box.dataset.curve).then((answer) => answer.json()).then((got) => {
    for (const name of Object.keys(rows)) rows[name] = got.losses[name];
    draw();
  });
  load();
  window.addEventListener("poll-curve", load);
  window.addEventListener("resize", () => {
    if (plot) plot.setSize({ width: box.clientWidth - 36, height: 250 });
  });
  document.body.addEventListener("htmx:sseMessage", (message) => {
    if (message.detail.type !== "events") return;
    const events = JSON.parse(message.detail.data);
    events.filter((one) => one.event === "LossLogged").forEach(add);
    if (events.some((one) => one.event === "LossLogged")) draw();
    if (events.some((one) => ["ValidationSampled", "StageDone"].includes(one.event))) {
      window.htmx.trigger(document.body, "looked");
    }
  });
}

/* Two looks in one picture, with a line between them that can be moved. */
function startSplit(root) {
  const value = (side) => root.querySelector(`[data-split-side=${side}]`).value;
  const frame = root.querySelector(".split");
  const show = () => {
    const source = (side) => `${frame.dataset.looks}/${value(side)}/${value("picture")}`;
    frame.querySelector(".over").src = source("left");
    frame.querySelector(".under").src = source("right");
    frame.querySelector(".over").style.clipPath = `inset(0 ${100 - value("where")}% 0 0)`;
  };
  root.addEventListener("input", show);
  root.addEventListener("toggle", show);
}

/* Photos that are dropped or chosen: one PUT each, its bytes as they are. */
async function putPhotos(box, files) {
  const refused = document.getElementById("refused");
  refused.textContent = "";
  let stored = 0;
  const all = [...files];
  for (const file of all) {
    tell(box.dataset.busy.replace("{n}", stored + 1).replace("{all}", all.length));
    try {
      const answer = await fetch(box.dataset.put, {
        method: "PUT", body: file, headers: { "X-File-Name": encodeURIComponent(file.name) },
      });
      if (answer.ok) stored += 1;
      else {
        const line = document.createElement("li");
        line.textContent = await answer.text();
        refused.append(line);
      }
    } catch {
      tell(told().dataset.lost);
      break;
    }
  }
  tell(box.dataset.done.replace("{n}", stored));
  window.htmx.trigger(document.body, "photos-changed");
}

async function filesOf(items) {
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) found.push(await new Promise((take, fail) => entry.file(take, fail)));
    else {
      const reader = entry.createReader();
      for (let some = []; ; found.length) {
        some = await new Promise((take, fail) => reader.readEntries(take, fail));
        if (!some.length) break;
        for (const one of some) await walk(one);
      }
    }
  };
  const entries = [...items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry());
  for (const entry of entries.filter(Boolean)) await walk(entry);
  return found;
}

function startDrop(box) {
  const isPicture = (file) => file.type.startsWith("image/") || /\.(hei[cf]|jpe?g|png|webp|avif|tiff?)$/i.test(file.name);
  box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
  box.addEventListener("dragleave", () => box.classList.remove("over"));
  box.addEventListener("drop", async (event) => {
    event.preventDefault();
    box.classList.remove("over");
    const plain = [...event.dataTransfer.files];
    const files = await filesOf(event.dataTransfer.items);
    await putPhotos(box, files.length ? files : plain);
  });
  for (const input of box.querySelectorAll("input[type=file]")) {
    input.addEventListener("change", async () => {
      const files = [...input.files];
      await putPhotos(box, input.id === "folder" ? files.filter(isPicture) : files);
      input.value = "";
    });
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-delete]");
  if (!button) return;
  const answer = await fetch(button.dataset.delete, { method: "DELETE" });
  if (!answer.ok) tell(await answer.text());
  window.htmx.trigger(document.body, "photos-changed");
});

/* A form whose faults stand beside their controls, and whose settings can be searched. */
function showFaults(plan) {
  const list = plan.querySelector("[data-faults]");
  if (!list) return;
  const faults = JSON.parse(list.dataset.faults);
  const form = plan.closest("form");
  form.querySelectorAll("[data-fault]").forEach((place) => {
    const name = place.dataset.fault;
    place.textContent = faults[name] || "";
    const control = form.querySelector(`[name="${CSS.escape(name)}"]`);
    if (control) control.setAttribute("aria-invalid", name in faults ? "true" : "false");
    if (name in faults && place.closest("details")) place.closest("details").open = true;
  });
  const start = form.querySelector("#start, [data-start]");
  if (start) start.disabled = Object.keys(faults).length > 0;
}
document.body.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.matches("#plan, [data-plan]")) showFaults(event.detail.target);
  start(event.detail.target);
});

document.addEventListener("input", (event) => {
  const field = event.target.closest("[data-default]");
  if (field) field.classList.toggle("changed", event.target.value !== field.dataset.default);
  if (!event.target.matches("[data-find]")) return;
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll("details.room").forEach((room) => {
    let some = false;
    room.querySelectorAll(event.target.dataset.find).forEach((one) => {
      const text = one.textContent.toLowerCase();
      one.hidden = !words.every((word) => text.includes(word));
      some = some || !one.hidden;
    });
    room.hidden = !some;
    if (words.length) room.open = some;
  });
});

/* Another preset has other values: the form is made anew, with what the user set. */
document.addEventListener("change", (event) => {
  const address = event.target.dataset.reload;
  if (!address) return;
  const form = event.target.form;
  const kept = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    const field = form.querySelector(`[data-name="${CSS.escape(name)}"]`);
    if (!field || value !== field.dataset.default) kept.append(name, value);
  }
  window.location.assign(`${address}?${kept}`);
});

function start(root) {
  root.querySelectorAll("[data-curve]").forEach(startCurve);
  root.querySelectorAll("#split").forEach(startSplit);
  root.querySelectorAll("#drop").forEach(startDrop);
}
start(document);
