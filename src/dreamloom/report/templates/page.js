// A closer look: the clicked picture beside its neighbours of the same prompt and seed.
(() => {
  const dialog = document.createElement("dialog");
  if (typeof dialog.showModal !== "function") return;
  dialog.className = "zoom";
  dialog.setAttribute("aria-label", "A closer look");
  document.body.append(dialog);

  const shots = [...document.querySelectorAll(".shot img, .strip img")];
  let current = null;

  const element = (name, text, className = "") => {
    const made = document.createElement(name);
    made.textContent = text;
    made.className = className;
    return made;
  };

  const enlarged = (image, title, chosen) => {
    const figure = element("figure", "", chosen ? "chosen" : "");
    const copy = image.cloneNode();
    for (const name of ["role", "tabindex"]) copy.removeAttribute(name);
    const caption = element("figcaption", "");
    caption.append(element("b", title), " ");
    for (const badge of image.closest("figure").querySelectorAll("[title]")) {
      caption.append(` ${badge.title} ${badge.textContent} `);
    }
    figure.append(copy, caption);
    return figure;
  };

  const show = (image) => {
    current = image;
    const row = image.closest(".row");
    const side = element("div", "", "side");
    const head = element("h4", row ? row.dataset.prompt : image.alt);
    const figure = image.closest("figure");
    if (row) {
      const seed = figure.dataset.seed;
      const columns = [...row.closest(".gallery").querySelectorAll(".columns b")];
      [...row.querySelectorAll(".shots")].forEach((cell, index) => {
        const twin = cell.contains(image)
          ? image
          : cell.querySelector(`.shot[data-seed="${seed}"] img`);
        if (twin) side.append(enlarged(twin, columns[index].textContent, twin === image));
      });
      dialog.replaceChildren(head, element("p", `seed ${seed}`, "small soft"), side);
    } else {
      side.append(enlarged(image, "", false));
      dialog.replaceChildren(head, side);
    }
    const turn = element("div", "", "turn");
    for (const [text, act] of [
      ["← Previous", () => move(-1)],
      ["Next →", () => move(1)],
      ["Close", () => dialog.close()],
    ]) {
      const button = element("button", text);
      button.type = "button";
      button.addEventListener("click", act);
      turn.append(button);
    }
    dialog.append(turn, element("p", "The arrow keys turn, Esc closes.", "help"));
    if (!dialog.open) dialog.showModal();
  };

  const move = (step) => {
    const next = shots[shots.indexOf(current) + step];
    if (!next) return;
    show(next);
    dialog.querySelectorAll("button")[step < 0 ? 0 : 1].focus();
  };

  for (const image of shots) {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.addEventListener("click", () => show(image));
    image.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      show(image);
    });
  }
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => current && current.focus());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) move(step);
  });
})();
