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
// An option is one word: browsers would break the line behind its hyphens.
for (const code of document.querySelectorAll(".md-typeset code")) {
  const words = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (words.nextNode()) texts.push(words.currentNode);
  for (const text of texts) {
    const parts = text.data.split(/((?<![\w-])--?[a-z][\w-]*)/);
    if (parts.length < 3) continue;
    text.replaceWith(...parts.map((part, n) => {
      if (n % 2 === 0) return part;
      const option = document.createElement("span");
      option.className = "option";
      option.textContent = part;
      return option;
    }));
  }
}
// The theme's search is a dialog without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
