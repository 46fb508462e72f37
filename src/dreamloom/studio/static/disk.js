/* What was deleted on this page goes for good when the page is left. */
"use strict";

window.addEventListener("pagehide", () => {
  const disk = document.getElementById("disk");
  navigator.sendBeacon(disk.dataset.empty, disk.dataset.page);
});
/* A page that the browser brings back shows what is there now. */
window.addEventListener("pageshow", (event) => {
  if (event.persisted) window.location.reload();
});
