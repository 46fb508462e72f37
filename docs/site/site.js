// What is wider than the screen scrolls in itself; by keyboard, too.
for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
  box.tabIndex = 0;
}
// The theme's search is a dialog without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
