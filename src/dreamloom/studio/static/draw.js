/* What the pages of drawing and mixing do beyond forms: a slider moves with its number. */
"use strict";

document.addEventListener("input", (event) => {
  const slider = event.target.closest("[data-slides]");
  if (slider) {
    const number = document.getElementById(slider.dataset.slides);
    number.value = slider.value;
    number.dispatchEvent(new Event("input", { bubbles: true }));
    return;
  }
  if (!event.target.id) return;
  const own = document.querySelector(`[data-slides="${CSS.escape(event.target.id)}"]`);
  if (own && own !== document.activeElement) own.value = event.target.value;
});
