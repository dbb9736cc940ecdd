"use strict";
(() => {
  const rows = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // The map of a panel, unpacked when it is first needed: position of the segment (counted from 1) for every pixel.
  function unpack(panel) {
    if (!panel.map) {
      panel.map = new Uint32Array(panel.width * panel.height);
      let at = 0;
      for (let i = 0; i < panel.runs.length; i += 2) {
        panel.map.fill(panel.runs[i], at, at + panel.runs[i + 1]);
        at += panel.runs[i + 1];
      }
    }
    return panel.map;
  }

  // Darkens everything but the segment at this position; 0 clears the canvas.
  function light(figure, panel, position) {
    const canvas = figure.querySelector("canvas");
    if (canvas.lit === position) return;
    canvas.lit = position;
    canvas.width = panel.width;
    canvas.height = panel.height;
    if (!position) return;
    const map = unpack(panel);
    const context = canvas.getContext("2d");
    const shade = context.createImageData(panel.width, panel.height);
    for (let i = 0; i < map.length; i++) shade.data[4 * i + 3] = map[i] === position ? 0 : 150;
    context.putImageData(shade, 0, 0);
  }

  function tell(event, segment) {
    const verdict = document.createElement("b");
    verdict.className = segment.verdict.slice(0, 2);
    verdict.textContent = segment.verdict;
    const detail = document.createElement("span");
    detail.textContent = segment.detail;
    tip.replaceChildren(segment.name, verdict, detail);
    tip.hidden = false;
    const x = event.clientX + 16, y = event.clientY + 18;
    tip.style.left = Math.max(4, Math.min(x, innerWidth - tip.offsetWidth - 6)) + "px";
    tip.style.top = (y + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : y) + "px";
  }

  document.querySelectorAll("article.row").forEach((article, number) => {
    const figures = {};
    for (const side of ["truth", "prediction"]) figures[side] = article.querySelector(`[data-side=${side}]`);

    function show(event, side) {
      const other = side === "truth" ? "prediction" : "truth";
      const panel = rows[number][side], partners = rows[number][other];
      const box = figures[side].querySelector("img").getBoundingClientRect();
      const x = Math.floor((event.clientX - box.left) / box.width * panel.width);
      const y = Math.floor((event.clientY - box.top) / box.height * panel.height);
      const inside = x >= 0 && y >= 0 && x < panel.width && y < panel.height;
      const position = inside ? unpack(panel)[y * panel.width + x] : 0;
      const segment = panel.segments[position - 1];
      light(figures[side], panel, position);
      const partner = segment && segment.partner ? partners.segments.findIndex(s => s.id === segment.partner) + 1 : 0;
      light(figures[other], partners, partner);
      if (segment) tell(event, segment);
      else if (inside) tell(event, { name: "no label", verdict: "", detail: "" });
      else tip.hidden = true;
    }

    function hide() {
      tip.hidden = true;
      for (const side in figures) light(figures[side], rows[number][side], 0);
    }

    for (const side in figures) {
      const picture = figures[side].querySelector(".picture");
      picture.addEventListener("pointermove", event => show(event, side));
      picture.addEventListener("pointerdown", event => show(event, side));
      picture.addEventListener("pointerleave", hide);
    }

    const button = article.querySelector(".enlarge");
    button.addEventListener("click", () => {
      const large = article.classList.toggle("large");
      button.setAttribute("aria-pressed", large);
      button.textContent = large ? "Side by side" : "Enlarge";
    });
  });

  // Sorting by a column: numbers from high to low first, names from A to Z; the rows of groups stay on top.
  document.querySelectorAll("table.quality thead th").forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0];
      const first = column === 0 ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? (column === 0 ? "descending" : "ascending") : first;
      head.parentElement.querySelectorAll("[aria-sort]").forEach(cell => cell.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const text = row => row.cells[column].textContent;
      const value = row => Number.isNaN(parseFloat(text(row))) ? -1 : parseFloat(text(row));
      const compare = column === 0 ? (a, b) => text(a).localeCompare(text(b)) : (a, b) => value(a) - value(b);
      const classes = [...body.rows].filter(row => !row.classList.contains("group"));
      body.append(...classes.sort((a, b) => sign * compare(a, b)));
    });
  });
})();
