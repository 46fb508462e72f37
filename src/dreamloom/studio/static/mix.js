/* The pictures that were drawn ahead: the sliders show those of the nearest weights, at once. */
"use strict";

(() => {
  const box = document.getElementById("drawn-ahead");
  if (!box) return;
  const cells = [...box.querySelectorAll("[data-cell]")];
  const number = (place) => document.getElementById(`weight${place}`);
  const show = () => {
    const first = parseFloat(number(1).value), second = parseFloat(number(2).value);
    if (!Number.isFinite(first) || !Number.isFinite(second)) return;
    const far = cells.map((cell) => Math.hypot(cell.dataset.first - first, cell.dataset.second - second));
    const nearest = far.indexOf(Math.min(...far));
    cells.forEach((cell, place) => cell.toggleAttribute("data-aside", place !== nearest));
    document.querySelectorAll("[data-point]").forEach((point) => {
      point.classList.toggle("chosen", Number(point.dataset.point) === nearest);
    });
  };
  box.classList.add("one");
  for (const place of [1, 2]) number(place).addEventListener("input", show);
  document.querySelectorAll("[data-point]").forEach((point) => point.addEventListener("click", () => {
    const cell = cells[Number(point.dataset.point)];
    [cell.dataset.first, cell.dataset.second].forEach((weight, place) => {
      number(place + 1).value = weight;
      number(place + 1).dispatchEvent(new Event("input", { bubbles: true }));
    });
  }));
  show();
})();
