// What is wider than the screen scrolls in itself; by keyboard, too. The theme wraps tables late.
function markScrolling() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
markScrolling();
addEventListener("resize", markScrolling);
new MutationObserver(markScrolling).observe(document.body, { childList: true, subtree: true });
// The theme's search is a dialog without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
